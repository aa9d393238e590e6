"""A step of fine-tuning against NumPy, and what ranges and teachers do in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from micro import quick_compiles  # noqa: F401

import q8jax.nnx as qnnx
from experiments.downstream.heads import head_of
from experiments.downstream.optimizer import Optimizer
from experiments.downstream.step import Distillation, Trainer
from experiments.models import folder
from experiments.models.kinds import KINDS, policy_of
from experiments.models.purpose import Purpose
from experiments.models.recurrent import RecurrentConfig
from q8jax import qat
from q8jax.policy import Policy

PURPOSE = Purpose("token-classification", ("x", "y", "z"), tokenizer="bytes")
HEAD = head_of(PURPOSE, None)
SHAPES = RecurrentConfig(vocab=9, classes=3, d_model=4, hidden=4, layers=1, bidirectional=False)
RNG = np.random.default_rng(0)
BATCH = {
    "ids": RNG.integers(0, 9, (4, 6)).astype(np.int32),
    "mask": np.arange(6) < np.array([[6], [4], [5], [6]]),
    "labels": RNG.integers(-1, 3, (4, 6)).astype(np.int32),
}


def made(precision="fp32", ranges=None, seed=0):
    kind = KINDS["q8jax-lstm"]
    policy = policy_of(kind, precision)
    if ranges:
        of = lambda recipe: qat.recipe_for(recipe, ranges=ranges) if recipe.is_quantized else recipe
        policy = Policy(tuple((pattern, of(recipe)) for pattern, recipe in policy.rules))
    return folder.build(kind, SHAPES, PURPOSE, policy, seed=seed)


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def test_the_loss_is_the_mean_over_what_counts_and_a_share_of_the_teachers():
    student, teacher = made(), made(seed=1)
    run = nnx.jit(lambda model: model(BATCH["ids"], BATCH["mask"]))
    logits, theirs = (np.float64(run(m)) for m in (student, teacher))
    counted = BATCH["labels"] >= 0
    labels = np.where(counted, BATCH["labels"], 0)
    nats = -np.log(np.take_along_axis(softmax(logits), labels[..., None], -1)[..., 0])
    ours = (nats * counted).sum() / counted.sum()
    p, q = softmax(theirs / 3), softmax(logits / 3)
    soft = 9 * ((p * np.log(p / q)).sum(-1) * counted).sum() / counted.sum()
    assert 6 < counted.sum() < 24 and soft > 0.01
    for weight in (0.25, 1.0):
        distillation = Distillation(teacher, 3.0, weight)
        trainer = Trainer(student, HEAD, Optimizer(steps=10, warmup=0), "float32", distillation)
        _, values = jax.jit(trainer.step)(trainer.init(), trainer.teacher, BATCH)
        np.testing.assert_allclose(values["loss"], (1 - weight) * ours + weight * soft, rtol=1e-4)
    total, count = HEAD.loss((np.float32(logits),), {"labels": jnp.asarray(BATCH["labels"])})
    np.testing.assert_allclose([float(total), float(count)], [ours * counted.sum(), counted.sum()], rtol=1e-5)


def test_sgd_is_nesterovs_with_decay_of_matrices_alone():
    options = {"lr": 0.1, "weight_decay": 0.3, "clip": 0.05, "momentum": 0.8, "final_lr": 1.0}
    optimizer = Optimizer(steps=9, warmup=0, schedule="linear", optimizer="sgd", **options)
    params = {"kernel": np.float32([[1, -2]]), "bias": np.float32([3])}
    transformation = optimizer.transformation()
    state, velocity, own = transformation.init(params), {"kernel": 0.0, "bias": 0.0}, params
    for step in range(3):
        grads = {name: np.float32(np.cos(step + value)) for name, value in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, decay in (("kernel", 0.3), ("bias", 0.0)):
            wanted = grads[name] * 0.05 / norm + decay * own[name]
            velocity[name] = 0.8 * velocity[name] + wanted
            own = own | {name: own[name] - 0.1 * (wanted + 0.8 * velocity[name])}
        updates, state = transformation.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + np.float32(0.1) * u, params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, own)


def test_learned_ranges_move_at_a_rate_of_their_own_and_make_the_next_scales():
    model = qnnx.learn_ranges(made("int8/compute=float32", "learned"))
    optimizer = Optimizer(steps=10, warmup=0, lr=1e-3, weight_decay=0.0)
    trainer = Trainer(model, HEAD, optimizer, "float32", range_lr=0.05)
    state = trainer.init()
    amaxes = jax.jit(trainer.observe)(state, None, BATCH)
    state = jax.jit(trainer.calibrated)(state, amaxes)
    before = {name: float(value) for name, value in qnnx.ranges(trainer.model(state)).items()}
    assert set(before) == {"layers/0/inputs", "layers/0/recurrent"} and all(0 < x < 10 for x in before.values())
    # Halved, or nothing would be clipped, and nothing learned.
    half = lambda path, x: x * np.float32(0.5) if path[-1].key == "learned_range" else x
    state["params"] = jax.tree_util.tree_map_with_path(half, state["params"])
    after, values = jax.jit(trainer.step)(state, None, BATCH)
    assert values["sound"]
    for name, bound in qnnx.ranges(trainer.model(after)).items():
        # AdamW's first step has the size of the learning rate.
        np.testing.assert_allclose(abs(float(bound) - before[name] / 2), 0.05, rtol=1e-2)
        layer = trainer.model(after).layers[0]
        dot = layer.inputs.dot_general if name.endswith("inputs") else layer.recurrent.einsum_op
        np.testing.assert_allclose(dot.scale[0], float(bound) / 127, rtol=1e-6)
    moved = np.abs(after["params"]["head"]["kernel"] - state["params"]["head"]["kernel"])
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)


@pytest.mark.slow
def test_static_ranges_are_calibrated_anew():
    trainer = Trainer(made("int8/compute=float32", "static"), HEAD, Optimizer(steps=10, warmup=0), "float32")
    observe, calibrated = jax.jit(trainer.observe), jax.jit(trainer.calibrated)
    state = trainer.init()
    scale_of = lambda state: float(trainer.model(state).layers[0].inputs.dot_general.scale[0])
    first = calibrated(state, observe(state, None, BATCH))
    larger = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 2 if path[-1].key == "embedding" else x, first["params"]
    )
    kept, _ = jax.jit(trainer.step)({**first, "params": larger}, None, BATCH)
    assert scale_of(kept) == scale_of(first)
    again = calibrated({**first, "params": larger}, observe({**first, "params": larger}, None, BATCH))
    np.testing.assert_allclose(scale_of(again), 2 * scale_of(first), rtol=1e-6)
    assert first["params"].keys() == again["params"].keys()


@pytest.mark.parametrize("precision", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_leaves_the_parameters(precision):
    model = made(precision)
    policy = policy_of(KINDS["q8jax-lstm"], precision)
    trainer = Trainer(model, HEAD, Optimizer(steps=10, warmup=0), policy.rules[0][1].compute)
    step = jax.jit(trainer.step)
    state, values = step(trainer.init(), None, BATCH)
    assert values["sound"] and np.isfinite(values["loss"])
    broken = {**state, "params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}
    after, values = step(broken, None, BATCH)
    assert not values["sound"] and int(after["step"]) == int(broken["step"])
    if precision == "fp16":
        assert values["loss_scale"] == 2.0**15


@pytest.mark.slow
def test_what_runs_is_what_is_kept(tmp_path):
    model = qnnx.learn_ranges(made("int8", "learned"))
    trainer = Trainer(model, HEAD, Optimizer(steps=10, warmup=0), "bfloat16", range_lr=0.05)
    state = trainer.init()
    state = jax.jit(trainer.calibrated)(state, jax.jit(trainer.observe)(state, None, BATCH))
    state, _ = jax.jit(trainer.step)(state, None, BATCH)
    trained = trainer.model(state)
    policy = "layers/.*->" + str(trained.layers[0].inputs.dot_general.recipe) + ";.*->bf16"
    purpose = Purpose("token-classification", ("x", "y", "z"), policy=str(Policy.parse(policy)))
    folder.save(tmp_path / "model", qnnx.forget_ranges(trainer.model(state)), purpose)
    loaded, _ = folder.load(str(tmp_path / "model"))
    run = nnx.jit(lambda model: model(BATCH["ids"], BATCH["mask"]))
    np.testing.assert_array_equal(run(trained), run(loaded))
