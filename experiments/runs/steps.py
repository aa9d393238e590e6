"""Where the checkpoints of a run stand, one by step: in a directory, or in a bucket.

    checkpoints/100/             complete
        state/                   the arrays, as Orbax's StandardCheckpointer writes and reads them
        metadata.json            step, the caller's metadata, dtype and shape of every leaf
        digests.json             size and SHA-256 of every file above
    checkpoints/50.corrupt/      failed its verification; kept for whoever wants to look

A process killed at any moment leaves complete checkpoints or rubbish, never something between. In a directory a step is
complete whenever it has its name, which it gets by one rename, after its files and their digests are on the disk; until
then, and while it is deleted, it is `100.partial`. In a bucket nothing is renamed: a step is complete once it has its
`digests.json`, which is written last, if it is not there yet, and deleted first.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from experiments.bucket import Bucket, BucketError, is_url
from experiments.runs.digests import DIGESTS, damage, object_damage, write_digests, write_object_digests
from experiments.runs.errors import CheckpointError
from experiments.runs.files import fsync_directory, read_json, strict_json, write_json

STATE = "state"
METADATA = "metadata.json"
_PARTIAL = ".partial"
_CORRUPT = ".corrupt"


class Steps(Protocol):
    """What `Checkpoints` asks of a storage, which raises OSError where that fails."""

    def complete(self) -> list[int]:
        """The complete steps, oldest first."""

    def begin(self, step: int) -> None:
        """Makes place for a step that is not complete."""

    def unfinished(self, step: int) -> str:
        """Where Orbax writes the arrays of a step that was begun."""

    def publish(self, step: int, record: dict[str, Any]) -> None:
        """Makes a step complete whose arrays have been written, with this as its metadata."""

    def abandon(self, step: int) -> None:
        """Deletes what was begun and will not be published, where its space is wanted; raises nothing."""

    def remove(self, step: int) -> None:
        """Deletes a complete step."""

    def sweep(self) -> None:
        """Deletes what killed processes left."""

    def damage(self, step: int) -> str | None:
        """What is wrong with a complete step, in a few words."""

    def set_aside(self, step: int) -> str:
        """Takes a step out of use, and keeps it under the name that is returned."""

    def aside(self) -> list[str]:
        """The names of what was set aside."""

    def metadata(self, step: int) -> dict[str, Any]:
        """What `publish` was given."""

    def state(self, step: int) -> str:
        """Where the arrays of a complete step are."""

    def close(self) -> None:
        """Ends connections, if there are any."""


def storage(directory: str | os.PathLike[str]) -> tuple[str, Steps]:
    """What to call a place for checkpoints in errors, and the steps in it.

    Args:
      directory: or the URL of a place in a bucket.

    Raises:
      CheckpointError: the bucket cannot be reached.
    """
    if not is_url(directory):
        path = Path(directory).absolute()
        return str(path), StepDirectories(path)
    try:
        return os.fspath(directory), StepObjects(Bucket.connect(directory))
    except BucketError as error:
        raise CheckpointError(f"--workdir={directory} cannot be used ({error}); correct it") from error


class StepDirectories:
    """`Steps` in a directory."""

    def __init__(self, directory: Path):
        self._directory = directory

    def complete(self) -> list[int]:
        return sorted(int(name) for name in self._names() if name.isdigit())

    def begin(self, step: int) -> None:
        _remove(self._partial(step))
        self._partial(step).mkdir(parents=True)

    def unfinished(self, step: int) -> str:
        return str(self._partial(step) / STATE)

    def publish(self, step: int, record: dict[str, Any]) -> None:
        partial = self._partial(step)
        write_json(partial / METADATA, record, sort_keys=False)
        write_digests(partial)
        published = partial.rename(self._directory / str(step))
        fsync_directory(self._directory)
        problem = damage(published, contents=False)
        if problem is not None:
            raise OSError(problem)

    def abandon(self, step: int) -> None:
        shutil.rmtree(self._partial(step), ignore_errors=True)  # gives a full disk its space back

    def remove(self, step: int) -> None:
        _remove(self._directory / str(step))

    def sweep(self) -> None:
        for name in self._names():
            if name.endswith(_PARTIAL):
                shutil.rmtree(self._directory / name, ignore_errors=True)

    def damage(self, step: int) -> str | None:
        return damage(self._directory / str(step))

    def set_aside(self, step: int) -> str:
        name = _free_name(step, self._names())
        (self._directory / str(step)).rename(self._directory / name)
        return name

    def aside(self) -> list[str]:
        return sorted(name for name in self._names() if _CORRUPT in name)

    def metadata(self, step: int) -> dict[str, Any]:
        return read_json(self._directory / str(step) / METADATA)

    def state(self, step: int) -> str:
        return str(self._directory / str(step) / STATE)

    def close(self) -> None:
        pass

    def _names(self) -> list[str]:
        return [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []

    def _partial(self, step: int) -> Path:
        return self._directory / f"{step}{_PARTIAL}"


class StepObjects:
    """`Steps` in a bucket."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket

    def complete(self) -> list[int]:
        return sorted(int(name) for name in self._bucket.folders() if name.isdigit() and self._is_marked(name))

    def begin(self, step: int) -> None:
        self._delete(str(step))

    def unfinished(self, step: int) -> str:
        return self.state(step)

    def publish(self, step: int, record: dict[str, Any]) -> None:
        self._bucket.write(f"{step}/{METADATA}", strict_json(record, indent=2).encode())
        write_object_digests(self._bucket, f"{step}/")

    def abandon(self, step: int) -> None:
        pass  # whoever may be writing there by now; `begin` and `sweep` know that they may delete

    def remove(self, step: int) -> None:
        self._delete(str(step))

    def sweep(self) -> None:
        for name in self._bucket.folders():
            if name.isdigit() and not self._is_marked(name):
                self._delete(name)

    def damage(self, step: int) -> str | None:
        return object_damage(self._bucket, f"{step}/")

    def set_aside(self, step: int) -> str:
        name = _free_name(step, self._bucket.folders())
        for file in self._bucket.sizes(f"{step}/"):
            self._bucket.copy(f"{step}/{file}", f"{name}/{file}")
        self._delete(str(step))
        return name

    def aside(self) -> list[str]:
        return [name for name in self._bucket.folders() if _CORRUPT in name]

    def metadata(self, step: int) -> dict[str, Any]:
        found = self._bucket.read(f"{step}/{METADATA}")
        if found is None:
            raise BucketError(f"{METADATA} of step {step} is not there")
        return json.loads(found[0])

    def state(self, step: int) -> str:
        return f"{self._bucket.url}/{step}/{STATE}"

    def close(self) -> None:
        self._bucket.close()

    def _is_marked(self, name: str) -> bool:
        return DIGESTS in self._bucket.sizes(f"{name}/")

    def _delete(self, name: str) -> None:
        self._bucket.delete(f"{name}/{DIGESTS}")
        for file in self._bucket.sizes(f"{name}/"):
            self._bucket.delete(f"{name}/{file}")


def _free_name(step: int, names: list[str]) -> str:
    name, number = f"{step}{_CORRUPT}", 1
    while name in names:
        number += 1
        name = f"{step}{_CORRUPT}{number}"
    return name


def _remove(directory: Path) -> None:
    """Deletes a checkpoint; killed halfway, it leaves a `.partial`, not half a checkpoint."""
    if not directory.exists():
        return
    if not directory.name.endswith(_PARTIAL):
        directory = directory.rename(directory.with_name(f"{directory.name}{_PARTIAL}"))
    shutil.rmtree(directory)
