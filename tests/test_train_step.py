"""One training step: its numbers in every precision, its scaling state, and what happens when it fails."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from micro import STEPS, leaves, make_tokens, make_trainer, quick_compiles, same  # noqa: F401

from experiments.training import nonfinite
from experiments.training import step as step_module
from experiments.training.nonfinite import first_nonfinite
from experiments.training.optimizer import OptimizerConfig
from experiments.training.precision import resolve

MAIN = ("fp32", "bf16", "fp16", "fp8", "int8")
# Loss and gradient norm of the first step, on any machine.
PINNED = {
    "fp32": (4.484682, 1.156977),
    "bf16": (4.485020, 1.157188),
    "fp16": (4.484643, 1.157022),
    "fp8": (4.485371, 1.157211),
    "int8": (4.485465, 1.157060),
}
EACH = pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("bf16", "fp8"))) for name in MAIN]
)


def start(trainer, tokens):
    state = trainer.init()
    return {**state, "dots": jax.jit(trainer.calibrate)(state, tokens)} if trainer.keeps_scales else state


@functools.cache
def compiled(precision, **options):
    trainer = make_trainer(precision, **options)
    return trainer, jax.jit(trainer.step)


@functools.cache
def trained(precision, steps=4, **options):
    """States before and after each step, and the metrics of each."""
    trainer, step = compiled(precision, **options)
    states, metrics = [start(trainer, make_tokens(0))], []
    for i in range(steps):
        state, values = step(states[-1], make_tokens(i))
        states.append(state)
        metrics.append({name: value.item() for name, value in values.items()})
    return states, metrics


@EACH
def test_metrics_of_the_first_step_are_pinned(precision):
    metrics = trained(precision)[1][0]
    loss, norm = PINNED[precision]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 2e-4)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5 if precision == "fp32" else 2e-3)
    assert metrics["nonfinite_tensors"] == 0
    assert metrics["sound"]


@pytest.mark.slow
def test_all_precisions_start_from_the_same_parameters():
    for precision in MAIN:
        assert same(trained(precision)[0][0]["params"], trained("fp32")[0][0]["params"])
    assert not same(make_trainer("fp32", seed=1).init()["params"], trained("fp32")[0][0]["params"])


def distance(first, second):
    """How far the gradients of two precisions' first steps are apart, relative to their length."""
    pairs = [leaves(first_moments(trained(precision)[0][1])) for precision in (first, second)]
    apart, length = (
        [np.sum(np.square(x)) for x in xs] for xs in ([a - b for a, b in zip(*pairs, strict=True)], pairs[1])
    )
    return np.sqrt(sum(apart) / sum(length))


@pytest.mark.slow
def test_precisions_differ_visibly_and_not_by_much():
    """An 8-bit run whose gradients are BF16's never ran in 8 bits."""
    assert 1e-4 < distance("fp16", "fp32") < 3e-3
    assert 2e-3 < distance("bf16", "fp32") < 2e-2
    for precision, least, most in (("fp8", 0.03, 0.15), ("int8", 0.008, 0.05)):
        assert least < distance(precision, "fp32") < most
        assert least < distance(precision, "bf16") < most
    assert distance("fp8", "int8") > 0.02


@EACH
def test_training_lowers_the_loss(precision):
    metrics = trained(precision)[1]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05


def test_the_learning_rate_is_the_schedules():
    with jax.numpy_dtype_promotion("standard"):
        rate = OptimizerConfig(steps=STEPS, warmup=2).learning_rate()
        expected = [float(rate(step)) for step in range(4)]
    assert [metrics["learning_rate"] for metrics in trained("bf16")[1]] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_rise_stay_and_fall(schedule):
    rate = OptimizerConfig(steps=100, lr=1.0, warmup=10, schedule=schedule, decay=0.3, final_lr=0.1).learning_rate()
    rates = np.array([float(rate(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.arange(11) / 10, atol=1e-6)
    assert rates[100] == pytest.approx(0.1)
    if schedule == "wsd":
        np.testing.assert_allclose(rates[10:71], 1)
        np.testing.assert_allclose(rates[70:], np.linspace(1, 0.1, 31), atol=1e-6)
    else:
        np.testing.assert_allclose(rates[10:], 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(91) / 90)), atol=1e-6)


def adamw(param, gradients, rates, decay, b1=0.9, b2=0.95):
    """Decoupled AdamW in float64 on clipped gradients."""
    param, m, v = np.float64(param), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        param = param - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * param)
    return param


