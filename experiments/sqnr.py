"""Signal to quantization noise ratio of one cast, for the usual formats and distributions.

    python -m experiments.sqnr

prints a Markdown table in dB, each cell the median over --draws draws, their standard deviation and the
range from their 1st to their 99th percentile: about 10 s on two CPU cores. All data are --samples values
of a standard normal, of Student's t with 3 degrees of freedom, and of a normal in which one value in a
thousand is 60 times as large. With heavy tails the largest value of a draw decides INT8 with one scale
per tensor, and where the thousand outliers lie between powers of two moves the FP8 rows.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from q8jax.calibration import scale_from_amax
from q8jax.formats import get_format
from q8jax.groups import amax, granularity
from q8jax.qarray import QArray, quantize
from q8jax.rounding import ceil_power_of_two
from q8jax.stats import sqnr

DISTRIBUTIONS = ("normal", "student_t3", "outliers")
ROW = 4096
MX_BLOCK = 32


def draw(seed: int, samples: int) -> dict[str, np.ndarray]:
    """Draws from each distribution; float32 of shape [samples / ROW, ROW]."""
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.standard_normal(samples),
        "student_t3": rng.standard_t(3, samples),
        "outliers": rng.standard_normal(samples) * np.where(rng.random(samples) < 0.001, 60, 1),
    }
    return {name: x.astype(np.float32).reshape(-1, ROW) for name, x in values.items()}


def _grouped(qtype: str, word: str, size: int = 128, **options) -> Callable[[jax.Array], QArray]:
    return lambda x: quantize(x, qtype, **granularity(word, x.ndim, size), **options)


def _mx_rounded_down(x: jax.Array) -> QArray:
    """MX with the scale of the OCP specification, section 6.3: 2^(floor(log2 amax) - emax)."""
    axes = granularity("tile", x.ndim, MX_BLOCK)
    found = amax(x, **axes)
    up = ceil_power_of_two(found)
    floor = jnp.where(up > found, up * jnp.float32(0.5), up)
    largest_power = 2.0 ** np.floor(np.log2(get_format("e4m3fn").max))
    return quantize(x, "e4m3fn", scale=floor / jnp.float32(largest_power))


def _scale_times(factor: float, x: jax.Array) -> QArray:
    scale = scale_from_amax(amax(x), "e4m3fn") * jnp.float32(factor)
    return quantize(x, "e4m3fn", scale=scale)


CASTS: dict[str, Callable[[jax.Array], QArray]] = {
    "E4M3 tensor": _grouped("e4m3fn", "tensor"),
    "E5M2 tensor": _grouped("e5m2", "tensor"),
    "INT8 1×128": _grouped("int8", "tile"),
    "MXINT8": _grouped("int8", "tile", MX_BLOCK, scale_format="e8m0"),
    "MXFP8 scale down": _mx_rounded_down,
    "MXFP8 scale up": _grouped("e4m3fn", "tile", MX_BLOCK, scale_format="e8m0"),
    "E4M3 amax 2× too low": functools.partial(_scale_times, 0.5),
    "E4M3 2× margin": _grouped("e4m3fn", "tensor", margin=1),
    "INT8 tensor": _grouped("int8", "tensor"),
    "INT8 row of 4096": _grouped("int8", "row"),
}


def measure(names: Sequence[str], distributions: Sequence[str], draws: int, samples: int, seed: int) -> np.ndarray:
    """Returns the SQNR in dB of the named casts, float32 of shape [names, distributions, draws]."""

    @jax.jit
    def of_all(x: jax.Array) -> jax.Array:
        return jnp.stack([sqnr(x, CASTS[name](x)) for name in names])

    results = np.empty((len(names), len(distributions), draws), np.float32)
    for i in range(draws):
        values = draw(seed + i, samples)
        for j, distribution in enumerate(distributions):
            results[:, j, i] = of_all(jnp.asarray(values[distribution]))
    return results


def _cell(found: np.ndarray) -> str:
    low, middle, high = np.percentile(found, (1, 50, 99))
    return f"{middle:.1f} ± {np.std(found):.1f} ({low:.1f} to {high:.1f})"


def define_flags() -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    flags.DEFINE_integer("samples", 2**20, f"Values per draw, a multiple of {ROW}.", lower_bound=ROW)
    flags.register_validator("samples", lambda n: n % ROW == 0, f"use a multiple of {ROW}, for example {2**20}.")
    flags.DEFINE_integer("draws", 20, "Draws of each distribution.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the first draw; the others follow it.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: this program takes flags only.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    samples, draws, seed = flags.FLAGS.samples, flags.FLAGS.draws, flags.FLAGS.seed
    print(f"| dB, median ± standard deviation of {draws} (1 % to 99 %) | " + " | ".join(DISTRIBUTIONS) + " |")
    print("|---|" + "---|" * len(DISTRIBUTIONS))
    table = measure(tuple(CASTS), DISTRIBUTIONS, draws, samples, seed)
    for name, row in zip(CASTS, table, strict=True):
        print(f"| {name} | " + " | ".join(map(_cell, row)) + " |")


if __name__ == "__main__":
    define_flags()
    app.run(main)
