"""The products that the benchmark times are the right ones, in the arithmetic that they are named by."""

import numpy as np
import pytest
from micro import quick_compiles  # noqa: F401

from experiments.benchmarks.gemms import PREQUANTIZED, Product, entrant, of_a_layer, square

PRODUCT = Product("x", 48, 64, 32)
# Relative errors: none may be larger, and where something is rounded none is smaller. XLA may sum bfloat16 in pieces.
ROUNDED = (5e-4, 0.014)
ERRORS = {"bf16": ROUNDED, "fp8": (0.015, 0.08), "int8": (0.004, 0.03)}


def matrix(x):
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def errors(found, activations, weight, gradients):
    """Relative, of the product and of both gradients."""
    exact = activations @ weight, gradients @ weight.T, activations.T @ gradients
    return [np.linalg.norm(matrix(f) - e) / np.linalg.norm(e) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", ["flax bf16", "q8jax fp8", "q8jax int8", "flax fp8"])
def test_a_contender_multiplies_forward_and_backward(name):
    activations, gradients = map(matrix, PRODUCT.tensors())
    own = entrant(name, PRODUCT, PRODUCT.tensors())
    (variables, *_) = own._arguments
    own()
    out, back, following = own()
    after = own._arguments[0]
    assert after["params"] is variables["params"] and set(after) == set(following)
    assert all(after[name] is following[name] for name in set(following) - {"params"})  # state goes on
    kernel = lambda variables: variables["params"]["dot"]["kernel"]
    low, high = ERRORS[name.split()[1]]
    for error in errors((out, back, kernel(following)), activations, matrix(kernel(variables)), gradients):
        assert low < error < high
    assert sum(own.program.products.values()) == 3
    assert sum(own.program.flops.values()) == PRODUCT.flops == 3 * 2 * 48 * 64 * 32


@pytest.mark.parametrize("name", PREQUANTIZED)
def test_codes_are_multiplied_as_they_are(name):
    own = entrant(name, PRODUCT, PRODUCT.tensors())
    (codes,) = own._arguments
    values = {role: [matrix(x.qvalue) * np.asarray(x.scale) for x in pair] for role, pair in codes.items()}
    activations, weight = values["fwd"][0], values["fwd"][1].T
    gradients = values["dlhs"][0]
    for error in errors(own(), activations, weight, gradients):
        assert ROUNDED[0] < error < ROUNDED[1]
    lost = np.linalg.norm(activations - matrix(PRODUCT.tensors()[0])) / np.linalg.norm(activations)
    assert 0.005 < lost < 0.05
    assert sum(own.program.products.values()) == 3


def test_the_products_of_a_layer_are_transformer_engines():
    products = of_a_layer(15872, 4096, 16384)
    assert [(p.inputs, p.outputs) for p in products] == [(4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)]
    assert sum(p.flops for p in products) == 6 * 15872 * 12 * 4096**2
    assert square(256).flops == 6 * 256**3