def test_a_step_is_clipped_adamw_that_spares_norms_from_decay():
    states, metrics = trained("fp32")
    moments = [[np.float64(m) for m in leaves(first_moments(state))] for state in states[:4]]
    # What entered the first moment: m' = 0.9 m + 0.1 g.
    gradients = [[(b - 0.9 * a) / 0.1 for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(moments)]
    for entered, metric in zip(gradients, metrics, strict=False):
        norm = np.sqrt(sum(np.sum(g**2) for g in entered))
        assert norm == pytest.approx(min(1.0, metric["gradient_norm"]), rel=1e-4)
    assert metrics[0]["gradient_norm"] > 1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(states[0]["params"])]
    for i, path in enumerate(paths):
        expected = adamw(
            leaves(states[0]["params"])[i],
            [entered[i] for entered in gradients],
            [metric["learning_rate"] for metric in metrics[:3]],
            decay=0.0 if "norm" in path else 0.1,
        )
        np.testing.assert_allclose(leaves(states[3]["params"])[i], expected, atol=1e-5, err_msg=path)


def first_moments(state):
    return optax.tree.get(state["optimizer"], "mu")


@pytest.fixture(scope="module")
def whole_batch():
    """Loss, gradients and amaxes of one batch on one device, in codes of FP8 and otherwise float32."""
    return differentiate(make_tokens(0))


def differentiate(tokens, placement=lambda tree, spec: tree):
    trainer = make_trainer("fp8/compute=float32", accumulate=len(tokens))
    state = placement(trainer.init(), PartitionSpec())
    gradients = jax.jit(lambda state, tokens: trainer.gradients(trainer.model(state), state, tokens))
    return gradients(state, placement(tokens, PartitionSpec(None, "data")))


