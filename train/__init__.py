"""Training: the commands `python -m train.pretrain`, `train.evaluate` and `train.generate`, and what they are
made of.
"""
