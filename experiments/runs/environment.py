"""What a run ran on, for `env.json`: enough to repeat it, nothing that tells who ran it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import q8jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "ml_dtypes", "numpy", "orbax-checkpoint")
# Besides JAX_*: what changes the compiled program or the devices it runs on.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE")


def environment() -> dict[str, Any]:
    """Versions, revision, devices, processor, variables, command line and time of this start.

    Touches the devices, so call it after `jax.distributed.initialize`. Host and user names are left
    out, and the home directory is written as `~`, except in `argv`, which is kept as it was given
    but for the place of the program.
    """
    return {
        "start_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": [_without_place(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {
            "q8jax": q8jax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git": git_revision(Path(__file__).resolve()),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "cpu": {"model": _cpu_model(), "cores": usable_cores()},
        "variables": {
            name: _without_home(value)
            for name, value in sorted(os.environ.items())
            if name in _VARIABLES
            # A coordinator's address names a host.
            or (name.startswith("JAX_") and not name.startswith("JAX_COORDINATOR"))
        },
    }


def git_revision(file: Path) -> dict[str, Any] | None:
    """{"revision": SHA-1, "dirty": bool} of the checkout that tracks `file`; None without one.

    A file that merely lies inside some checkout (an environment's site-packages) is not tracked by
    it, and that checkout's revision would say nothing about the code that ran.
    """
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        revision = _git(file, "rev-parse", "HEAD")
        status = _git(file, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "dirty": bool(status)}


def revision_text(file: Path) -> str | None:
    """`git_revision` as one word."""
    git = git_revision(file)
    return git["revision"] + "-dirty" * git["dirty"] if git else None


def peak_memory_bytes() -> int:
    """The most memory this process has used so far, in bytes.

    On an accelerator: of the local device that used most. Where devices keep no statistics (CPU):
    the peak resident set of the process.
    """
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics if "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # There ru_maxrss begins with what the process had that started this one.
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None
    return int(peak[1]) * 1024


def _git(file: Path, *arguments: str) -> str:
    # Without optional locks `git status` does not write to the repository of the code.
    command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use, which on a shared machine are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _without_place(program: str) -> str:
    """The path of a program within its checkout; its name, where it lies elsewhere."""
    path, root = Path(program).resolve(), Path(__file__).resolve().parents[2]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text
