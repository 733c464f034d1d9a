"""What the child processes of dataload.sandbox run: bytes to pixels and samples. Nothing here imports torch."""
