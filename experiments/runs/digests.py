"""`digests.json`: the size and SHA-256 of every file in a directory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from experiments.runs.errors import RunError
from experiments.runs.files import read_json, write_json

DIGESTS = "digests.json"


def write_digests(directory: Path) -> None:
    """Forces every file under `directory` to the disk and writes down what it holds."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path, sync=True)}
    write_json(directory / DIGESTS, {"files": entries})


def damage(directory: Path, *, contents: bool = True) -> str | None:
    """What is wrong with `directory`, in a few words; None if all is as `write_digests` found it.

    Args:
      directory: holds `digests.json`; files it does not list are ignored.
      contents: False compares only names and sizes, which takes no time.

    Raises:
      OSError: a file is there but cannot be read; that says nothing about what it holds.
    """
    if not (directory / DIGESTS).is_file():
        return f"{DIGESTS} is missing"
    try:
        entries = dict(read_json(directory / DIGESTS)["files"])
        listed = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (RunError, ValueError, TypeError, KeyError):
        return f"{DIGESTS} is damaged"
    for name, (size, sha256) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
        if contents and _sha256(path) != sha256:
            return f"the SHA-256 of {name} differs"
    return None


def _sha256(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
