"""Casts in NumPy and ml_dtypes, written without q8jax: what its formats are held against."""

import ml_dtypes
import numpy as np

FP8 = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
FP6 = ("float6_e2m3fn", "float6_e3m2fn")
FP4 = ("float4_e2m1fn",)
INTEGERS = ("int16", "int8", "uint8", "int4", "uint4", "int2")
WIDE = ("float32", "bfloat16", "float16")
E8M0 = "float8_e8m0fnu"
ALL = (*WIDE, *FP8, E8M0, *FP6, *FP4, *INTEGERS)


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def code_dtype(name: str) -> np.dtype:
    """Unsigned integers in which codes are compared."""
    return np.dtype(f"uint{8 * dtype_of(name).itemsize}")


def limits(name: str, full_range: bool = False) -> tuple[float, float]:
    if name in INTEGERS:
        info = ml_dtypes.iinfo(dtype_of(name))
        low, high = float(info.min), float(info.max)
        return (low if full_range else max(low, -high)), high
    info = ml_dtypes.finfo(dtype_of(name))
    return float(info.min), float(info.max)


def nearest_even(x: np.ndarray, name: str, full_range: bool = False) -> np.ndarray:
    """Clips, then converts with ml_dtypes; codes as unsigned integers. NaN gives 0 without a NaN code."""
    low, high = limits(name, full_range)
    with np.errstate(all="ignore"):
        x = np.clip(x.astype(np.float32), np.float32(low), np.float32(high))
        if name in INTEGERS:
            x = np.rint(x)
        if name in (*INTEGERS, *FP6, *FP4):
            x = np.where(np.isnan(x), np.float32(0), x)
        return x.astype(dtype_of(name)).view(code_dtype(name))


def values_of(codes: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return codes.astype(code_dtype(name)).view(dtype_of(name)).astype(np.float64)


def grid(name: str) -> np.ndarray:
    """All finite magnitudes of a format of at most 16 bits, ascending float64."""
    if name in INTEGERS:
        return np.arange(limits(name)[1] + 1)
    bits = {**dict.fromkeys(FP6, 6), **dict.fromkeys(FP4, 4), "bfloat16": 16, "float16": 16}.get(name, 8)
    values = values_of(np.arange(2**bits), name)
    return np.unique(np.abs(values[np.isfinite(values)]))


def neighbours(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The largest grid magnitude <= |x| and the smallest >= |x|, saturating; float64."""
    values = grid(name)
    magnitude = np.minimum(np.abs(x.astype(np.float64)), values[-1])
    magnitude = np.maximum(magnitude, values[0])
    above = np.searchsorted(values, magnitude)
    below = np.where(values[above] == magnitude, above, np.maximum(above - 1, 0))
    return values[below], values[above]


def directed(x: np.ndarray, name: str, rounding: str) -> np.ndarray:
    """Values of x rounded 'nearest_away' or by 'truncate', in the format's range; NaN unchanged."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = x.astype(np.float64)
    low, high = neighbours(np.nan_to_num(x, posinf=np.inf, neginf=-np.inf), name)
    magnitude = np.clip(np.abs(x), grid(name)[0], grid(name)[-1])
    away = rounding == "nearest_away"
    rounded = np.where(away & (magnitude - low >= high - magnitude), high, low)
    if name == E8M0:
        return np.where(np.isnan(x), np.nan, np.where(x > 0, rounded, grid(name)[0]))
    signed = np.copysign(rounded, x)
    signed = np.maximum(signed, limits(name)[0])
    return np.where(np.isnan(x), np.nan, signed)


def every_bfloat16() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)


def random_float32(count: int, seed: int = 0) -> np.ndarray:
    """Uniform bit patterns: every exponent, subnormals, infinities and NaN."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def critical_float32(name: str) -> np.ndarray:
    """Every value of the format (of at most 16 bits) and every tie, with their float32 neighbours, of both signs."""
    values = grid(name)
    beyond = [values[-1] * 2 - values[-2], values[-1] * 1.5, values[-1] * 4, values[0] / 2, values[0] / 3]
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, np.array(beyond)])
    points = np.minimum(points, 3.4e38).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    extremes = np.array([0, np.inf, np.nan, 1e-45, 1.1754944e-38, 1e-38, 3.4028235e38], np.float32)
    points = np.concatenate([points, extremes])
    return np.concatenate([points, -points])
