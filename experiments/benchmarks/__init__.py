"""What experiments.benchmark measures, and how it is shown."""
