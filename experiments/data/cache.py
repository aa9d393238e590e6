"""Files that several processes may make at the same time, each whole or absent."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` that takes its place when the block succeeds.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for every process: the hosts of a pod may share the folder.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"--cache_dir={path.parent} cannot be written ({error.strerror}), make it writable or choose another."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cached_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the .npz file `path`, made and stored where it is missing or not what was written.

    A zip archive has a checksum of its contents, which is compared when they are read.
    """
    damage = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    with contextlib.suppress(*damage), open(path, "rb") as archive, np.load(archive) as stored:
        return stored["array"]
    array = make()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, array=array)
    return array
