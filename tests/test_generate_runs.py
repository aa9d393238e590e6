"""Models of pretraining runs, from their checkpoints, with the scales that they were trained with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from micro import quick_compiles, same  # noqa: F401

from experiments import options, runs, stored
from experiments.generating import sources

FLAGS = ("--layers=1", "--d_model=16", "--heads=2", "--d_ff=16", "--seq_len=16", "--batch_size=2", "--precision=fp8")
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 6)).astype(np.int32)


def config_of(*arguments, **changes):
    chosen = flags.FlagValues()
    options.define(chosen)
    chosen(["pretrain", *FLAGS, *arguments])
    made = options.from_flags(None, chosen)
    resolved = {"mesh": "data:1", "tokenizer": "bytes", "vocab": 256, "data_sha256": {}} | changes
    return made, made.config(**resolved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's directory as pretrain leaves it, and the state in its checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-fp8-seed0"
    made, config = config_of()
    trainer = stored._trainer(made, config, made.phases[0])
    state = jax.jit(trainer.init)()
    # As training leaves them: no longer what a new model has.
    state["dots"] = jax.tree.map(lambda x: x * 4 if x.dtype == jnp.float32 else x, state["dots"])
    with runs.RunDir.open(folder, config) as directory, runs.Checkpoints(directory.checkpoints) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.wait()
    return folder, trainer, state


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, leaves):
    return nnx.merge(graphdef, leaves)(TOKENS)


def logits(model):
    return _logits(*nnx.split(model))


@pytest.mark.slow
def test_a_run_is_the_model_that_it_has_trained_with_its_scales_frozen(trained):
    folder, trainer, state = trained
    assert stored.is_run(folder) and not stored.is_run(folder.parent)
    source = sources.load(str(folder), None, "")
    assert (source.precision, source.is_calibrated, source.length, source.run.step) == ("fp8", True, 16, 3)
    assert same(source.run.state, state)
    np.testing.assert_array_equal(logits(source.model), logits(trainer.model(state)))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "checkpoints", "config.json"]


def test_in_another_precision_it_has_the_same_weights_and_scales_to_be_found(trained):
    folder, _, state = trained
    source = sources.load(str(folder), "fp8-hybrid", "")
    assert not source.is_calibrated and source.precision == "fp8-hybrid"
    assert same(nnx.to_pure_dict(nnx.state(source.model, nnx.Param)), state["params"])


def test_a_run_without_a_checkpoint_or_without_text_is_refused(trained, tmp_path):
    _, config = config_of()
    with runs.RunDir.open(tmp_path / "empty", config):
        pass
    with pytest.raises(runs.RunError, match="empty is a run without a checkpoint"):
        stored.restore(tmp_path / "empty")
    _, _, state = trained
    _, config = config_of("--data=markov:order=1,vocab=256", tokenizer="given")
    with (
        runs.RunDir.open(tmp_path / "markov", config) as directory,
        runs.Checkpoints(directory.checkpoints) as checkpoints,
    ):
        checkpoints.save(3, state)
        checkpoints.wait()
    with pytest.raises(ValueError, match="was trained on markov:order=1,vocab=256, which is no text: give another run"):
        sources.load(str(tmp_path / "markov"), None, "")
