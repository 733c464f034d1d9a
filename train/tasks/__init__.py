"""Fine-tuning and evaluation on tasks: one file per task; `base.py` says what a task is, `registry.py` which there are.

The loop, the engines, checkpoints and resume are pre-training's: a task is to the engine what a model's family is
(`family.py`, train/families.py).
"""
