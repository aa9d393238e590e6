"""What ends a run before its last step, as sentences for the person who started it."""


class TrainingError(Exception):
    """Training cannot go on; its text is one sentence with the flag and the fix."""
