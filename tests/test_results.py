"""The committed results are what the committed runs give: verdicts, tables and numbers exactly, pictures nearly."""

import functools
import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy import ndimage

from experiments import figures, load_runs
from experiments.comparing import results, statistics
from experiments.comparing.tables import verdict
from experiments.training.precision import resolve

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
STUDIES = sorted(path.parent for path in RESULTS.glob("*/study.json"))
DRAWN = [study for study in STUDIES if (study / "figures").exists()]
EACH = pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
EACH_DRAWN = pytest.mark.parametrize("study", DRAWN, ids=lambda path: path.name)
# Root mean squares over a picture, and over that square of so many pixels in which they are largest, white to black
# as 1. Redrawn with the same versions nothing differs; where fonts are rendered by another version, edges of letters
# move by a fraction of a pixel. The pictures of `tiny` differ from themselves moved by a fifth of one by up to 0.0176
# and 0.067. What a reader would miss is much in its square and little in its picture: the end of an interval 0.0033
# and 0.14. Two tests below hold to it.
LARGEST_DIFFERENCES = 0.02, 0.1
SQUARE = 32


def rounded(value):
    """Floats to the digits that do not depend on the version of SciPy."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_there_are_results():
    assert STUDIES


@EACH
def test_the_comparison_is_that_of_the_runs(study):
    stored = json.loads((study / "comparison.json").read_text())
    assert rounded(results.evaluate(study)) == rounded(stored)


# The preset was another recipe when these were run, which results/README.md says where their numbers are.
OF_BEFORE = {"presets/fp8-e3m4-seed40"}


def test_the_precision_of_every_run_means_today_what_was_run():
    found = {}
    for path in sorted(RESULTS.glob("*/runs/*/config.json")):
        config = json.loads(path.read_text())
        means = {"policy": str(resolve(config["precision"], tuple(config["quantize"])).policy), "start": 0}
        found[f"{path.parents[2].name}/{path.parent.name}"] = config["recipes"] == [means]
    assert len(found) > 100 and {name for name, same in found.items() if not same} == OF_BEFORE


@functools.cache
def drawn(study):
    return figures.draw(str(study), "icml")[0]


@pytest.mark.slow
@EACH_DRAWN
def test_numbers_and_tables_are_those_of_the_runs(study):
    files = drawn(study)
    stored = sorted(path for path in (study / "figures").iterdir() if path.suffix in (".json", ".tex"))
    assert "numbers.json" in [path.name for path in stored]
    for path in stored:
        if path.name != figures.PROVENANCE:  # which says with what versions they were drawn
            assert files[path.name].decode() == path.read_text(), path.name


def picture(content):
    """Red, green and blue of a PNG, from 0 to 1."""
    return matplotlib.image.imread(io.BytesIO(content))[..., :3]


def differences(ours, stored):
    """What LARGEST_DIFFERENCES bounds."""
    squares = np.mean((ours - stored) ** 2, axis=-1, dtype=np.float64)
    return np.sqrt(squares.mean()), np.sqrt(ndimage.uniform_filter(squares, SQUARE, mode="constant").max())


def is_same(ours, stored):
    return ours.shape == stored.shape and all(np.less(differences(ours, stored), LARGEST_DIFFERENCES))


@pytest.mark.slow
@EACH_DRAWN
def test_pictures_are_those_of_the_runs(study):
    pictures = sorted((study / "figures").glob("*.png"))
    assert pictures
    for path in pictures:
        assert is_same(picture(drawn(study)[path.name]), picture(path.read_bytes())), path.name


# Places in difference_final.png, as fractions of its height and width.
MARKS = {
    "interval, mean and seeds": ((0.333, 0.375), (0.207, 0.373)),
    "mean": ((0.333, 0.367), (0.279, 0.299)),
    "seeds": ((0.362, 0.374), (0.207, 0.373)),
    "end of the interval": ((0.342, 0.360), (0.250, 0.260)),
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_picture_that_lacks_a_mark_is_not_the_same(mark):
    stored = picture((RESULTS / "tiny" / "figures" / "difference_final.png").read_bytes())
    lacking = stored.copy()
    rows, columns = (slice(*(round(size * end) for end in ends)) for size, ends in zip(stored.shape, MARKS[mark]))
    assert lacking[rows, columns].min() < 0.5  # there is one
    lacking[rows, columns] = 1
    assert not is_same(lacking, stored) and is_same(stored, stored)


def test_a_picture_that_moved_by_a_fifth_of_a_pixel_is_the_same():
    for path in sorted((RESULTS / "tiny" / "figures").glob("*.png")):
        stored = picture(path.read_bytes())
        assert is_same(0.8 * stored + 0.2 * np.roll(stored, 1, axis=1), stored), path.name


@EACH
def test_an_archive_is_small_and_names_no_place(study):
    files = [path for path in study.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6
    assert not [path for path in files if "checkpoints" in path.parts or path.name == ".lock"]
    for path in files:
        if path.suffix in (".json", ".jsonl"):
            assert not {"/root", "/home", "/tmp", "/work"} & {f"/{part}" for part in path.read_text().split("/")[1:]}


def signed(value):
    return "" if value is None else f"{value:+.3f}"


def row(name, entry):
    """A precision in the tables of Markdown."""
    interval = " to ".join(map(signed, entry["ci95"] or ()))
    numbers = signed(entry["delta_percent"]), interval, signed(entry["upper95"])
    # Each beside the baseline's mean over the same seeds, of which a study may have more.
    reference = "" if entry["delta_nats"] is None else f"{entry['loss'] - entry['delta_nats']:.4f}"
    return [f"`{name}`", f"{entry['loss']:.4f}", reference, *numbers, str(entry["seeds"]), verdict(entry)]


@pytest.mark.parametrize(
    ("document", "heading", "study"),
    [
        (ROOT / "README.md", "What 8 bits cost", "tiny"),
        (RESULTS / "README.md", "tiny", "tiny"),
        (RESULTS / "README.md", "recipes", "recipes"),
        (RESULTS / "README.md", "presets", "presets"),
        (RESULTS / "README.md", "ablation", "ablation"),
    ],
)
def test_tables_of_the_documents_are_those_of_the_studies(document, heading, study):
    section = document.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    found = results.evaluate(RESULTS / study)["precisions"]
    assert rows[2:] == [row(name, entry) for name, entry in found.items()]


def test_the_table_of_speed_is_that_of_its_runs():
    section = (RESULTS / "README.md").read_text().split("\n## speed\n")[1].split("\n## ")[0]
    found = results.evaluate(RESULTS / "speed")["precisions"]
    rows = []
    for name, entry in found.items():
        assert entry["timing_valid"] and entry["reached_baseline"] == entry["paired"] == 2
        speeds = " and ".join(f"{run['tokens_per_second']:,.0f}" for run in entry["runs"].values())
        tokens, memory = entry["tokens_to_baseline"] / 1e6, entry["peak_memory_bytes"] / 1e9
        rows.append(f"| `{name}` | {speeds} | {tokens:.2f} | {entry['seconds_to_baseline']:.0f} | {memory:.2f} |")
    assert re.findall(r"^\| `.*\|$", section, re.M) == rows
    attempts = [json.loads(line) for line in (RESULTS / "speed" / "attempts.jsonl").read_text().splitlines()]
    assert max(attempt["others"] for attempt in attempts) == 0.005 and "at most\n0.5 % meanwhile" in section


def test_the_table_of_averaging_is_that_of_its_runs():
    runs = load_runs(str(RESULTS / "averaging" / "runs"), per="run").set_index(["precision", "seed"])
    section = (RESULTS / "README.md").read_text().split("\n## averaging\n")[1].split("\n## ")[0]
    rows = []
    for name in ("eval_loss", "eval_loss_average"):
        bf16, fp8 = (runs[name].astype(float)[precision].sort_index() for precision in ("bf16", "fp8"))
        percent = 100 * (fp8 / bf16 - 1)
        rows.append(f"| `{name}` | {bf16.mean():.4f} | {percent.mean():+.3f} | {percent.std():.3f} | {len(percent)} |")
    assert re.findall(r"^\| `.*\|$", section, re.M) == rows


def ratios(level):
    """By the first column of a benchmark's table the cells that are ratios, without what a reference has."""
    table = (RESULTS / "speed" / level / "benchmark.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \w.*\|$", table, re.M)]
    ratio = re.compile(r"[\d.]+ \([\d.]+ to [\d.]+\)")
    return {
        row[0]: [cell.removesuffix(" (1.00 to 1.00)") for cell in row if ratio.fullmatch(cell)] for row in cells[1:]
    }


