"""What a corpus holds: `python -m dataload.stats`."""
