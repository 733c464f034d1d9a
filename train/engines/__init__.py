"""Training on many ranks: which engine a run gets, those that shard, how ranks meet, and who hangs or lags. train/engine.py has
the one that they are made of."""
