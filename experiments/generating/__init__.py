"""Of generate alone: models and prompts from flags, sampling, decoding, what a terminal shows, drift."""