def test_the_tables_of_the_readme_are_those_of_the_benchmarks():
    readme = (ROOT / "README.md").read_text()
    for name, (own, flax) in ratios("layer").items():
        assert f"| {name} | {own} | {flax} |\n" in readme
    medians = {name: [float(cell.split()[0]) for cell in cells] for name, cells in ratios("scaling").items()}
    bf16, fp8 = zip(*(found for mesh, found in medians.items() if mesh != "data:1"), strict=True)
    assert f"between {min(bf16)} and {max(bf16)} in BF16 and between {min(fp8)} and {max(fp8)} in FP8" in readme


def test_the_table_of_the_search_is_that_of_its_runs():
    loss = {
        path.parent.name: json.loads(path.read_text())["eval_loss"] for path in RESULTS.glob("search/*/summary.json")
    }
    table = (RESULTS / "README.md").read_text()
    rows = re.findall(r"^\| `(p[12]-\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", table, re.MULTILINE)
    assert len(rows) == 10
    for name, *cells in rows:
        for seed, cell in zip((100, 101), cells, strict=True):
            if f"{name}-{seed}" in loss:
                reference = loss[f"{name[:2]}-bf16-{seed}"]
                assert cell.strip() == f"{100 * (loss[f'{name}-{seed}'] / reference - 1):+.2f} %", name
            else:
                assert not cell.strip()


