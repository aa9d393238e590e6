"""The program experiments.benchmark: its flags, and what it writes; how fast anything is, is not tested."""

import json

import pytest

from experiments import benchmark, options, pretrain  # noqa: F401  (pretrain defines the flags that benchmark shares)
from experiments.benchmarks.results import Measurement, Program, Results, Roofs
from experiments.benchmarks.tables import markdown
from q8jax.report import NATIVE

FLAGS = options.FLAGS
OWN = {"level", "rounds", "out"}.union(*benchmark._OF_LEVEL.values()) - {"layers"}
TINY = ("--rounds=2", "--tokens=32", "--width=16", "--hidden=32")


@pytest.fixture(scope="module", autouse=True)
def flags_of_the_program():
    """Other programs of this process have flags of the same names."""
    others = {name: FLAGS[name] for name in OWN if name in FLAGS}
    for name in others:
        delattr(FLAGS, name)
    benchmark.define_flags()
    yield
    for name in OWN:
        delattr(FLAGS, name)
    for name, flag in others.items():
        FLAGS[name] = flag


def run(*arguments):
    for name in OWN:
        FLAGS[name].unparse()
    options.parse(["benchmark.py", *arguments])
    return benchmark.main([])


def rows(text, corner):
    """The cells of the table with this corner, by row and column."""
    lines = iter(text.splitlines())
    heads = next([cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {corner} |"))
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        found[name] = dict(zip(heads, cells, strict=True))
    return found


def made_up(names, product, rounds):
    """What gemms.measure returns, without the minutes that it takes."""
    program = Program({"FP8": 3}, {"x": 3}, NATIVE, {"FP8": 1e9}, 10**6, 3)
    seconds = {name: [1.0 / (i + 1)] * rounds for i, name in enumerate(names)}
    programs = dict.fromkeys(names, program)
    return Measurement(product.name, product.sizes, product.flops, "flax bf16", programs, seconds=seconds)


def test_the_gemm_level_measures_the_layer_and_a_sweep_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.gemms, "measure", made_up)
    monkeypatch.setattr(benchmark.roofline, "roofs_of", lambda device: Roofs({"BF16": 1e12}, 1e9, "made up"))
    out = tmp_path / "results" / "here"
    assert run("--level=gemm", "--rounds=2", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"benchmark.json", "benchmark.md", "roofline.png", "roofline.svg"}
    assert (out / "benchmark.md").read_text() == printed
    text = (out / "benchmark.json").read_text()
    results = Results.from_json(text)
    assert markdown(results) == printed and results.to_json() == text
    assert set(results.environment) >= {"command", "devices", "versions"}
    assert not {"git", "argv"} & set(results.environment)

    # Of a device that is not known: an eighth of Transformer Engine's width and less, and it says so.
    assert [(m.work, *m.sizes.values()) for m in results.measurements] == [
        ("QKV", 512, 256, 768),
        ("output", 512, 256, 256),
        ("FC1", 512, 256, 1024),
        ("FC2", 512, 1024, 256),
    ]
    assert sum(m.flops for m in results.measurements) == 6 * 512 * 256 * 12 * 256
    assert "small sizes, because cpu is no known accelerator" in printed and "--width=4096" in printed
    assert [m.work for m in results.sweep] == ["128", "256", "512", "1024"]
    assert {"flax bf16", "q8jax fp8", "q8jax fp8-row", "q8jax int8", "pre-quantized fp8"} <= set(
        rows(printed, "GEMMs of")
    )
    assert rows(printed, "products of")["q8jax bf16"]["pays from"] == "128"


def test_sizes_and_contenders_are_chosen_by_flags(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.gemms, "measure", made_up)
    assert run("--level=gemm", "--rounds=2", "--tokens=8", "--sizes=", "--contenders=flax fp8,q8jax fp32") == 0
    printed = capsys.readouterr().out
    assert list(rows(printed, "GEMMs of")) == ["flax bf16", "flax fp8", "q8jax fp32"]
    assert "on 8 tokens: QKV 256 → 768;" in printed and "products of" not in printed and "small" not in printed
    assert run("--level=gemm", "--rounds=2", "--sizes=64,8", "--contenders=flax fp8") == 0
    assert list(rows(capsys.readouterr().out, "products of")["flax fp8"]) == ["8", "64", "pays from"]


@pytest.mark.slow
def test_the_gemm_level_reports_who_cannot_run(tmp_path, capsys):
    arguments = "--contenders=q8jax fp8-block,pre-quantized int8", "--sizes=16,128", f"--out={tmp_path}"
    assert run("--level=gemm", *TINY, *arguments) == 0
    printed = capsys.readouterr().out
    # A tile of 128 does not divide a layer so small, which is said, and the others go on.
    assert set(rows(printed, "GEMMs of")) == {"flax bf16", "pre-quantized int8"}
    assert "- q8jax fp8-block does not run (QKV): ValueError: tile128 of lhs in fwd does not divide" in printed
    sweep = rows(printed, "products of")
    assert sweep["q8jax fp8-block"]["16"] == "–" and float(sweep["q8jax fp8-block"]["128"]) > 0
    assert Results.from_json((tmp_path / "benchmark.json").read_text()).roofs.source.startswith("measured")


@pytest.mark.slow
def test_the_layer_level_times_or_counts(capsys):
    arguments = (*TINY, "--layers=1", "--contenders=q8jax bf16,q8jax int8")
    assert run(*arguments) == 0
    timed = rows(capsys.readouterr().out, "step of")
    ratios = [column for column in timed["flax bf16"] if "ratio" in column]
    assert ratios == [f"ratio to {of}, median (quartiles)" for of in ("q8jax bf16", "flax bf16")]
    assert list(timed) == ["flax bf16", "q8jax bf16", "q8jax int8"] and all(
        float(row["last loss"]) > 0 for row in timed.values()
    )
    assert run(*arguments[1:], "--target=cpu") == 0
    counted = rows(capsys.readouterr().out, "step of")
    assert list(counted) == list(timed) and counted["flax bf16"]["ratio"] == "1.00"
    assert all(sum(int(part.split()[0]) for part in row["products"].split(", ")) == 5 for row in counted.values())


@pytest.mark.slow
def test_the_step_level_compares_precisions(tmp_path, capsys):
    step = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--mesh=data:1")
    out = tmp_path / "out"
    assert run("--level=step", *step, "--rounds=2", "--precisions=bf16,fp8", "--remat", f"--out={out}") == 0
    table = rows(capsys.readouterr().out, "step in")
    assert list(table) == ["bf16", "fp8"] and table["bf16"]["ratio to bf16, median (quartiles)"].startswith("1.00")
    (found,) = json.loads((out / "benchmark.json").read_text())["measurements"]
    assert found["flops"] == 12_189_696 and (out / "roofline.svg").exists()


def test_the_scaling_level_shows_each_precision_against_one_device(monkeypatch, capsys):
    def measured(precision, axes, rounds, vocab):
        meshes = benchmark.scaling.meshes(axes, 8)[: 5 if precision == "fp8" else None]
        programs = dict.fromkeys(meshes, Program({"FP8": 3}, {"x": 3}, NATIVE, {"FP8": 1e9}, 10**6, 3, None, 10**7))
        seconds = {mesh: [0.1 * (i + 1)] * rounds for i, mesh in enumerate(meshes)}
        failures = dict.fromkeys(benchmark.scaling.meshes(axes, 8)[len(meshes) :], "ValueError: made up")
        return Measurement(precision, {"tokens": 64}, 1e9, "data:1", programs, failures, seconds, devices=8)

    monkeypatch.setattr(benchmark.scaling, "measure", measured)
    assert run("--level=scaling", "--rounds=3", "--precisions=bf16,fp8", "--axes=data,fsdp") == 0
    printed = capsys.readouterr().out
    table = rows(printed, "step on")
    assert list(table) == ["data:1", "data:2", "data:4", "data:8", "fsdp:2", "fsdp:4", "fsdp:8"]
    assert table["data:8"]["bf16: ratio to data:1, median (quartiles)"] == "4.00 (4.00 to 4.00)"
    assert table["fsdp:2"]["fp8: ms, median"] == "500" and table["fsdp:4"]["fp8: ms, median"] == "–"
    assert "- fsdp:8 does not run (fp8): ValueError: made up" in printed and "what partitioning costs" in printed


@pytest.mark.slow
def test_the_scaling_level_gives_every_mesh_the_same_batch(tmp_path, capsys):
    step = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8")
    arguments = ("--rounds=2", "--precisions=fp8", "--axes=tensor", f"--out={tmp_path / 'out'}")
    assert run("--level=scaling", *step, *arguments) == 0
    printed = capsys.readouterr().out
    table = rows(printed, "step on")
    assert list(table) == ["data:1", "tensor:2"]
    assert "- tensor:4 does not run (fp8): ValueError: --precision=fp8: --mesh=tensor:4" in printed
    alone, split = (float(table[mesh]["fp8: GB of memory"]) for mesh in ("data:1", "tensor:2"))
    assert 0.4 < split / alone < 0.8
    (found,) = json.loads((tmp_path / "out" / "benchmark.json").read_text())["measurements"]
    assert found["sizes"]["batch"] == 8 and found["flops"] == 12_189_696


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level=scaling", "--axes=dat"], "Unknown --axes 'dat' (did you mean 'data'?): choose one of data, fsdp,"),
        (["--level=scaling", "--mesh=data:2"], "--mesh has no effect at --level=scaling"),
        (["--contenders=flax fp9"], "--contenders=flax fp9 is none at --level=layer: choose of flax fp32, flax bf16,"),
        (["--contenders=pre-quantized fp8"], "--contenders=pre-quantized fp8 is none at --level=layer"),
        (["--level=gemm", "--target=h100"], "--target has no effect at --level=gemm: leave it out."),
        (["--level=gemm", "--layers=2"], "--layers has no effect at --level=gemm"),
        (["--d_model=64"], "--d_model has no effect at --level=layer"),
        (["--level=step", "--sizes=64"], "--sizes has no effect at --level=step"),
        (["--level=step", "--precision=fp8"], "--precision is one: give --precisions"),
        (["--level=step", "--precisions=bf16,fp9"], "--precision=fp9: Unknown precision 'fp9'"),
        (["--level=step", "--precisions="], "--precisions names none"),
        (["--level=gemm", "--sizes=64,-1"], "--sizes=64,-1 must be whole numbers above 0"),
        (["--target=h1000"], "--target=h1000 must be local"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"benchmark: {message}") and error.count("\n") == 1


def test_one_device_alone_does_not_scale():
    with pytest.raises(ValueError, match=r"needs several devices: on a CPU set XLA_FLAGS=--xla_force_host_platform"):
        benchmark.scaling.meshes(["data"], 1)
    assert benchmark.scaling.meshes(["tensor"], 7) == ["data:1", "tensor:2", "tensor:4"]


def test_results_never_overwrite_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.layers, "measure", lambda *_: pytest.fail("measured before --out was looked at"))
    (tmp_path / "benchmark.md").touch()
    assert run(f"--out={tmp_path}") == 1
    assert "is there already and not an empty folder: give another." in capsys.readouterr().err
    assert run(f"--out={tmp_path / 'benchmark.md'}") == 1
    monkeypatch.setattr(benchmark.roofline.importlib.util, "find_spec", lambda name: None)
    assert run(f"--out={tmp_path / 'new'}") == 1
    assert "pip install 'q8jax[figures]'" in capsys.readouterr().err


def test_a_flag_that_does_not_parse_names_the_program(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--level=gem")
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("benchmark: flag --level=gem")