def assert_same_step(one, other):
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-6)
    for a, b in zip(leaves(one[1]), leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    assert all((a > 0).any() for a in leaves(one[2]) if a.size)
    for a, b in zip(leaves(one[2]), leaves(other[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
def test_four_microbatches_are_one_batch(whole_batch):
    assert_same_step(whole_batch, differentiate(make_tokens(0).reshape(4, 2, -1)))


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(whole_batch):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    assert_same_step(
        whole_batch, differentiate(make_tokens(0), lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    )


def test_evaluation_sees_frozen_scales_and_counts_tokens():
    trainer, step = compiled("fp8")
    state, tokens = trained("fp8")[0][-1], make_tokens(3)
    evaluate = jax.jit(trainer.evaluate)
    thrice = np.concatenate([tokens, tokens, tokens])
    loss = float(evaluate(state, thrice))
    # The loss of a step is taken before its update, with the same scales: the same number.
    assert loss == pytest.approx(float(step(state, tokens)[1]["loss"]), rel=2e-5)
    assert loss == float(evaluate(state, thrice))
    coarse = {**state, "dots": jax.tree.map(lambda x: x * 64, state["dots"])}
    assert abs(float(evaluate(coarse, thrice)) - loss) > 1e-4
    bf16 = make_trainer("bf16")
    in_bf16 = jax.jit(bf16.evaluate)(bf16.enter(state, bf16.phase_state()), thrice)
    assert 1e-5 < abs(float(in_bf16) / loss - 1) < 0.02


def test_calibration_gives_the_first_step_scales_of_its_own():
    states, _ = trained("fp8")
    fresh, warm, first = make_trainer("fp8").init()["dots"], states[0]["dots"], states[1]["dots"]
    for path in ("qkv", "out"):
        scale = lambda dots, path=path: np.asarray(dots["blocks"]["attention"][path]["dot_general"]["scale"])
        assert (scale(fresh) == 1).all()
        # The first step observes the tensors that calibration saw, but for the rounding of the codes before them.
        ratio = scale(first) / scale(warm)
        assert ((ratio >= 0.5) & (ratio <= 2)).all()
        assert (scale(warm) != 1).all()


def test_entering_a_phase_keeps_parameters_and_moments_only():
    trainer = make_trainer("int8")
    state = trained("fp8")[0][-1]
    entered = trainer.enter(state, trainer.phase_state())
    for name in ("params", "optimizer", "step", "nonfinite"):
        assert same(entered[name], state[name])
    assert not same(entered["dots"], state["dots"]) if leaves(entered["dots"]) else True
    assert jax.tree.structure(entered) == jax.tree.structure(trainer.init())


def scaled(state, scale, good_steps=0):
    loss_scale = {**state["loss_scale"], "scale": jnp.float32(scale), "good_steps": jnp.int32(good_steps)}
    return {**state, "loss_scale": loss_scale}


def test_float16_skips_and_counts_a_step_that_overflows():
    _, step = compiled("fp16")
    state = scaled(trained("fp16")[0][0], 2.0**24)
    skipped = 0
    while True:
        following, metrics = step(state, make_tokens(0))
        if np.isfinite(metrics["gradient_norm"]):
            break
        skipped += 1
        assert metrics["sound"] and metrics["nonfinite_tensors"] > 0
        assert metrics["skipped_steps"] == skipped
        assert same(following["params"], state["params"]) and same(following["optimizer"], state["optimizer"])
        assert following["loss_scale"]["scale"] == state["loss_scale"]["scale"] / 2
        assert following["step"] == state["step"] + 1
        state = following
    assert skipped > 0
    assert metrics["skipped_steps"] == skipped
    assert not same(first_moments(following), first_moments(state))
    assert float(metrics["loss"]) == pytest.approx(PINNED["fp16"][0], rel=2e-3)


def test_float16_doubles_its_loss_scale_after_200_good_steps():
    _, step = compiled("fp16")
    state = trained("fp16")[0][0]
    after = [step(scaled(state, 1024, good), make_tokens(0))[0]["loss_scale"] for good in (198, 199)]
    assert [float(a["scale"]) for a in after] == [1024, 2048]
    assert [int(a["good_steps"]) for a in after] == [199, 0]
    assert float(step(scaled(state, 2.0**24, 199), make_tokens(0))[0]["loss_scale"]["scale"]) <= 2.0**24


def poisoned(state, value, name, index):
    params = jax.tree.map(lambda x: x, state["params"])
    params["blocks"]["mlp"][name]["kernel"] = params["blocks"]["mlp"][name]["kernel"].at[index].set(value)
    return {**state, "params": params}


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_a_failed_step_and_all_after_it_change_nothing(precision):
    _, step = compiled(precision)
    state = poisoned(trained(precision)[0][1], np.nan, "up", (1, 0, 0))
    failed, metrics = step(state, make_tokens(1))
    assert not metrics["sound"] and np.isnan(metrics["loss"]) and metrics["nonfinite_tensors"] > 0
    assert same({**failed, "sound": True}, {**state, "sound": True})
    # Even where the next step alone would be fine.
    mended = {**trained(precision)[0][1], "sound": failed["sound"]}
    assert same(step(mended, make_tokens(2))[0], mended)


@pytest.mark.slow
def test_float16_gives_up_at_the_least_loss_scale(monkeypatch):
    monkeypatch.setattr(step_module, "LEAST_LOSS_SCALE", 2.0**24)
    state = scaled(trained("fp16")[0][0], 2.0**24)
    failed, metrics = jax.jit(make_trainer("fp16").step)(state, make_tokens(0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert not metrics["sound"]
    assert same({**failed, "sound": True}, state)


def test_tensors_that_are_not_finite_are_counted_until_the_count_begins_anew():
    _, step = compiled("fp8")
    healthy = trained("fp8")[0][1]
    following, metrics = step(poisoned(healthy, np.inf, "up", (1, 0, 0)), make_tokens(1))
    found = int(metrics["nonfinite_tensors"])
    assert metrics["sound"] and found > 0
    later = {**healthy, "nonfinite": following["nonfinite"]}
    assert step(later, make_tokens(1))[1]["nonfinite_tensors"] == found
    assert step(healthy, make_tokens(1))[1]["nonfinite_tensors"] == 0


@pytest.mark.slow
def test_the_first_nonfinite_tensor_is_named():
    state = poisoned(trained("fp32")[0][1], 3e38, "down", (1,))
    assert first_nonfinite(make_trainer("fp32"), state, make_tokens(0)) == "the output of block 1"


def test_tensors_are_named_in_the_order_of_the_computation():
    names = [f"blocks/{name}" for name in nonfinite._BLOCK]
    fine = {name: np.ones(3, bool) for name in names} | {name: np.bool_(True) for name in ("embedding", "norm", "head")}
    found = {"parameter": fine, "output": np.ones(3, bool), "end": {"the logits": np.bool_(True)}, "gradient": fine}
    order = [name for name, _ in nonfinite._in_order(found, 3)]
    assert len(order) == len(set(order)) == 2 * (3 * 6 + 3) + 3 + 1
    assert order[0] == "parameter embedding" and order[-1] == "the gradient of embedding"
    assert order.index("the output of block 0") < order.index("parameter blocks/attention_norm of block 1")
    backward = [name for name in order if name.startswith("the gradient")]
    assert backward[:3] == [
        "the gradient of head",
        "the gradient of norm",
        "the gradient of blocks/mlp/down of block 2",
    ]
    assert backward[-2] == "the gradient of blocks/attention_norm of block 0"


STOCHASTIC = "int8-row/dlhs=int8:row:current:stochastic,int8:row/drhs=int8:row,int8:row:current:stochastic"


@pytest.mark.slow
def test_stochastic_rounding_draws_anew_in_every_step():
    trainer, step = compiled(STOCHASTIC)
    state = trainer.init()
    first, metrics = step(state, make_tokens(0))
    assert same(first, step(state, make_tokens(0))[0])
    other, _ = step({**state, "dots": first["dots"]}, make_tokens(0))
    assert not same(first_moments(first), first_moments(other))
    assert float(metrics["loss"]) == pytest.approx(trained("int8-row")[1][0]["loss"], rel=1e-6)


@pytest.mark.slow
def test_stochastic_rounding_draws_anew_in_every_microbatch():
    """Two equal microbatches that drew alike would have the gradient of one, exactly."""
    trainer = make_trainer(STOCHASTIC, accumulate=2)
    split = lambda state, tokens: trainer.gradients(trainer.model(state), state, tokens)[1]
    once = lambda state, tokens: split(state, tokens[:1])
    state, tokens = trainer.init(), np.concatenate([make_tokens(0), make_tokens(0)])
    both, first = jax.jit(split)(state, tokens), jax.jit(once)(state, tokens)
    apart = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(leaves(both), leaves(first), strict=True)]
    assert max(apart) > 1e-3
    assert max(apart) < 0.3


# Tiles and blocks of 128 need dimensions that they divide.
WIDE = {"d_model": 128, "d_ff": 128, "heads": 2, "kv_heads": 2, "layers": 1, "vocab": 64}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8-block", "int8-block", "int8-switchback", "mxfp8"])
def test_presets_with_products_of_their_own_train(precision):
    metrics = trained(precision, **WIDE)[1]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert all(m["nonfinite_tensors"] == 0 for m in metrics)
    exact = trained("fp32", **WIDE)[1]
    gap = max(abs(m["loss"] / e["loss"] - 1) for m, e in zip(metrics, exact, strict=True))
    assert gap < 0.05
    assert precision == "fp32" or gap > 1e-6
    if resolve(precision).policy.rules[0][1].is_quantized:
        assert gap > 1e-4


@pytest.mark.slow
def test_a_perturbed_initialisation_is_near_the_other_one_and_has_the_same_batches():
    plain, near = (make_trainer("bf16", **options).init()["params"] for options in ({}, {"perturbation": 1e-3}))
    ratios = np.concatenate(
        [np.ravel(b / a)[np.ravel(a) != 0] for a, b in zip(leaves(plain), leaves(near), strict=True)]
    )
    assert abs(ratios.mean() - 1) < 1e-4 and ratios.std() == pytest.approx(1e-3, rel=0.05)
    assert np.abs(ratios - 1).max() < 6e-3


def test_the_average_of_the_parameters_follows_its_recurrence():
    trainer = make_trainer("bf16", optimizer=OptimizerConfig(steps=10, warmup=2, average=0.9))
    step, state = jax.jit(trainer.step), trainer.init()
    mean = [np.asarray(leaf, np.float64) for leaf in leaves(state["params"])]
    for i in range(4):
        state, _ = step(state, make_tokens(i))
        decay = min(0.9, (1 + i) / (10 + i))
        mean = [decay * m + (1 - decay) * p for m, p in zip(mean, leaves(state["params"]), strict=True)]
    for ours, wanted in zip(leaves(state["average"]), mean, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-7)
