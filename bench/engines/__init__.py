"""Engines that shard: their steps, their checkpoints, another number of ranks. `python -m bench.engines`."""
