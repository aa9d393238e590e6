"""Reading XLA programs from their text: what is computed, in which dtypes, and at what cost."""
