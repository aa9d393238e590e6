"""Non-uniform codes: a code book is an ascending table of values, a code the index of the nearest.

Code books are made (`normal_float`), given, or fitted to data (`fit_codebook`, Lloyd–Max).

References:
  Max 1960, Quantizing for minimum distortion; Lloyd 1982, Least squares quantization in PCM.
  Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E (NF4).
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.formats import Format

_QUANTILES = 4096


def check_values(codebook: jax.Array) -> None:
    """Raises ValueError unless the values of a concrete code book are finite and ascend."""
    values = np.asarray(codebook)
    if not (np.isfinite(values).all() and (np.diff(values) >= 0).all()):
        raise ValueError("A codebook must ascend from value to value, all of them finite: sort it with jnp.sort.")


def check_codebook(codebook: jax.Array, fmt: Format) -> None:
    """Raises ValueError unless codebook is float32 of rank 1 and fmt an unsigned format for it."""
    if codebook.dtype != jnp.float32 or codebook.ndim != 1 or codebook.size < 2:
        raise ValueError(
            "A codebook must be float32 of rank 1 with two values or more, not "
            f"{codebook.dtype} of shape {codebook.shape}."
        )
    if fmt.kind != "int" or fmt.signed or codebook.size > fmt.max + 1:
        raise ValueError(
            f"A codebook of {codebook.size} values needs an unsigned qtype that counts them (uint4 "
            f"up to 16, uint8 up to 256), not {fmt.name}."
        )


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """Returns the int32 index of the nearest value, the lower one on a tie; shape of x."""
    middles = codebook[:-1] * jnp.float32(0.5) + codebook[1:] * jnp.float32(0.5)
    return jnp.searchsorted(middles, x).astype(jnp.int32)


def lookup(indices: jax.Array, codebook: jax.Array) -> jax.Array:
    """Returns codebook[indices], float32, shape of indices."""
    return jnp.take(codebook, indices.astype(jnp.int32), axis=0, mode="clip")


def normal_float(bits: int = 4) -> jax.Array:
    """Returns the NormalFloat code book, NF4 for 4 bits: normal quantiles scaled to [-1, 1].

    2^(bits-1) + 1 quantiles evenly spaced in probability from 1/2 to 1 - δ make the upper half, and
    2^(bits-1) mirrored ones the lower half, with one zero for both. δ is the mean of 1/(2·2^bits)
    and 1/(2·(2^bits - 1)), as in the authors' implementation.

    Args:
      bits: 2 to 8.

    Returns:
      float32 of shape [2^bits], ascending from -1 to 1, with an exact 0.

    Raises:
      ValueError: bits out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"normal_float: bits must be 2 to 8, not {bits}.")
    half = 2 ** (bits - 1)
    delta = (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    # In float64: a float32 quantile function would be off in the last digits.
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.5, 1 - delta, half + 1)[1:]]
    negative = [-quantile(p) for p in np.linspace(1 - delta, 0.5, half)[:-1]]
    values = np.array([*negative, 0.0, *positive])
    return jnp.asarray(values / values.max(), jnp.float32)


def fit_codebook(x: jax.Array, bits: int, *, iterations: int = 50) -> tuple[jax.Array, jax.Array]:
    """Fits a code book to data by Lloyd–Max iteration, one-dimensional k-means.

    Deterministic: it starts from values spread over the data's quantiles with a density that is the
    cube root of the data's, which is optimal for many values (Panter and Dite 1951, Quantization
    distortion in pulse-count modulation with nonuniform spacing of levels); starting from quantiles
    alone would leave the tails of a heavy-tailed distribution without values for hundreds of
    iterations. Each iteration assigns every entry to its nearest value and moves each value to the
    mean of its entries; neither can raise the mean squared error. A value without entries stays.
    Entries that are not finite are ignored.

    The values are in the units of x, so to quantize x with them as they are, leave it unscaled:
    `quantize(x, "uint4", codebook=fit_codebook(x, 4)[0], scale=1)`.

    Args:
      x: floating-point array of any shape.
      bits: 1 to 8, for 2^bits values.
      iterations: number of iterations.

    Returns:
      The code book, float32 of shape [2^bits], ascending; and the mean squared error before each
      iteration and after the last, float32 of shape [iterations + 1]. Both are NaN where x has no
      finite entry.

    Raises:
      ValueError: bits out of range, or x is empty.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"fit_codebook: bits must be 1 to 8, not {bits}.")
    if x.size == 0:
        raise ValueError("fit_codebook needs data, but x is empty.")
    size = 2**bits
    x = x.astype(jnp.float32).reshape(-1)
    finite = jnp.isfinite(x)
    count = jnp.sum(finite).astype(jnp.float32)
    start = _spread_by_cube_root(jnp.sort(jnp.where(finite, x, jnp.float32(jnp.inf))), count, size)
    start = jnp.where(count > 0, start, jnp.float32(jnp.nan))

    def assign(codebook: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        index = nearest(x, codebook)
        error = jnp.where(finite, x - lookup(index, codebook), jnp.float32(0))
        return index, error, jnp.sum(error**2) / count

    def step(codebook: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        index, error, mean_square = assign(codebook)
        members = jax.ops.segment_sum(finite.astype(jnp.float32), index, size)
        # The mean as a correction of the value: sums of errors are small, of values not.
        total = jax.ops.segment_sum(error, index, size)
        return codebook + total / jnp.maximum(members, jnp.float32(1)), mean_square

    codebook, errors = lax.scan(step, start, None, length=iterations)
    return codebook, jnp.append(errors, assign(codebook)[2])


def _spread_by_cube_root(ordered: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """Returns `size` of the first `count` values of a sorted array, with the cube root of their density."""
    cells = jnp.linspace(0, 1, _QUANTILES, dtype=jnp.float32)
    quantiles = ordered[(cells * (count - 1)).astype(jnp.int32)]
    # A cell of width w between two quantiles has density 1/w, whose cube root times w is w^(2/3).
    mass = jnp.cumsum(jnp.diff(quantiles) ** jnp.float32(2 / 3))
    share = (jnp.arange(size, dtype=jnp.float32) + jnp.float32(0.5)) / jnp.float32(size)
    return quantiles[jnp.searchsorted(mass, share * mass[-1])]
