"""A run directory in a bucket: worked on in a local directory, from which files are copied when it counts.

Files that grow line by line have no place in object storage. So the run directory stands on a local disk, and what has
changed there is copied whole by `push`: after every start, before a checkpoint becomes valid, and at the end. A run
that goes on elsewhere begins with `pull`. Checkpoints do not take part; Orbax writes them to the bucket itself.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from experiments.bucket import Bucket
from experiments.runs.files import TEMPORARY_SUFFIX
from experiments.runs.lease import LOCK

CHECKPOINTS = "checkpoints"
# Written only, by whichever start; nobody reads them to go on.
_WRITE_ONLY = ("tensorboard", "profile")


class Mirror:
    """A local directory and the place in a bucket that it is of.

    Attributes:
      bucket: the place; closed with the mirror.
      folder: the directory, a temporary one.
    """

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        self.folder = Path(tempfile.mkdtemp(prefix="q8jax-run-"))
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Copies the files of the run to the directory.

        Raises:
          BucketError: one cannot be read.
        """
        for name in self.bucket.sizes():
            if name != LOCK and name.partition("/")[0] not in (CHECKPOINTS, *_WRITE_ONLY):
                self.bucket.download(name, self.folder / name)
                self._copied[name] = _state(self.folder / name)

    def push(self) -> None:
        """Copies what is new or has changed to the bucket, and deletes there what was deleted here.

        Raises:
          BucketError: a file cannot be copied; the next call tries again.
        """
        with self._lock:
            # Listed first, so that what is written from now on is copied by the next call.
            found = self._files()
            for name, state in sorted(found.items()):
                if self._copied.get(name) != state:
                    self.bucket.upload(name, self.folder / name)
                    self._copied[name] = state
            for name in self._copied.keys() - found.keys():
                self.bucket.delete(name)
                del self._copied[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        paths = [path for path in self.folder.rglob("*") if not path.name.endswith(TEMPORARY_SUFFIX)]
        return {path.relative_to(self.folder).as_posix(): _state(path) for path in paths if path.is_file()}

    def close(self) -> None:
        """Deletes the directory, and ends the connections to the bucket."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.bucket.close()


def _state(path: Path) -> tuple[int, int]:
    """What changes with every write."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size
