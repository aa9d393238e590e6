"""The program: the same files from the same runs wherever they lie, what they say of their origin, and its errors."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_study

from experiments import figures
from experiments.loading import read_run

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("bf16", "fp8", "fp8-unscaled")
SEEDS = (1, 2, 3)


def run_program(*arguments, **environment):
    command = [sys.executable, "-W", "error", "-m", "experiments.figures", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return synthetic_study.write(tmp_path_factory.mktemp("a") / "study", arms=ARMS, seeds=SEEDS, telemetry=())


@pytest.fixture(scope="module")
def drawn(study, tmp_path_factory):
    """What the program wrote, in a process of its own."""
    out = tmp_path_factory.mktemp("out")
    done = run_program(f"--runs={study}", f"--out={out}", PYTHONHASHSEED="1")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "No run has telemetry" in done.stdout and done.stdout.endswith(f"all is in {out}\n")
    return out


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(study, drawn, tmp_path):
    """In another process, from another place, from archived runs and over other settings of matplotlib."""
    copy = shutil.copytree(study, tmp_path / "elsewhere")
    for path in copy.rglob("metrics.jsonl"):
        path.with_name("metrics.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "none", "axes.grid": True}):
        contents, _ = figures.draw(str(copy), "icml")
    assert {path.name for path in drawn.iterdir()} == contents.keys()
    for name, content in contents.items():
        assert (drawn / name).read_bytes() == content, name


@pytest.mark.slow
def test_every_figure_comes_in_three_formats(drawn):
    stems = {path.stem for path in drawn.glob("*.svg")}
    assert stems == {
        *("difference_final", "speed_quality", "loss_tokens", "loss_time", "training_loss_tokens"),
        *("difference_tokens", "scalars"),
    }
    assert {path.stem for path in drawn.glob("*.pdf")} == {path.stem for path in drawn.glob("*.png")} == stems
    assert {path.stem for path in drawn.glob("*.tex")} == {"results", "costs"}
    for stem in stems:
        width = int.from_bytes((drawn / f"{stem}.png").read_bytes()[16:20]) / 300
        assert width == pytest.approx(3.25 if stem == "speed_quality" else 6.75, abs=0.01), stem
        svg = (drawn / f"{stem}.svg").read_text()
        assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) / 72 == pytest.approx(width, abs=0.01)


def test_files_tell_no_time_and_no_place(study, drawn):
    for path in drawn.iterdir():
        content = path.read_bytes()
        assert str(study.parent).encode() not in content and str(drawn).encode() not in content, path.name
        assert b"CreationDate" not in content and b"ModDate" not in content and b"<dc:date>" not in content, path.name


def test_fonts_are_embedded(drawn):
    for path in drawn.glob("*.pdf"):
        content = path.read_bytes()
        assert b"/FontFile2" in content and b"/Type3" not in content, path.name
    for path in drawn.glob("*.svg"):
        assert "<text" not in path.read_text(), path.name


def test_origin_is_told(study, drawn):
    told = json.loads((drawn / "provenance.json").read_text())
    assert set(told["drawn_with"]) == {"python", "matplotlib", "numpy", "scipy", "q8jax"}
    runs = {f"{arm}-seed{seed}" for arm in ARMS for seed in SEEDS}
    assert set(told["runs"]) == runs
    fp8 = told["runs"]["fp8-seed2"]
    assert fp8["revision"] == "0123456789abcdef0123456789abcdef01234567" and "jax 0.10.2" in fp8["versions"]
    metrics = study / "runs" / "fp8-seed2" / "metrics.jsonl"
    assert fp8["files"]["metrics.jsonl"] == hashlib.sha256(metrics.read_bytes()).hexdigest()
    assert told["runs"][synthetic_study.DIVERGED]["outcome"] == "diverged"
    outputs = told["outputs"]
    assert {name for output in outputs.values() for name in output["files"]} | {"provenance.json"} == {
        path.name for path in drawn.iterdir()
    }
    assert set(outputs["loss_tokens"]["runs"]) == runs == set(outputs["report"]["runs"])
    # The difference is of pairs, and a run that diverged has none.
    assert set(outputs["difference_tokens"]["runs"]) == runs - {synthetic_study.DIVERGED}
    for name, digest in outputs["loss_tokens"]["files"].items():
        assert hashlib.sha256((drawn / name).read_bytes()).hexdigest() == digest


def test_numbers_are_those_of_the_runs(study, drawn):
    told = json.loads((drawn / "numbers.json").read_text())
    assert told["digits"] == 6
    [fp8] = [group for group in told["plots"]["loss_tokens"] if group["arm"] == "fp8"]
    assert fp8["runs"] == ["fp8-seed1", "fp8-seed2", "fp8-seed3"]
    runs = [read_run(study / "runs" / name).metrics for name in fp8["runs"]]
    losses = np.array([run["eval_loss"][4::5] for run in runs])
    np.testing.assert_allclose(fp8["columns"]["eval_loss"], losses.mean(0), rtol=1e-5)
    assert fp8["columns"]["tokens"] == [step * 16 * 256 for step in range(50, 301, 50)]
    # Student's t of 2 degrees of freedom leaves 2.5 % beyond 4.303 on either side.
    half = 4.30265 * losses.std(0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(np.subtract(fp8["columns"]["high"], fp8["columns"]["eval_loss"]), half, rtol=1e-3)
    rows = told["tables"]["results"]
    assert rows[0][0] == "precision" and [row[0] for row in rows[1:]] == list(ARMS)
    assert rows[2][-1] == ["fp8-seed1", "fp8-seed2", "fp8-seed3"]
    assert "e-17" not in json.dumps(told)


def test_tables_are_latex(drawn):
    text = (drawn / "results.tex").read_text()
    assert r"\toprule" in text and r"\bottomrule" in text and r"difference (\%)" in text
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    assert [line.split(" & ")[0] for line in body] == list(ARMS) and all(line.endswith(r"\\") for line in body)
    assert re.search(r"fp8 & \$1\.\d{4}\$ & \$\+0\.\d{3}\$ & \$\[[+-]0\.\d{3}, \+0\.\d{3}\]\$ & ", body[1])
    assert body[2].endswith(r" & $2$ & $1$ & worse, as it must be \\")


def test_the_report_has_everything(drawn):
    page = (drawn / "report.html").read_text()
    for title in ("Loss against tokens", "Final difference to the baseline", "Speed against quality"):
        assert title.lower() in page.lower()
    assert "No run has telemetry" in page and "strict parity" in page.lower()


def test_files_of_before_are_replaced_and_others_left_alone(study, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def write(name):
        origin = json.dumps({"outputs": {"figure": {"files": {name: "its digest"}}}}).encode()
        monkeypatch.setattr(
            figures, "draw", lambda runs, venue, tensors_of: ({"provenance.json": origin, name: b"figure"}, [])
        )
        figures.write(str(study), out, "icml")

    write("a.svg")
    (out / "notes.txt").write_text("mine")
    write("b.svg")
    assert {path.name for path in out.iterdir()} == {"b.svg", "provenance.json", "notes.txt"}


def test_another_directory_is_not_written_to(study, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(figures.OutError, match="is there already, and not a directory of figures: give another"):
            figures.write(str(study), out, "icml")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_errors_are_one_sentence(tmp_path):
    done = run_program(f"--runs={tmp_path}/none", f"--out={tmp_path}/out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    path = f"{tmp_path}/none"
    assert done.stderr == (
        f"figures: --runs={path}: {path} does not exist: give a directory of runs, or a glob that matches some.\n"
    )
    assert "--venue" in run_program("--runs=x", "--out=y", "--venue=nowhere").stderr


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_sentence(study, tmp_path):
    """It refuses what is written after the first few kilobytes of a file."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "sys.argv[0] = 'figures'; runpy.run_module('experiments.figures', run_name='__main__')"
    )
    command = [sys.executable, "-W", "error", "-c", limited, f"--runs={study}", f"--out={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stderr == f"figures: --out={tmp_path}/out cannot be written (File too large): give another.\n"
