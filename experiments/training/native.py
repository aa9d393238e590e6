"""What the GEMMs of a precision really run as on a device that has no units for them.

The values that are multiplied are the same, and so is the product up to the order of its sums, but whoever times such a
run has to know. What XLA makes of a dot was read from compiled programs.
"""

from collections.abc import Iterable
from typing import Any

from experiments.training.precision import Phase
from q8jax.formats import get_format
from q8jax.gemm import cpu_dtype
from q8jax.recipe import COMPUTE_DTYPES, GEMMS, Recipe

# Two dtypes, of codes or of values that are not quantized.
Pair = tuple[str, str]
_FP8 = {"float8_e4m3fn", "float8_e5m2"}
_WIDER = "a wider type of XLA's choice"


def substitutions(phases: Iterable[Phase], device: Any) -> list[str]:
    """A line for every dtype in which the device multiplies others than the recipes say; none where all is as they say.

    Args:
      phases: of the run.
      device: a jax.Device.
    """
    recipes = [recipe for phase in phases for _, recipe in phase.policy.rules]
    pairs = dict.fromkeys(pair for recipe in recipes for pair in _pairs(recipe))
    on_device = {"cpu": _on_cpu, "tpu": _on_tpu}.get(device.platform, _on_gpu)
    instead: dict[str, list[str]] = {}
    for pair in pairs:
        dtype = on_device(pair, device)
        if dtype is not None:
            instead.setdefault(dtype, []).append(" × ".join(name.removeprefix("float8_") for name in pair))
    name = "this CPU" if device.platform == "cpu" else device.device_kind
    return [
        f"{name} multiplies {', '.join(kinds)} as {dtype}, which holds the same values"
        for dtype, kinds in instead.items()
    ]


def _pairs(recipe: Recipe) -> list[Pair]:
    """The formats that meet in the recipe's GEMMs."""
    gemms = [tuple(getattr(recipe, name)) for name in GEMMS]
    names = [[operand.qtype if operand else recipe.compute for operand in gemm] for gemm in gemms]
    return [(first, second) for first, second in names]


def _on_cpu(pair: Pair, device: Any) -> str | None:
    wide = _wide(pair)
    if wide is not None:
        dtype = "float32" if wide in ("float32", "float16") else cpu_dtype("wide").name
        return None if pair == (dtype, dtype) else dtype
    if _integers(pair):
        return f"int8 or {cpu_dtype('int').name}, by their layout"
    return cpu_dtype("float").name


def _on_tpu(pair: Pair, device: Any) -> str | None:
    seventh = device.device_kind.startswith("TPU7")
    wide = _wide(pair)
    if wide is not None:
        as_wide = {"float32": "bfloat16 in six passes", "float16": _WIDER}.get(wide)
        return as_wide or (None if pair == (wide, wide) else wide)
    if _integers(pair):
        return _WIDER if seventh else _as_int8(pair)
    return None if seventh and set(pair) <= _FP8 else "bfloat16"


def _on_gpu(pair: Pair, device: Any) -> str | None:
    try:
        capability = float(device.compute_capability)
    except (AttributeError, ValueError):
        return _WIDER if pair[0] not in COMPUTE_DTYPES or pair[1] not in COMPUTE_DTYPES else None
    wide = _wide(pair)
    if wide is not None:
        if wide == "bfloat16" and capability < 8.0:
            return "float32"
        return None if pair == (wide, wide) else wide
    if _integers(pair):
        return _as_int8(pair)
    # cuBLASLt and Triton multiply these pairs from Ada on; two E5M2 operands never.
    native = capability >= 8.9 and set(pair) <= _FP8 and "float8_e4m3fn" in pair
    return None if native else "bfloat16"


def _wide(pair: Pair) -> str | None:
    """The dtype of an operand that is not quantized."""
    return next((name for name in pair if name in COMPUTE_DTYPES), None)


def _integers(pair: Pair) -> bool:
    return all(get_format(name).kind == "int" for name in pair)


def _as_int8(pair: Pair) -> str | None:
    return None if pair == ("int8", "int8") else "int8"
