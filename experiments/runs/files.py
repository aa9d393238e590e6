"""Files that are either whole or absent, and JSON that any parser reads.

A reader must never see half of `config.json`, whenever the writer was killed: a file is written
beside its final name, flushed to the disk, and renamed over it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.errors import RunError, unwritable

TEMPORARY_SUFFIX = ".tmp"


def plain(value: Any, name: str = "value") -> Any:
    """`value` as the types that strict JSON has; a float that is not finite becomes None.

    Args:
      value: None, bool, int, float, str, a NumPy or JAX scalar (0-d array) of any dtype, or a
        mapping or list of these. Every finite scalar of at most 64 bits keeps its exact value.
      name: what to call it in an error.

    Raises:
      TypeError: an array that is not a scalar, or an object that JSON cannot hold.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} is a {type(value).__name__}, which JSON cannot hold")
    array = np.asarray(value)
    if array.shape != ():
        raise TypeError(f"{name} has shape {array.shape}; only scalars can be written as JSON")
    if array.dtype.kind == "b":
        return bool(array)
    return int(array) if array.dtype.kind in "iu" else plain(float(array))


def strict_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """`plain(value)` as JSON text without NaN or Infinity tokens, which JSON does not have."""
    return json.dumps(plain(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Replaces `path` atomically with `value` as indented JSON."""
    write_atomic(path, [strict_json(value, indent=2, sort_keys=sort_keys).encode(), b"\n"])


def write_of_run(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """`write_json` for a run that trains.

    Raises:
      RunError: the disk refuses it.
    """
    try:
        write_json(path, value, sort_keys=sort_keys)
    except OSError as error:
        raise unwritable(path, error) from error


def read_json(path: Path) -> Any:
    """The value in `path`.

    Raises:
      RunError: the file is absent, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); restore it or remove it") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then replaces `path`; a crash leaves the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_atomic(path: Path, chunks: Iterable[bytes]) -> None:
    """Replaces `path` with `chunks`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(chunks)


def fsync_directory(directory: Path) -> None:
    """Makes the renames done in `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
