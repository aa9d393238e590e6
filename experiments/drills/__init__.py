"""Of the fault drill alone: watched starts of pretrain, what is done to them, and whether anything was lost."""
