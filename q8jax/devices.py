"""What accelerators can multiply, and how fast at best; and so which 8-bit format each of them rewards.

Dense peaks and memory bandwidths, from the vendors' data sheets; a TPU7x is two devices, of half the chip each. Two of
the peaks are no claim of the vendor but what the compilers do: FP8 is left out for TPUs before TPU7x and INT8 for
TPU7x, where XLA's cost model gives such a dot no fewer cycles than bfloat16's, or hardly, because the matrix unit does
not multiply it.
"""

import dataclasses
from types import MappingProxyType

_ADVICE = "python -m experiments.benchmark measures it where it runs"


@dataclasses.dataclass(frozen=True)
class Device:
    """Dense peaks of one `jax.Device`.

    Attributes:
      bf16: FLOP/s in 16 bits.
      fp8: FLOP/s in FP8; None where it does not multiply it.
      int8: operations/s in INT8; None likewise.
      bandwidth: bytes/s of the main memory.
      memory: bytes of it that a program may use: what the compiler leaves on a TPU, JAX's default share on a GPU.
    """

    bf16: float
    fp8: float | None
    int8: float | None
    bandwidth: float
    memory: int


# Of a chip: peaks and bandwidth in tera-units, memory in 10⁹ bytes for GPUs and 2³⁰ for TPUs.
# Names are the beginnings of jax.Device.device_kind.
_CHIPS: dict[str, tuple[float, float | None, float | None, float, float]] = {
    "TPU v4": (275, None, 275, 1.23, 30.5),
    "TPU v5 lite": (197, None, 394, 0.82, 15.75),
    "TPU v5": (459, None, 918, 2.77, 95.74),
    "TPU v6 lite": (918, None, 1836, 1.64, 31.25),
    "TPU7x": (2307, 4614, None, 7.37, 189.5),
    "NVIDIA A100": (312, None, 624, 2.04, 80),
    "NVIDIA L4": (121, 242, 242, 0.30, 24),
    "NVIDIA L40S": (362, 733, 733, 0.86, 48),
    "NVIDIA H100": (989, 1979, 1979, 3.35, 80),
    "NVIDIA H200": (989, 1979, 1979, 4.8, 141),
    "NVIDIA GH200": (989, 1979, 1979, 4.8, 96),
    "NVIDIA B200": (2250, 4500, 4500, 8.0, 180),
}
DEVICES_PER_CHIP = MappingProxyType(dict.fromkeys(_CHIPS, 1) | {"TPU7x": 2})
_GPU_SHARE = 0.75


def _device(name: str) -> Device:
    *rates, memory = _CHIPS[name]
    bf16, fp8, int8, bandwidth = (None if x is None else x * 1e12 / DEVICES_PER_CHIP[name] for x in rates)
    assert bf16 is not None and bandwidth is not None
    usable = memory * (2**30 / DEVICES_PER_CHIP[name] if name.startswith("TPU") else _GPU_SHARE * 1e9)
    return Device(bf16, fp8, int8, bandwidth, int(usable))


DEVICES = MappingProxyType({name: _device(name) for name in _CHIPS})


def get_device(device_kind: str) -> Device | None:
    """The entry of a `jax.Device.device_kind`; None for a chip that is not in the table, or a CPU."""
    matches = [name for name in DEVICES if device_kind.startswith(name)]
    return DEVICES[max(matches, key=len)] if matches else None


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Which precision a chip rewards.

    Attributes:
      precision: name of a preset.
      reason: a sentence.
    """

    precision: str
    reason: str


def recommend(device_kind: str) -> Recommendation:
    """The 8-bit preset that a chip accelerates most; where none is faster than bfloat16, the reason says so.

    Args:
      device_kind: as `jax.Device.device_kind` gives it, 'TPU v6 lite' or 'NVIDIA H100 80GB HBM3' for example.

    Raises:
      ValueError: a chip that is not known.
    """
    if device_kind.lower() == "cpu":
        return Recommendation("int8", f"a CPU emulates 8-bit training, INT8 a little faster than FP8; {_ADVICE}")
    device = get_device(device_kind)
    if device is None:
        raise ValueError(
            f"Nothing is known of {device_kind!r}: name the precision, fp8 or int8, or a device that begins with one "
            f"of: cpu, {', '.join(DEVICES)}."
        )
    # Of two equals FP8, which needs no scale per row.
    peaks = {"fp8": device.fp8, "int8": device.int8}
    name, peak = max(peaks.items(), key=lambda item: item[1] or 0.0)
    assert peak is not None
    if peak <= device.bf16:
        return Recommendation(
            name, f"{device_kind} multiplies {name.upper()} no faster than bfloat16, and nothing else in 8 bits"
        )
    others = [other for other, value in peaks.items() if value is None]
    faster = f"{device_kind} multiplies {name.upper()} {peak / device.bf16:.3g} times as fast as bfloat16"
    return Recommendation(name, faster + "".join(f", and {other.upper()} not at all" for other in others))
