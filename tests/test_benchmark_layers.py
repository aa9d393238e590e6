"""The benchmark's contenders train the same MLP, and their programs are counted by the same rules."""

import jax
import numpy as np
import pytest
from micro import quick_compiles  # noqa: F401

from experiments.benchmarks.layers import Shapes, count, measure
from experiments.targets import Target

OWN = ["flax fp32", "flax bf16", "q8jax fp32", "q8jax bf16", "q8jax fp8", "q8jax int8", "flax fp8"]
SHAPES = Shapes(layers=1, width=16, hidden=32, tokens=64)


@pytest.fixture(scope="module")
def measured():
    return measure(OWN, SHAPES, rounds=3)


@pytest.mark.slow
def test_every_contender_trains_the_same_network(measured):
    losses = np.array([measured.losses[name] for name in OWN])
    assert losses.shape == (len(OWN), 3) and not measured.failures
    assert (np.diff(losses, axis=1) < 0).all()
    np.testing.assert_allclose(losses, np.broadcast_to(losses[:1], losses.shape), rtol=0.05)


@pytest.mark.slow
def test_the_contenders_differ_in_arithmetic_alone(measured):
    last = {name: losses[-1] for name, losses in measured.losses.items()}
    assert last["q8jax fp32"] == pytest.approx(last["flax fp32"], rel=1e-5)
    narrow = [last[name] for name in ("flax fp32", "flax bf16", "q8jax fp8", "q8jax int8")]
    assert len(set(narrow)) == len(narrow)


@pytest.mark.slow
def test_every_program_multiplies_what_the_shapes_say(measured):
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in measured.seconds.values())
    assert measured.flops == 5 * 2 * 64 * 16 * 32
    for name, program in measured.programs.items():
        assert sum(program.flops.values()) == measured.flops and sum(program.products.values()) == 5, name


def test_programs_are_counted_for_devices_that_are_not_run():
    found = count(["q8jax fp8"], SHAPES, Target(tuple(jax.devices()[:2]), {}))
    assert found.devices == 2 and not found.seconds
    program = found.programs["q8jax fp8"]
    assert sum(program.flops.values()) == found.flops / 2
    assert program.bytes > 0 and program.kernels > 0 and program.estimated_cycles is None
