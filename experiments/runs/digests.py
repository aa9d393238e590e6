"""`digests.json`: the size and SHA-256 of every file in a directory, or of every object below a place in a bucket."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.bucket import Bucket
from experiments.runs.files import strict_json, write_json

DIGESTS = "digests.json"


def write_digests(directory: Path) -> None:
    """Forces every file under `directory` to the disk and writes down what it holds."""
    write_json(directory / DIGESTS, _record(_sizes(directory), lambda name: _sha256(directory / name, sync=True)))


def damage(directory: Path, *, contents: bool = True) -> str | None:
    """What is wrong with `directory`, in a few words; None if all is as `write_digests` found it.

    Args:
      directory: holds `digests.json`; files it does not list are ignored.
      contents: False compares only names and sizes, which takes no time.

    Raises:
      OSError: a file is there but cannot be read; that says nothing about what it holds.
    """
    path = directory / DIGESTS
    text = path.read_bytes() if path.is_file() else None
    return _difference(text, _sizes(directory), (lambda name: _sha256(directory / name)) if contents else None)


def write_object_digests(bucket: Bucket, below: str) -> None:
    """Reads every object below a place and writes down what it holds, in one more object that must not be there yet.

    Raises:
      BucketError: an object cannot be read or written, or there is a `digests.json`.
    """
    record = _record(bucket.sizes(below), lambda name: bucket.sha256(below + name))
    bucket.write(below + DIGESTS, strict_json(record, indent=2).encode(), generation=0)


def object_damage(bucket: Bucket, below: str) -> str | None:
    """`damage` of the objects below a place.

    Raises:
      BucketError: an object cannot be read.
    """
    found = bucket.read(below + DIGESTS)
    text = None if found is None else found[0]
    return _difference(text, bucket.sizes(below), lambda name: bucket.sha256(below + name))


def _record(sizes: Mapping[str, int], sha256: Callable[[str], str]) -> dict[str, dict[str, dict[str, int | str]]]:
    return {"files": {name: {"bytes": sizes[name], "sha256": sha256(name)} for name in sorted(sizes)}}


def _difference(text: bytes | None, sizes: Mapping[str, int], sha256: Callable[[str], str] | None) -> str | None:
    if text is None:
        return f"{DIGESTS} is missing"
    try:
        entries = dict(json.loads(text)["files"])
        listed = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (ValueError, TypeError, KeyError):
        return f"{DIGESTS} is damaged"
    for name, (size, digest) in listed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} of {size:,} bytes"
        if sha256 is not None and sha256(name) != digest:
            return f"the SHA-256 of {name} differs"
    return None


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _sha256(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
