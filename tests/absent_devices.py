"""Programs compiled for GPUs and TPUs that are not there.

Needs the extras cuda, tpu and incumbents. Without them the tests that compile so are skipped; with
Q8JAX_REQUIRE_TARGETS=1, as .ci/run sets it, they fail.
"""

import os

import jax
import pytest

import q8jax
from experiments.targets import TargetError, target
from experiments.training.mesh import Placement


def get_target(name):
    try:
        return target(name)
    except TargetError as error:
        return miss(str(error))


def miss(what):
    """Skips a test, or fails it where nothing may be missing."""
    (pytest.fail if os.environ.get("Q8JAX_REQUIRE_TARGETS") == "1" else pytest.skip)(what)


def compiled_for_one(name, function, *arguments):
    """A function of arrays of these shapes, lowered and compiled for one device of a target."""
    goal = get_target(name)
    placement = Placement(goal.devices[:1])
    on_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated)
    lowered = placement.lower(function, *jax.tree.map(on_device, arguments))
    return lowered, lowered.compile(compiler_options=dict(goal.options))


def report_for(name, function, *arguments, **kwargs):
    """The audit of what `compiled_for_one` compiles."""
    return q8jax.audit(*compiled_for_one(name, function, *arguments), **kwargs)
