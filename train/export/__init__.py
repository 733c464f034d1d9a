"""A trained model for use elsewhere: `python -m train.export`."""
