"""What ends a run before its last step, as sentences for the person who started it."""


class TrainingError(Exception):
    """Training cannot go on; its text is one sentence with the flag and the fix."""


class DivergedError(TrainingError):
    """The loss or the gradient is not finite.

    Attributes:
      step: the step that failed.
    """

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step
