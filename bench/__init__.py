"""Measurements: run from a checkout (`make bench`), never installed."""