def test_what_is_said_of_clipping_in_the_ablation_is_what_its_telemetry_saw():
    found = load_runs(str(RESULTS / "ablation" / "runs"), per="telemetry")
    found = found[(found["precision"] != "bf16") & (found["step"] > 1)]
    numbers = found[["saturation", "staleness", "underflow", "sqnr"]].astype(float)
    of = numbers.groupby([found["precision"], found["tensor"]])
    clipped = of["saturation"].max().groupby("precision").max()
    assert clipped.pop("fp8-hybrid/history=1/margin=0") == pytest.approx(4e-5, rel=0.1)
    assert 0 < clipped.pop("fp8-hybrid/history=16/margin=0") < 5e-6 and not clipped.any() and len(clipped) == 8
    assert of["staleness"].max()["fp8-hybrid/history=1/margin=0"].max() == pytest.approx(1.9, abs=0.05)
    assert numbers["underflow"].groupby(found["precision"]).mean().max() < 1e-3
    medians = of["sqnr"].median().unstack()
    assert (medians.max() - medians.min()).max() < 0.2


def test_what_is_said_of_one_recipe_against_another_is_what_their_runs_gave():
    found = results.evaluate(RESULTS / "recipes")["precisions"]
    loss = {name: {seed: run["loss"] for seed, run in entry["runs"].items()} for name, entry in found.items()}

    def against(arm, other):
        percent = np.array([100 * (loss[arm][seed] / loss[other][seed] - 1) for seed in loss[arm]])
        low, high = statistics.t_interval(percent, 0.95)
        p = 2 * min(statistics.p_noninferior(percent, 0.0), 1 - statistics.p_noninferior(percent, 0.0))
        return -percent.mean(), -high, -low, p, len(percent)

    mean, low, high, p, pairs = against("fp8", "fp8-hybrid")
    said = f"by {mean:.3f} % ({low:.3f} to {high:.3f}, p {p:.3f} two-sided, of the {pairs} pairs of the two)"
    mean, low, high, *_ = against("fp8-e3m4", "fp8")
    document = " ".join((RESULTS / "README.md").read_text().split())
    assert said in document and f"({mean:.3f} %, {low:.3f} to {high:.3f})" in document
