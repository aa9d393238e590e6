"""Joins the processes of one run: `jax.distributed` before any other JAX call, and an error where that fails."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# A process that has died is noticed after this, and ends all others.
_HEARTBEAT_SECONDS = 60
_SHUTDOWN_SECONDS = 60
_JOIN_SECONDS = 110
_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def cluster(environment: Mapping[str, str]) -> str | None:
    """What in the environment says that this is one of several processes; None where nothing does.

    TPU VMs of which each runs the command by hand say nothing: that is what --multihost is for.
    """
    tells = {
        "JAX_COORDINATOR_ADDRESS": bool,
        "JAX_NUM_PROCESSES": lambda processes: processes not in ("", "1"),
        "JAX_PROCESS_ID": bool,
        "Q8JAX_MULTIHOST": bool,  # launch.tpu_vm
        "SLURM_STEP_NUM_TASKS": lambda tasks: tasks not in ("", "1"),
        "OMPI_COMM_WORLD_SIZE": lambda tasks: tasks not in ("", "1"),
        "PMI_SIZE": lambda tasks: tasks not in ("", "1"),
        "TPU_WORKER_HOSTNAMES": lambda names: "," in names,  # GKE
        "MEGASCALE_COORDINATOR_ADDRESS": bool,  # several slices
    }
    return next((name for name, is_so in tells.items() if is_so(environment.get(name, ""))), None)


def join(multihost: bool | None, timeout: int = _JOIN_SECONDS) -> None:
    """Joins the other processes, if there are any.

    Args:
      multihost: whether there are; None asks the environment.
      timeout: seconds to wait for all of them.

    Raises:
      ValueError: they cannot be joined, or the environment is not what joining takes.
    """
    found = cluster(os.environ)
    if multihost is False or (multihost is None and found is None):
        return
    import jax

    if jax.distributed.is_initialized():
        return
    asked = "--multihost" if multihost else f"{found} in the environment"
    try:
        jax.distributed.initialize(
            **_own_arguments(os.environ),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{asked} asks for several processes, which cannot be joined ({reason}): start all of them with the same "
            "coordinator, or give --nomultihost for a run of one process."
        ) from error


def expect(processes: int | None, devices: int | None) -> None:
    """Compares what was joined with what was expected; touches the devices.

    Raises:
      ValueError: there are more or fewer.
    """
    import jax

    for name, wanted, found in (
        ("processes", processes, jax.process_count()),
        ("devices", devices, jax.device_count()),
    ):
        if wanted is not None and wanted != found:
            raise ValueError(
                f"--expect_{name}={wanted}, but there are {found}: correct the flag, or start the run on what it says."
            )


def _own_arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: environment[name] for name in _OWN if environment.get(name)}
    if given.keys() <= {"JAX_COORDINATOR_ADDRESS"}:
        return {}
    if len(given) < len(_OWN):
        missing = ", ".join(name for name in _OWN if name not in given)
        raise ValueError(f"the environment has no {missing}")
    try:
        counts = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
    except ValueError:
        raise ValueError("JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers") from None
    return {
        "coordinator_address": given["JAX_COORDINATOR_ADDRESS"],
        "num_processes": counts[0],
        "process_id": counts[1],
    }
