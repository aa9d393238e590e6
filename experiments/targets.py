"""Devices to compile for that need not be there.

XLA compiles for a TPU slice when the extra `tpu` is installed, and for a GPU that is described to it when `cuda` is.
What comes out says which operations run in which dtype, what they move and what memory they take; nothing runs.

For a GPU that is there XLA tries kernels out, for one that is not it cannot: its GEMMs are compiled for cuBLASLt, the
library that Hopper's FP8 training runs on. Without the versions in the description it would make no FP8 GEMM at all.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a GPU, from the vendor's data sheet: units are bytes, bytes/s and GHz."""

    description: str
    compute_capability: int
    cores: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 85_899_345_920, 2_039_000_000_000, 41_943_040, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 84_978_434_048, 3_352_320_000_000, 52_428_800, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 132, 150_754_820_096, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 192_000_000_000, 8_000_000_000_000, 132_644_864, 1.965),
}
_GPU_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}


class TargetError(ValueError):
    """A target that cannot be compiled for here: one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      devices: of one program.
      options: for `jax.stages.Lowered.compile`.
    """

    devices: tuple[Any, ...]
    options: Mapping[str, Any]


def target(name: str) -> Target:
    """The devices that a name means.

    Args:
      name: 'local' for those that are there, 'cpu', a GPU of `GPUS`, with ':N' for N of them, or a TPU topology
        such as 'v6e:2x2', which is KIND:SHAPE; ':N' after it for N slices.

    Raises:
      TargetError: an unknown name, or an extra that is not installed.
    """
    import jax

    if name in ("local", "cpu"):
        return Target(tuple(jax.devices() if name == "local" else jax.devices("cpu")), {})
    kind, _, size = name.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*|", size):
        shape = f"1x1x{size or 1}"
        described = {"topology_name": shape, "topology": shape, "target_config": _config(GPUS[kind])}
        return Target(_topology("cuda", name, **described), _GPU_OPTIONS)
    if tpu := re.fullmatch(r"((?:v\d+\w*|tpu\d+x?):\d+(?:x\d+){1,2})(?::([1-9]\d*))?", name):
        several = {"num_slices": int(tpu[2])} if tpu[2] else {}
        return Target(_topology("tpu", name, topology_name=tpu[1], **several), {})
    raise TargetError(
        f"--target={name} must be local, cpu, {', '.join(GPUS)}, or a TPU slice such as v5e:2x2, v5p:2x2x1, v6e:2x2 or "
        "tpu7x:2x2x1, with :2 after it for two of them."
    )


def _topology(platform: str, name: str, **described: Any) -> tuple[Any, ...]:
    # Read when the backend's plugin is loaded: no driver is asked for, nor Google's metadata server, nor its lock.
    absent = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for variable, value in absent.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform=platform, **described).devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        if "not installed" in reason or "not implemented" in reason or "No module" in reason:
            raise TargetError(f"--target={name} needs another extra: pip install 'q8jax[{platform}]'.") from error
        raise TargetError(f"--target={name} is none that XLA compiles for ({reason}): choose another.") from error


def _config(gpu: Gpu) -> str:
    """A GpuTargetConfig in text form."""
    of_hopper_and_later = """
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
        shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
    """
    return f"""
        gpu_device_info {{
          {of_hopper_and_later}
          core_count: {gpu.cores} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.l2_cache}
          memory_bandwidth: {gpu.bandwidth} device_memory_size: {gpu.memory}
          cuda_compute_capability {{ major: {gpu.compute_capability} minor: 0 }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{gpu.description}"
    """
