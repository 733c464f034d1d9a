"""Data for image-text training: shards in, batches out. Imports nothing of the project's other packages."""
