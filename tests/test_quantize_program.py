"""experiments.quantize on models that are small enough to compile in seconds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import BERT, bert_tensors, publish
from wordpiece import made

import q8jax.nnx as qnnx
from experiments import options as pretraining
from experiments import quantize
from experiments.downstream import options as downstream
from experiments.models import folder, quantized
from experiments.models.config import TransformerConfig
from experiments.models.kinds import KINDS, policy_of
from experiments.models.purpose import Purpose
from experiments.quantizing import kernels, options, recording, search
from experiments.quantizing.kernels import Method
from experiments.quantizing.pipeline import Calibration, Plan, quantize_for_inference
from experiments.quantizing.schemes import PRESETS, Scheme, schemes_of
from experiments.training.precision import written_out
from q8jax import Policy, Recipe, ptq
from q8jax.nnx.layers import layers_of
from q8jax.recipe import Operand

WORDS = ("hello", "world", "us", "don't", "a b", "b a a", "hello a", "world b")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published sentence embedder, and texts in a file."""
    root = tmp_path_factory.mktemp("quantize")
    options_ = BERT | {"num_hidden_layers": 1}
    made(publish(root / "model", options_, bert_tensors(options_)) / "tokenizer.json")
    lines = [f"{a} {b},{i % 2}" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return root


def call(place, *given):
    data = f"csv:train={place}/texts.csv,test={place}/texts.csv,valid={place}/texts.csv,text=text,label=label"
    common = [f"--model={place}/model", f"--task={data}", "--length=10", "--batch_size=16", "--batches=2", "--nospeed"]
    names = {flag.partition("=")[0] for flag in given}
    options.parse(["quantize", *(flag for flag in common if flag.partition("=")[0] not in names), *given])
    return quantize.main([])


@pytest.mark.slow
def test_a_model_is_quantized_measured_and_kept(place, capsys):
    out = place / "out"
    asked = ["--precision=w8a8-static", "--method=smoothquant", "--embeddings=int8:row", f"--out={out}"]
    assert call(place, *asked) == 0
    printed = capsys.readouterr().out
    assert "cosine to float" in printed and "weights on disk" in printed
    found = json.loads((out / "report.json").read_text())
    cosine = found["after"]["quality"]["value"]
    assert 0.99 < cosine < 1 - 1e-6 and found["before"]["quality"]["value"] == pytest.approx(1)
    assert found["after"]["disk"] < 0.7 * found["before"]["disk"]
    assert {row["layer"] for row in found["tables"]["layers"]} >= {"encoder/blocks/0/mlp/down"}
    assert all(row["runs"] == "native" for row in found["tables"]["layers"])
    assert "<table>" in (out / "report.html").read_text() and "tabular" in (out / "layers.tex").read_text()
    model, stored = folder.load(str(out))
    assert quantized.is_quantized(model) and stored.tokenizer == str(out / "tokenizer.json")
    assert model.encoder.blocks[0].mlp.up.dot_general.inverse is not None


@pytest.mark.slow
def test_a_search_meets_its_budget_and_its_policy_is_one(place, capsys):
    file = place / "policy"
    asked = ["--budget=size:0.26", "--candidates=w8+w4", f"--save_policy={file}"]
    asked = [flag.replace("w4", "fwd=none,int4:tile8/compute=float32") for flag in asked]
    assert call(place, *asked) == 0
    printed = capsys.readouterr().out
    share = float(printed.split(" of float32 kernels")[0].split()[-1])
    assert 0.2 < share <= 0.26
    assert call(place, f"--precision=@{file}") == 0
    policy = Policy.parse(written_out(f"@{file}"))
    assert policy_of(KINDS["bert"], str(policy)) == policy
    # As finetune and pretrain read it.
    downstream.parse(["finetune", f"--precision=@{file}"])
    assert Policy.parse(downstream.from_flags().precision) == policy
    flags_of_runs = flags.FlagValues()
    pretraining.define(flags_of_runs)
    flags_of_runs(["pretrain", f"--precision=@{file}"])
    assert pretraining.from_flags(None, flags_of_runs).phases[0].policy == policy


ERRORS = [
    (["--model="], "--model= is needed"),
    (["--method=smothquant"], "did you mean 'smoothquant'"),
    (["--method=smoothquant+awq"], "choose one of them"),
    (["--precision=w8", "--method=smoothquant"], "inputs and weights that are both quantized"),
    (["--percent=99"], "--percent has no effect without --calibration=percentile"),
    (["--precision=w9"], "w9"),
    (["--budget=size:0"], "needs a number above 0"),
    (["--budget=size:0.01", "--candidates=w8"], "the smallest choice takes"),
    (["--embeddings=int8:tensor"], "each row of a table has its own scales"),
    (["--weights=nf4"], "nf4 is for int4"),
    (["--precision=@nowhere"], "nowhere cannot be read"),
    (["--task=nothing"], "--task=nothing is no task"),
    (["--precision=nothing->w8"], "matches no layer"),
    (["--batches=0"], "--batches=0 must be at least 1"),
]


@pytest.mark.parametrize("wrong, words", ERRORS)
def test_what_cannot_be_is_said_in_a_sentence(place, capsys, wrong, words):
    assert call(place, *wrong) == 1
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def model_and_batches(place):
    model, _ = folder.load(str(place / "model"))
    rng = np.random.default_rng(0)
    batches = [{"ids": rng.integers(4, 20, (8, 10)).astype(np.int32), "mask": rng.random((8, 10)) < 0.8}] * 2
    return model, batches


def run(model, batch):
    return model(batch["ids"], batch["mask"])


def outputs(model, batches):
    graphdef, state = nnx.split(model)
    return np.asarray(nnx.jit(lambda m: run(m, batches[0]))(nnx.merge(graphdef, state)))


def test_what_layers_are_given_is_handed_over_without_padding(place):
    model, batches = model_and_batches(place)
    plain = outputs(model, batches)
    path = "encoder/blocks/0/attention/qkv"
    target = ptq.Target("int8")
    calibrators = {path: ptq.min_max(target)}
    seen = recording.record(
        run, model, batches, [path], calibrators=calibrators, inverses={}, sums=True, batch_count=2
    )[path, 0]
    x = np.asarray(model.encoder.embeddings(batches[0]["ids"], None, None))[batches[0]["mask"]]
    assert int(seen.inputs.rows) == 2 * len(x)
    np.testing.assert_allclose(seen.inputs.gram, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(calibrators[path].finish(seen.ranges)[0], np.abs(x).max() / 127, rtol=1e-5)
    assert np.isin(np.asarray(seen.rows)[:, 0].round(4), x[:, 0].round(4)).all()
    np.testing.assert_array_equal(outputs(model, batches), plain)


def test_layers_of_a_stack_are_told_apart_by_their_depth():
    config = TransformerConfig(layers=2, d_model=16, heads=2, kv_heads=1, d_ff=16, vocab=20)
    purpose, policy = Purpose("text-generation"), Policy.parse("fp32")
    model = folder.build(KINDS["q8jax-transformer"], config, purpose, policy)
    batches = [{"ids": np.arange(16, dtype=np.int32).reshape(2, 8)}]
    path = "blocks/attention/qkv"
    seen = recording.record(
        lambda model, batch: model(batch["ids"]),
        model,
        batches,
        [path],
        calibrators={},
        inverses={},
        sums=True,
        batch_count=1,
    )
    assert seen.keys() == {(path, 0), (path, 1)}
    x = model.embedding(batches[0]["ids"]) * jnp.float32(4)
    x = np.asarray(x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + jnp.float32(config.norm_eps))).reshape(-1, 16)
    np.testing.assert_allclose(seen[path, 0].inputs.gram, x.T @ x, rtol=1e-3, atol=1e-3)
    assert not np.allclose(seen[path, 1].inputs.gram, x.T @ x, rtol=0.1)


METHODS = {
    "gptq": (f"{PRESETS['w4']}".replace("32", "8"), "symmetric", "float32"),
    "awq": (f"{PRESETS['w4']}".replace("32", "8"), "affine", "bfloat16"),
    "clip+gptq+bias": (f"{PRESETS['w4']}".replace("32", "8"), "affine", "float32"),
    "round": ("fwd=none,int4:tile8", "nf4", "float32"),
    "outliers": (PRESETS["w8a8-static"], "symmetric", "float32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", [m if m == "gptq" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_gives_a_model_near_to_the_float_one(place, method):
    recipe, weights, scales = METHODS[method]
    model, batches = model_and_batches(place)
    exact = outputs(model, batches)
    policy = Policy.parse(f"encoder/blocks/0/mlp/.*->{recipe}/compute=float32")
    schemes = schemes_of(policy, model, weights, "symmetric", scales)
    plan = Plan(schemes, {}, Method(tuple(method.split("+"))), Calibration("absmax"), Operand.parse("int8:row"))
    decided = quantize_for_inference(model, plan, run, batches, lambda line: None)
    assert len(decided) == len(schemes) == 2
    off = np.linalg.norm(outputs(model, batches) - exact) / np.linalg.norm(exact)
    assert 1e-3 < off < 0.3
    assert all(isinstance(layers_of(model)[path].kernel, qnnx.StoredKernel) for path in schemes)


def test_methods_do_not_make_a_kernel_worse_than_rounding(place):
    model, batches = model_and_batches(place)
    path = "encoder/blocks/0/mlp/up"
    seen = recording.record(run, model, batches, [path], calibrators={}, inverses={}, sums=True, batch_count=2)
    w = qnnx.kernel_matrix(layers_of(model)[path])
    scheme = Scheme.of(Recipe.parse("fwd=none,int4:tile8"), "affine", "symmetric", "float32")

    def error(*names):
        method = Method(names)
        before = kernels.inputs_of(w, seen[path, 0], scheme, method)
        return kernels.codes_of(w, before, seen[path, 0], scheme, method).error

    rounded = error("bias")
    assert error("gptq") < 0.9 * rounded and error("awq") <= rounded and error("clip") <= 1.1 * rounded


def test_budgets_are_met_with_the_least_damage_for_each_byte():
    option = search.Option
    options_ = [
        *(option("a", name, size, lost) for name, size, lost in (("", 40, 0.0), ("w8", 10, 0.1), ("w4", 5, 0.9))),
        *(option("b", name, size, lost) for name, size, lost in (("", 40, 0.0), ("w8", 10, 0.2), ("w4", 5, 0.25))),
    ]
    of = lambda budget: {
        path: o.candidate for path, o in search.choose(options_, search.Budget.parse(budget), 80).items()
    }
    assert of("size:1") == {"a": "", "b": ""}
    assert of("size:0.7") == {"a": "w8", "b": ""}
    assert of("size:0.19") == {"a": "w8", "b": "w4"}
    assert of("loss:0.15") == {"a": "w8", "b": ""}
    assert of("loss:0.36") == {"a": "w8", "b": "w4"}
    with pytest.raises(ValueError, match="the smallest choice takes 0.125"):
        of("size:0.1")
