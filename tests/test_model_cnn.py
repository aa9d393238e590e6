"""The residual CNN: what it is made of, and that it learns in every precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifying import train
from flax import nnx
from micro import quick_compiles  # noqa: F401

import q8jax.nnx as qnnx
from experiments.models.cnn import Cnn, CnnConfig
from q8jax.policy import Policy

SMALL = CnnConfig(channels=2, classes=4, stem=8, widths=(16,), groups=4)
SIZE = 8


def build(policy: str, config: CnnConfig = SMALL, seed: int = 0) -> Cnn:
    dtype = jnp.float32 if policy == "fp32" else jnp.bfloat16
    return Cnn(config, Policy.parse(policy), dtype, rngs=nnx.Rngs(seed))


def quantized(recipe: str) -> str:
    return recipe if recipe == "fp32" else f"stem|blocks/.*->{recipe};head->bf16"


def images(step: int, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Stripes along either axis in either channel, at a random place and under noise: a class for each."""
    random = np.random.default_rng(step)
    labels = random.integers(0, 4, count)
    stripes = np.where((np.arange(SIZE) + random.integers(0, SIZE, (count, 1))) % 4 < 2, 1.0, -1.0)
    x = random.normal(0, 0.5, (count, SIZE, SIZE, 2))
    for i, label in enumerate(labels):
        x[i, :, :, label // 2] += stripes[i][:, None] if label % 2 else stripes[i][None, :]
    return x.astype(np.float32), labels.astype(np.int32)


@functools.cache
def trained(recipe: str, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies, each step's on images that it has not seen."""
    return train(build(quantized(recipe)), images, steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp8", "int8"])
def test_it_learns(recipe):
    losses, accuracies = trained(recipe)
    assert accuracies[0] < 0.5 and accuracies[-5:].mean() > 0.95, accuracies
    assert np.isfinite(losses).all() and losses[-5:].mean() < 0.3 * losses[0]


@pytest.mark.slow
def test_quantization_is_seen_and_is_small():
    losses = {recipe: trained(recipe)[0] for recipe in ("fp32", "fp8", "int8")}
    for recipe in ("fp8", "int8"):
        first = abs(losses[recipe][0] / losses["fp32"][0] - 1)
        assert 1e-5 < first < 0.05 and (losses[recipe] != losses["fp32"]).all()
    assert (losses["fp8"] != losses["int8"]).all()


def test_its_paths_are_those_that_a_policy_names():
    model = build("stem->fp8;blocks/0/(first|second)->int8;head->bf16")
    paths = {path.rpartition("/")[0] for path in qnnx.scaling_states(model)}
    assert paths == {"stem", "blocks/0/first", "blocks/0/second", "head"}
    assert not isinstance(model.blocks[0].shortcut.conv_general_dilated, qnnx.QuantizedDot)
    states = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, qnnx.Scale, qnnx.AmaxHistory))))
    assert not [path for path, _ in states]  # nothing but parameters and scales


def test_shapes_and_parameters():
    model = nnx.eval_shape(lambda: Cnn(CnnConfig(), Policy.parse("bf16"), jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 289_130
    config = CnnConfig(channels=3, classes=7, stem=4, widths=(4, 8, 8), blocks=2, groups=2)
    deep = nnx.eval_shape(lambda: Cnn(config, Policy.parse("bf16"), jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert [block.shortcut is None for block in deep.blocks] == [False, True] * 3
    out = nnx.eval_shape(lambda model, x: model(x), deep, jnp.zeros((2, 12, 10, 3)))
    assert (out.shape, out.dtype) == ((2, 7), jnp.float32)


def test_an_image_does_not_see_the_others_of_its_batch():
    model = build(quantized("int8-row"))
    run = nnx.jit(lambda model, x: model(x))
    x, _ = images(0, 4)
    np.testing.assert_array_equal(run(model, x)[:2], run(model, np.concatenate([x[:2], 10 * x[2:]]))[:2])


@pytest.mark.parametrize(
    ("changes", "message"), [({"classes": 0}, "classes=0 must be at least 1"), ({"groups": 3}, "groups=3 must divide")]
)
def test_sizes_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CnnConfig(**changes)
