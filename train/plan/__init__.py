"""What a run needs, before money is spent on it: `python -m train.plan PRESET`. `budget.make_plan` is the entrance."""
