"""Code books: NF4 against the published table, Lloyd–Max against theory and a NumPy k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q8jax.codebook import fit_codebook, lookup, nearest, normal_float
from q8jax.groups import granularity
from q8jax.qarray import quantize
from q8jax.stats import sqnr

# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]

# Max 1960, table I: mean squared error of the best quantizer of a standard normal.
BEST_NORMAL_ERROR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


fit = jax.jit(fit_codebook, static_argnums=1)


def k_means(x: np.ndarray, size: int, iterations: int = 50) -> np.ndarray:
    """Lloyd's iteration in float64 from the start that `fit_codebook` documents."""
    x = np.sort(x[np.isfinite(x)]).astype(np.float64)
    quantiles = x[(np.linspace(0, 1, 4096) * (len(x) - 1)).astype(int)]
    mass = np.cumsum(np.diff(quantiles) ** (2 / 3))
    book = quantiles[np.searchsorted(mass, (np.arange(size) + 0.5) / size * mass[-1])]
    for _ in range(iterations):
        index = np.abs(x[:, None] - book).argmin(1)
        book = np.array([x[index == i].mean() for i in range(size)])
    return book


def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**15).astype(np.float32)


def test_nf4_is_the_published_table():
    np.testing.assert_allclose(normal_float(4), NF4, atol=5e-7)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_normal_float_spans_minus_one_to_one_with_a_zero(bits):
    book = np.asarray(normal_float(bits))
    assert book.shape == (2**bits,)
    assert (book[0], book[-1]) == (-1, 1)
    assert (np.diff(book) > 0).all()
    assert np.count_nonzero(book == 0) == 1


def test_nf4_beats_int4_on_normal_data():
    # Blocks of 64, as in QLoRA.
    x = normal().reshape(-1, 64)
    options = granularity("row", 2)

    @jax.jit
    def gain(x):
        with_book = quantize(x, "uint4", codebook=normal_float(4), **options)
        return sqnr(x, with_book) - sqnr(x, quantize(x, "int4", **options))

    assert 0.5 < float(gain(x)) < 3


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_lloyd_max_reaches_the_best_error_for_a_normal(bits):
    x = normal()
    book, errors = fit(x, bits)
    errors = np.asarray(errors)
    assert abs(errors[-1] / BEST_NORMAL_ERROR[bits] - 1) < 0.03
    assert (np.diff(np.asarray(book)) > 0).all()
    # Never up, but for float32 sums.
    assert (np.diff(errors) <= 1e-5 * errors[:-1]).all()
    assert errors[0] > errors[-1]
    distance = np.abs(x[:, None].astype(np.float64) - np.asarray(book, np.float64)).min(1)
    np.testing.assert_allclose(errors[-1], (distance**2).mean(), rtol=1e-4)


def test_lloyd_max_is_numpy_k_means_and_ignores_what_is_not_finite():
    x = normal()
    book, errors = fit(x, 3)
    assert errors.shape == (51,)
    np.testing.assert_allclose(book, k_means(x, 8), atol=1e-3)
    np.testing.assert_array_equal(fit(x, 3)[0], book)
    dirty = x.copy()
    dirty[::3], dirty[1::97], dirty[2::89] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(fit(dirty, 3)[0], k_means(dirty, 8), atol=1e-3)


def test_fitting_few_distinct_values_is_exact():
    for values in ([-3, 0, 1, 7], [2.5]):
        book, errors = fit(np.resize(np.array(values, np.float32), 2**15), 3)
        assert errors[-1] == 0
        assert set(np.asarray(book).tolist()) == set(values)


def test_a_fitted_code_book_beats_uniform_codes_on_heavy_tails():
    x = np.random.default_rng(0).standard_t(3, 2**16).astype(np.float32)

    @jax.jit
    def both(x):
        book, _ = fit_codebook(x, 8)
        return sqnr(x, quantize(x, "uint8", codebook=book, scale=1)), sqnr(x, quantize(x, "int8"))

    fitted, uniform = both(x)
    assert fitted > uniform + 6


def test_a_fitted_code_book_quantizes_with_the_error_of_the_fit():
    x = jnp.asarray(normal())
    book, errors = fit(x, 4)
    q = quantize(x, "uint4", codebook=book, scale=1)
    np.testing.assert_allclose(jnp.mean((x - q.dequantize()) ** 2), errors[-1], rtol=1e-5)
    assert sqnr(x, q) > sqnr(x, quantize(x, "uint4", codebook=book)) + 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_finite_gives_a_code_book_of_nan_that_is_refused(value):
    x = jnp.full(8, value)
    for found in fit(x, 2):
        assert jnp.isnan(found).all()
    with pytest.raises(ValueError, match="must ascend from value to value, all of them finite"):
        quantize(jnp.ones(8), "uint4", codebook=fit(x, 2)[0])


def test_nearest_takes_the_lower_value_on_a_tie_and_saturates():
    book = jnp.array([-1, 0, 0.5, 4], jnp.float32)
    x = jnp.array([-9, -0.5, -0.49, 0.25, 0.26, 2.25, 2.3, 9, jnp.inf], jnp.float32)
    index = nearest(x, book)
    assert index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert lookup(index.astype(jnp.uint8), book).tolist() == [-1, -1, 0, 0, 0.5, 0.5, 4, 4, 4]


def test_bad_arguments_are_refused():
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"fit_codebook: bits must be 1 to 8, not {bits}"):
            fit_codebook(jnp.ones(3, jnp.float32), bits)
    with pytest.raises(ValueError, match="fit_codebook needs data, but x is empty"):
        fit_codebook(jnp.ones(0, jnp.float32), 2)
    with pytest.raises(ValueError, match="normal_float: bits must be 2 to 8, not 1"):
        normal_float(1)
