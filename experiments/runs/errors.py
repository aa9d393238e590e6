"""What goes wrong with a run on disk, as sentences for the person who started it."""

from __future__ import annotations

import os
import re
from pathlib import Path


class RunError(Exception):
    """A problem with the files of a run; its text is one sentence with the flag and the fix."""


class CheckpointError(RunError):
    """No checkpoint could be restored, or the newest one could not be written."""


def unwritable(path: Path, error: BaseException) -> RunError:
    """That the disk refuses a file of a run which trains."""
    return RunError(
        f"{path} cannot be written ({disk_reason(error)}); make room in --workdir and repeat the command to go on from"
        " the last checkpoint"
    )


def disk_reason(error: BaseException) -> str:
    """Why a file could not be read or written, in the words of the operating system.

    Orbax passes on what TensorStore's C++ code says, a ValueError whose long text has the number of
    the system error somewhere in it.
    """
    text = " ".join(str(error).split())
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"(?:OS error |os_error_code=')(\d+)", text)):
        code = int(found[1])
    if code is not None:
        return os.strerror(code).lower()
    return (text if len(text) <= 300 else f"{text[:300]}…") or type(error).__name__
