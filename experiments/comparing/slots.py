"""Where the runs of a study go on this machine: a share of its processors, or an accelerator, for each."""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room for one run at a time.

    Attributes:
      cores: that it may use; None for all.
      environment: variables that it gets beside those of this process.
    """

    cores: frozenset[int] | None
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Processes that are started within it have its cores."""
        if self.cores is None:
            yield
            return
        # Only of this thread, and inherited: nothing has to run between fork and exec.
        former = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, former)


def slots(jobs: int) -> list[Slot]:
    """Room for `jobs` runs at once, one with all that there is.

    Raises:
      ValueError: less than one, or more than there are accelerators.
    """
    if jobs < 1:
        raise ValueError(f"--jobs={jobs} must be at least 1.")
    if jobs == 1:
        return [Slot(None, {})]
    gpus = _gpus()
    if gpus and jobs > len(gpus):
        raise ValueError(f"--jobs={jobs} is more than there are GPUs, {len(gpus)}, and each run takes one: lower it.")
    if not gpus and _uses("tpu") and importlib.util.find_spec("libtpu"):
        raise ValueError(f"--jobs={jobs} cannot be, for one process takes a whole TPU: leave it out.")
    devices = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}] * jobs
    return [Slot(share, device) for share, device in zip(_shares(jobs), devices)]


def _shares(jobs: int) -> list[frozenset[int] | None]:
    if not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [frozenset({cores[i % len(cores)]}) for i in range(jobs)]
    bounds = [i * len(cores) // jobs for i in range(jobs + 1)]
    return [frozenset(cores[first:end]) for first, end in itertools.pairwise(bounds)]


def _uses(*platforms: str) -> bool:
    """Whether JAX would look for a device of one of these kinds."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return not wanted or bool(set(wanted.split(",")) & set(platforms))


def _gpus() -> list[str]:
    """The NVIDIA GPUs that runs would use, found without touching any: this process is not to take their memory."""
    if not _uses("cuda", "gpu") or not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return []
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
