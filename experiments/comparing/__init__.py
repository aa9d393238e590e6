"""Studies of precisions against a baseline: what is run, how, and what it tells."""
