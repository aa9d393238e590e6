"""Damaged checkpoints, and a disk that is full in the middle of a save."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.drills import judging
from experiments.drills.lab import SAVED_EVERY, STOPPED, Lab
from experiments.drills.outcomes import Outcome
from experiments.drills.sessions import seconds_lost
from experiments.runs.digests import damage

_BEFORE = STOPPED // SAVED_EVERY * SAVED_EVERY
_PAGE = 4096
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
# A file system of $1 bytes on $3, with what is in $2, in which a command runs; what it leaves there goes to $4.
_ON_A_SMALL_DISK = (
    'mount -t tmpfs -o size="$1" none "$3" && cp -a "$2/." "$3" || exit 99; small=$3; after=$4; shift 4; "$@"; '
    'code=$?; cp -a "$small/." "$after" || exit 99; exit $code'
)
_WITH_SMALL_FILES = (
    "import os, resource, sys; size = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def newest_truncated(lab: Lab) -> Outcome:
    """The largest file of the newest checkpoint loses its second half."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return _damaged(lab, "newest checkpoint truncated", cut, "bytes")


def newest_flipped(lab: Lab) -> Outcome:
    """One bit of it is another."""
    return _damaged(lab, "newest checkpoint with a flipped byte", flip, "SHA-256")


def flip(path: Path) -> None:
    """Changes one bit of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))


def _damaged(lab: Lab, fault: str, spoil: Callable[[Path], None], reason: str) -> Outcome:
    reference = lab.reference
    workdir, before = lab.stopped(fault.replace(" ", "-"))
    spoil(_largest(workdir / "checkpoints" / str(STOPPED)))
    after = lab.start(workdir).wait()
    words = f"checkpoint {STOPPED} in", reason, f"goes on from step {_BEFORE}"
    problems = judging.answer(after, 0, *words) + judging.losses(reference, workdir)
    return Outcome(fault, 1, after.said(*words), problems, seconds_lost([before, after]))


def disk_full(lab: Lab) -> Outcome:
    """No save fits any more: the run trains on, says so, and ends in an error; with room again it goes on."""
    reference = lab.reference
    source, before = lab.stopped("full")
    after = lab.directory("full-after")
    workdir = lab.directory("full-mounted")
    if _can_mount(workdir):
        after.mkdir()
        size = str(_bytes(source) + _bytes(source / "checkpoints" / str(STOPPED)) // 2)
        places = (size, *map(str, (source, workdir, after)))
        full = lab.start(workdir, around=(*_NAMESPACE, "sh", "-c", _ON_A_SMALL_DISK, "sh", *places)).wait()
        reason, what = "no space left on device", "disk full during a save"
    else:
        after = source
        limit = str(_largest(source / "checkpoints" / str(STOPPED)).stat().st_size // 2)
        full = lab.start(after, around=(sys.executable, "-c", _WITH_SMALL_FILES, limit)).wait()
        reason, what = "file too large", "disk full during a save (as a limit on the size of files)"
    words = "could not be written", reason, f"step {STOPPED} is the newest"
    problems = judging.answer(full, 1, *words)
    harmed = damage(after / "checkpoints" / str(STOPPED))
    problems += [f"the checkpoint before it: {harmed}"] if harmed else []
    again = lab.start(after).wait()
    problems += judging.answer(again, 0, f"going on after step {STOPPED}") + judging.losses(reference, after)
    return Outcome(what, 1, full.said(*words), problems, seconds_lost([before, full, again])[1:])


def _largest(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _bytes(directory: Path) -> int:
    """What its files take on a file system in memory."""
    return sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in directory.rglob("*") if path.is_file())


def _can_mount(directory: Path) -> bool:
    """Makes a directory; whether a file system can be mounted there without being root."""
    directory.mkdir()
    if shutil.which(_NAMESPACE[0]) is None:
        return False
    tried = subprocess.run([*_NAMESPACE, "mount", "-t", "tmpfs", "none", str(directory)], capture_output=True)
    return tried.returncode == 0
