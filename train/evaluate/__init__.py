"""What a model is worth: `python -m train.evaluate TASK`, and the scores that a run takes of itself."""
