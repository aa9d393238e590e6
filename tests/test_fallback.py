"""Layers that fall back to 16 bits in training: which, when, and the same when resumed."""

import json

import jax
import numpy as np
import pytest
from micro import quick_compiles  # noqa: F401

from experiments import options, pretrain, runs
from experiments.training.fallback import Fallback, parse
from experiments.training.precision import resolve

MICRO = ("--layers=2", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--eval_batches=2")
DATA = ("--data=markov:order=1,vocab=16,tokens=5000", "--steps=6", "--log_every=1", "--eval_every=6", "--mesh=data:1")
FALLING = ("--precision=fp8-unscaled", "--telemetry=tensors", "--telemetry_every=2", "--fallback=underflow:0.02")
LAYER, OTHER = "blocks/mlp/up", "blocks/mlp/down"


def dots(**shares):
    """The tensors of a line of telemetry in which `x` of LAYER has these shares, and all else none."""
    quiet = {"saturation": [0.0, 0.0], "underflow": [0.0, None]}
    tensors = {layer: {tensor: dict(quiet) for tensor in "xwg"} for layer in (LAYER, OTHER)}
    tensors[LAYER]["x"] |= {name: [0.0, share] for name, share in shares.items()}
    return tensors


FORMATS = {layer: dict.fromkeys("xwg", "float8_e4m3fn") for layer in (LAYER, OTHER)}


def test_bounds_are_read_strictly():
    assert parse(None) == {} and parse("saturation:1e-2,underflow:.5") == {"saturation": 0.01, "underflow": 0.5}
    assert parse("saturation:1.0") == {"saturation": 1}
    with pytest.raises(ValueError, match="entry of --fallback 'sqnr': choose one of saturation, underflow"):
        parse("sqnr:3")
    for text in ("saturation:2", "saturation", "saturation:0.1,saturation:0.2", "underflow:x", "underflow:nan"):
        with pytest.raises(ValueError, match=f"^--fallback={text} must give each share once"):
            parse(text)


def test_a_layer_falls_where_a_share_passes_its_bound(tmp_path):
    fallback = Fallback(tmp_path, {"saturation": 0.1, "underflow": 0.5})
    assert fallback.judge(10, dots(saturation=0.1, underflow=0.5), FORMATS) == []
    unquantized = {**FORMATS, LAYER: {**FORMATS[LAYER], "x": None}}
    assert fallback.judge(10, dots(saturation=0.2), unquantized) == []
    assert not (tmp_path / "fallback.json").exists()
    (reason,) = fallback.judge(20, dots(saturation=0.2), FORMATS)
    assert reason == (
        "blocks/mlp/up falls back to 16 bits at every depth after step 20: saturation of x is 0.2 at depth 1"
    )
    assert json.loads((tmp_path / "fallback.json").read_text()) == {LAYER: 20} == Fallback(tmp_path, {}).layers
    fallback.resume(19)
    assert fallback.layers == {} == Fallback(tmp_path, {}).layers


def test_what_fell_computes_in_16_bits_and_nothing_else_changes(tmp_path):
    phase = resolve("fp8")
    recipes = phase.policy.resolve([LAYER, OTHER, "blocks/attention/qkv", "blocks/attention/out", "head"])
    fallback = Fallback(tmp_path, {"saturation": 0.1})
    assert fallback.narrowed(phase, recipes, 30) is phase
    fallback.judge(20, dots(saturation=0.2), FORMATS)
    assert fallback.narrowed(phase, recipes, 19) is phase
    narrowed = fallback.narrowed(phase, recipes, 20).policy.resolve(recipes)
    assert {layer for layer in recipes if narrowed[layer] != recipes[layer]} == {LAYER}
    assert not narrowed[LAYER].is_quantized and narrowed[LAYER].compute == "bfloat16"


def run(*arguments):
    options.parse(["pretrain", *MICRO, *DATA, *map(str, arguments)])
    return pretrain.main([])


@pytest.fixture(autouse=True, scope="module")
def no_cache():
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_fallback_needs_telemetry_of_tensors(tmp_path, capsys):
    assert run("--fallback=saturation:0.1", f"--workdir={tmp_path / 'run'}") == 1
    assert "pretrain: --fallback=saturation:0.1 looks at tensors: add --telemetry=tensors." in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_falls_back_and_a_resumed_one_too(tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    cache = f"--cache_dir={tmp_path / 'cache'}"
    assert run(*FALLING, cache, f"--workdir={whole}") == 0
    assert "falls back to 16 bits at every depth after step 1: underflow of g" in "".join(capsys.readouterr())
    fallen = json.loads((whole / "fallback.json").read_text())
    # What would fall after the last step has no step to do so in.
    assert fallen and set(fallen.values()) <= {1, 2, 4}
    policy = json.loads((whole / "summary.json").read_text())["policy"]
    assert all(f"{layer}->fwd=none,none/" in policy.replace("\\", "") for layer in fallen)
    told = runs.read_metrics(whole, runs.TELEMETRY)
    earlier = {layer for layer, after in fallen.items() if after < told[-1]["step"]}
    assert earlier and not earlier & told[-1]["formats"].keys() and set(fallen) <= told[0]["formats"].keys()
    assert run(*FALLING, cache, "--stop_after=3", f"--workdir={resumed}") == 0
    # As a run leaves it that was killed between a fall and the next checkpoint.
    (resumed / "fallback.json").write_text(json.dumps({**json.loads((resumed / "fallback.json").read_text()), "x": 5}))
    assert run(*FALLING, cache, "--telemetry_every=3", f"--workdir={resumed}") == 1
    assert "--telemetry_every" in capsys.readouterr().err
    assert run(*FALLING, cache, f"--workdir={resumed}") == 0
    for name in ("fallback.json", "telemetry.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    ends = [json.loads((run / "summary.json").read_text())["eval_loss"] for run in (whole, resumed)]
    np.testing.assert_array_equal(*ends)
