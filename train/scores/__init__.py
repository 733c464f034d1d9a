"""Scores: one file per task; tensors and strings in, numbers out. Nothing here knows a model or a loader."""
