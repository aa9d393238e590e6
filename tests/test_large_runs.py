"""What large runs take: counted, since time depends on the machine; `large_runs.py` measures that."""

import json
import tracemalloc

import large_runs
import pytest

from experiments import figures, load_runs

pytestmark = pytest.mark.slow
LINES = 100_000


def peak(act):
    """The most bytes that Python and NumPy held at once."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [large_runs.write_long_run(folder / str(lines), lines) for lines in (2000, LINES, 2 * LINES)]


@pytest.mark.parametrize(
    "act", [lambda run: figures.draw(str(run), "icml"), load_runs], ids=["experiments.figures", "load_runs"]
)
def test_a_line_of_metrics_takes_few_bytes(act, runs):
    # Eight numbers of eight bytes, and what is computed from some of them. Ten million lines fit in 2 GB.
    # The first call pays for imports and caches.
    _, short, long = (peak(lambda run=run: act(run)) for run in runs)
    assert 64 < (long - short) / LINES < 140


def test_a_long_run_is_drawn_by_as_many_points_as_can_be_seen(runs):
    files, _ = figures.draw(str(runs[-1]), "icml")
    told = json.loads(files["numbers.json"])["plots"]
    curves = [curve for name in ("loss_tokens", "training_loss_tokens", "scalars") for curve in told[name]]
    for curve in curves:
        assert 100 < len(curve["columns"]["tokens"]) <= 2002
    assert {curve["drawn"] for curve in told["training_loss_tokens"]} == {
        "of 200000 points the least and the largest of each stretch of equal length"
    }
    assert len(files["report.html"]) < 3e6
    assert b"Of the 200,000 points of a curve" in files["report.html"]


def test_a_study_of_many_runs_has_all_of_them_and_a_light_report(tmp_path):
    study = large_runs.write_study(tmp_path / "study", seeds=1)
    files, missing = figures.draw(str(study), "icml")
    origin = json.loads(files["provenance.json"])
    assert len(origin["runs"]) == 25
    assert any("Tensors are drawn of 8 arms" in sentence for sentence in missing)
    assert len([name for name in files if name.startswith("amax_") and name.endswith(".svg")]) == 8
    assert len(files["report.html"]) < 30e6
