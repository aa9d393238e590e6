"""What each recipe would do to each layer of a trained model."""

import fcntl
import json
import math
import shutil

import jax
import pytest
from micro import quick_compiles  # noqa: F401

from experiments import options, pretrain, whatif

whatif.define_flags()
MICRO = ("--layers=2", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--eval_batches=1")
DATA = ("--data=markov:order=1,vocab=16,tokens=5000", "--steps=2", "--mesh=data:1")
LAYERS = {f"blocks/{name}" for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whatif") / "bf16-run"
    options.parse(
        ["pretrain", *MICRO, *DATA, "--precision=bf16", f"--workdir={workdir}", f"--cache_dir={workdir}-cache"]
    )
    assert pretrain.main([]) == 0
    yield workdir
    jax.config.update("jax_compilation_cache_dir", None)


def ask(*arguments):
    for name in ("recipes", "batch", "batches", "out"):
        options.FLAGS[name].unparse()
    options.parse(["whatif", *map(str, arguments)])
    return whatif.main([])


@pytest.mark.slow
def test_layers_are_ranked_by_the_worst_of_their_products(trained, tmp_path, capsys):
    out = tmp_path / "new" / "whatif.json"
    assert ask(f"--config={trained / 'config.json'}", "--recipes=fp8,int8", f"--out={out}") == 0
    found = json.loads(out.read_text())
    assert (found["run"], found["checkpoint"]) == ("bf16-run", 2)
    rows = found["rows"]
    assert {(row["layer"], row["depth"], row["recipe"]) for row in rows} == {
        (layer, depth, recipe) for layer in LAYERS for depth in (0, 1) for recipe in ("fp8", "int8")
    }
    errors = [row["error"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    for row in rows:
        assert row["error"] == max(row["fwd"], row["dlhs"], row["drhs"])
        if row["recipe"] == "fp8":  # three bits of mantissa
            assert 0.01 < row["fwd"] < 0.06 and 0.01 < row["drhs"] < 0.06 and abs(row["loss_change"]) < 0.01
    fwd = {(row["recipe"], row["layer"], row["depth"]): row["fwd"] for row in rows}
    assert all(fwd["int8", *place] < 0.6 * fwd["fp8", *place] for _, *place in fwd if len(place) == 2)
    shown = capsys.readouterr().out
    assert f"{rows[0]['recipe']} costs {rows[0]['layer']} most, at depth {rows[0]['depth']}:" in shown
    assert (trained / "checkpoints" / "2").exists() and len(json.loads((trained / "env.json").read_text())) == 1


@pytest.mark.slow
def test_the_noise_of_the_gradient_is_told_of_all_layers_and_of_each(trained, tmp_path, capsys):
    out = tmp_path / "whatif.json"
    assert ask(f"--config={trained / 'config.json'}", "--recipes=fp8,int8", "--batches=4", f"--out={out}") == 0
    noise = json.loads(out.read_text())["noise"]
    assert noise["batches"] == 4 and noise["scale"] > 0
    found = {(row["recipe"], row["in"]): row for row in noise["rows"]}
    assert set(found) == {(recipe, layers) for recipe in ("fp8", "int8") for layers in ("all", *LAYERS)}
    for recipe, layers in found:
        row = found[recipe, layers]
        assert 0 < row["noise"] < found[recipe, "all"]["noise"] * (1.5 if layers != "all" else 1.01)
        assert row["noise_error"] > 0 and row["loss_change_error"] > 0
    assert 2 * found["int8", "all"]["noise"] < found["fp8", "all"]["noise"] < 0.2
    shown = capsys.readouterr().out
    assert "times the square of its mean, over 4 batches.\n" in shown
    assert f"{100 * found['fp8', 'all']['noise']:.3f} ± " in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--config= is needed"),
        (("--config={config}", "--recipes=bf16"), "--recipes=bf16 quantizes nothing"),
        (("--config={config}", "--recipes=int8,fp9"), "--recipes=fp9: Unknown precision 'fp9'"),
        (("--config={config}", "--recipes=fp8-block"), "--recipes=fp8-block: Layer "),
        (("--config={config}", "--recipes="), "--recipes= names nothing to try"),
        (("--config={config}", "--workdir=elsewhere"), "--workdir is that of --config"),
        (("--config={config}", "--batches=1"), "--batches=1 shows no noise"),
        (("--config={folder}/config.json",), "does not exist"),
        (("--config={config}", "--recipes=fp8", "--out={config}/x.json"), "cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(trained, tmp_path, capsys, arguments, sentence):
    places = {"config": trained / "config.json", "folder": tmp_path}
    assert ask(*(argument.format(**places) for argument in arguments)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("whatif: ") and sentence in shown and shown.count("\n") == 1


def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text((trained / "config.json").read_text())
    assert ask(f"--config={copy / 'config.json'}") == 1
    assert "is of a run without a checkpoint" in capsys.readouterr().err
    assert [path.name for path in copy.iterdir()] == ["config.json"]


def everything(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.slow
def test_a_look_changes_nothing_of_a_run(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for name in ("summary.json", ".lock"):
        (copy / name).unlink()
    (copy / "checkpoints" / "3.partial").mkdir()
    before = everything(copy)
    assert ask(f"--config={copy / 'config.json'}", "--recipes=fp8/margin=1", "--log_every=7") == 0
    assert everything(copy) == before


def test_a_run_that_is_being_written_is_refused(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    with (copy / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ask(f"--config={copy / 'config.json'}") == 1
    assert capsys.readouterr().err.endswith("wait for it to end or give the --config of a copy of it\n")


def test_what_is_not_known_ranks_first():
    damage = lambda *errors: whatif.Damage("layer", 0, "fp8", *errors, 0.0)
    assert damage(0.1, 0.3, 0.2).error == 0.3
    assert damage(0.1, math.nan, 0.2).error == math.inf


@pytest.mark.slow
def test_a_run_in_which_layers_fell_back_can_be_asked(tmp_path, capsys):
    falling = ("--precision=fp8-unscaled", "--telemetry=tensors", "--fallback=underflow:0.02")
    places = (f"--workdir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}")
    options.parse(["pretrain", *MICRO, *DATA, *falling, *places])
    assert pretrain.main([]) == 0 and json.loads((tmp_path / "run/fallback.json").read_text())
    assert ask(f"--config={tmp_path / 'run/config.json'}", "--recipes=fp8") == 0
    assert "fp8 costs blocks/" in capsys.readouterr().out
