"""Precision plans, optimizer and the train step."""
