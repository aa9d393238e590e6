"""What processes of a run find out, told to each other."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.runs.errors import RunError
from experiments.runs.files import write_of_run

_TOKEN = ".shared.json"
# A network file system may show what another host has written a little later.
_LOOKS, _PAUSE = 20, 0.5


def first_process_says(value: int) -> int:
    """`value` of the first process, on every process, each of which makes the call."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_say(value: bool) -> bool:
    """Whether every process says so, each of which makes the call."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(value)).all())


def check_shared(directory: Path) -> None:
    """Looks on every process for what the first one writes into a directory.

    Raises:
      RunError: on all processes, where one of them does not find it.
    """
    if jax.process_count() == 1:
        return
    token = first_process_says(secrets.randbelow(2**31))
    if jax.process_index() == 0:
        write_of_run(directory / _TOKEN, token)
    first_process_says(0)  # once it is written
    if not all_say(_is_found(directory / _TOKEN, token)):
        raise RunError(
            f"--workdir={directory} is not one directory for all {jax.process_count()} processes: give one on a file "
            "system that their hosts share, or gs://BUCKET/FOLDER"
        )


def _is_found(path: Path, token: int) -> bool:
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        try:
            if path.read_text().strip() == str(token):
                return True
        except OSError:
            continue
    return False
