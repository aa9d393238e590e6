"""Scores against hand, a chunk counter and formulas of their own; intervals against what they promise."""

import json
import math
import sys
import warnings

import numpy as np
import pytest

from experiments.plots import class_scores
from experiments.plots.drawing import style
from experiments.plots.style import VENUES
from experiments.scoring import (
    entity_scores,
    label_scores,
    mean,
    passage_scores,
    perplexity,
    share,
)
from experiments.scoring.passages import exact_match, word_f1
from experiments.tasks import Answer, Questions

CLASSES = ("a", "b", "c", "d", "e")
#            a     b     c    d: only predicted, e: nowhere
TRUE = np.array([0, 0, 0, 0, 1, 1, 2, 0])
OURS = np.array([0, 0, 1, 3, 1, 0, 1, 0])


def test_scores_by_hand():
    scores = label_scores(TRUE, OURS, CLASSES, "texts")
    a, b, c, d, e = scores.classes
    assert (a.precision, a.recall, a.f1, a.support, a.predicted) == (3 / 4, 3 / 5, pytest.approx(2 / 3), 5, 4)
    assert (b.precision, b.recall, b.f1, b.support) == (1 / 3, 1 / 2, pytest.approx(2 / 5), 2)
    assert (c.precision, c.recall, c.f1, c.support) == (None, 0, 0, 1)  # never predicted
    assert (d.precision, d.recall, d.f1, d.support) == (0, None, 0, 0)  # no support
    assert (e.precision, e.recall, e.f1, e.support) == (None, None, None, 0)  # neither
    micro, macro, weighted = scores.averages
    assert micro.precision == micro.recall == micro.f1 == scores.accuracy.value == 4 / 8
    assert macro.f1 == pytest.approx((2 / 3 + 2 / 5 + 0 + 0) / 4) and macro.recall == pytest.approx((3 / 5 + 1 / 2) / 4)
    assert weighted.f1 == pytest.approx((5 * 2 / 3 + 2 * 2 / 5) / 8)
    assert weighted.precision == pytest.approx((5 * 3 / 4 + 2 / 3) / 8) and weighted.support == 8
    assert scores.average("macro") is macro


def test_scores_are_text_and_json():
    scores = label_scores(TRUE, OURS, CLASSES, "texts")
    lines = scores.text().splitlines()
    assert lines[0].split() == ["texts", "precision", "recall", "F1", "support"]
    assert lines[2].split() == ["a", "0.7500", "0.6000", "0.6667", "5"]
    assert lines[5].split() == ["d", "0.0000", "–", "0.0000", "0"] and lines[6].split() == ["e", "–", "–", "–", "0"]
    assert lines[-2].split() == ["accuracy", "0.5000", "8"] and "0.2152 to 0.7848" in lines[-1]
    stored = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert stored["classes"][4] == {
        **dict.fromkeys(("precision", "recall", "f1")),
        "name": "e",
        "support": 0,
        "predicted": 0,
    }
    assert stored["averages"][1]["name"] == "macro" and stored["accuracy"]["count"] == 8


def test_scores_need_as_many_predictions_as_labels():
    with pytest.raises(ValueError, match=r"not \(3,\) for \(8,\)"):
        label_scores(TRUE, OURS[:3], CLASSES, "texts")
    with pytest.raises(ValueError, match="and some"):
        label_scores(TRUE[:0], OURS[:0], CLASSES, "texts")


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("seqeval.metrics", "seqeval")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"Scores need {package}, run pip install 'q8jax\[finetune\]'"):
        if package == "seqeval":
            entity_scores([["O"]], [["O"]])
        else:
            label_scores(TRUE, OURS, CLASSES, "texts")


def chunks(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities of one sentence: (first, last, type), as conlleval takes them."""
    found, start, kind = set(), None, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        goes_on = start is not None and this == kind and prefix in ("I", "E") and tags[i - 1][0] in ("B", "I")
        if start is not None and not goes_on:
            found.add((start, i - 1, kind))
            start = None
        if prefix != "O" and start is None:
            start, kind = i, this
    return found


@pytest.mark.parametrize("letters", ["BI", "BIES"])
def test_entities_are_those_of_a_counter_of_chunks(letters):
    rng = np.random.default_rng(0)
    names = ["O", "O", *(f"{letter}-{kind}" for letter in letters for kind in ("LOC", "PER", "X-Y"))]
    true = [[names[i] for i in rng.integers(0, len(names), rng.integers(1, 12))] for _ in range(150)]
    # Half of them right, most of those others.
    ours = [[tag if rng.random() < 0.7 else names[rng.integers(0, len(names))] for tag in tags] for tags in true]
    scores = entity_scores(true, ours)
    sets = [{(i, *chunk) for i, tags in enumerate(side) for chunk in chunks(tags)} for side in (true, ours)]
    f1s, supports = [], []
    for row in scores.classes:
        mine = [{chunk for chunk in side if chunk[-1] == row.name} for side in sets]
        right = len(mine[0] & mine[1])
        assert (row.support, row.predicted) == tuple(map(len, mine)) and 10 < right < len(mine[0])
        assert row.precision == pytest.approx(right / len(mine[1])) and row.recall == pytest.approx(
            right / len(mine[0])
        )
        f1s.append(2 * right / (len(mine[0]) + len(mine[1])))
        supports.append(row.support)
    right = len(sets[0] & sets[1])
    assert [row.name for row in scores.classes] == ["LOC", "PER", "X-Y"]
    assert scores.average("micro").f1 == pytest.approx(2 * right / (len(sets[0]) + len(sets[1])))
    assert scores.average("macro").f1 == pytest.approx(np.mean(f1s))
    assert scores.average("weighted").f1 == pytest.approx(np.average(f1s, weights=supports))
    assert scores.average("micro").support == len(sets[0]) and scores.accuracy is None


def test_entities_may_be_missing_on_either_side():
    none, some = [["O", "O"], ["O"]], [["B-X", "I-X"], ["O"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing, missed, invented = entity_scores(none, none), entity_scores(some, none), entity_scores(none, some)
    assert nothing.classes == () and nothing.average("macro").f1 is None and "micro" in nothing.text()
    assert [(row.precision, row.recall, row.f1) for row in missed.classes + missed.averages] == [(None, 0, 0)] * 4
    assert [(row.precision, row.recall, row.f1) for row in invented.classes + invented.averages] == [(0, None, 0)] * 4
    with pytest.raises(ValueError, match="as many predicted tags as there are words"):
        entity_scores(some, [["O"], ["O"]])


@pytest.mark.parametrize(
    ("ours", "right", "exact", "f1"),
    [
        ("The cat!", "a  CAT", 1, 1),
        ("the black cat sat", "black cat", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # "the" counts for nothing
        ("cat cat dog", "cat", 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("theatre", "the theatre", 1, 1),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
    ],
)
def test_passages_agree_as_squad_defines_it(ours, right, exact, f1):
    assert exact_match(ours, right) == exact
    assert word_f1(ours, right) == pytest.approx(f1)


def test_passages_are_compared_with_the_best_of_several():
    answers = ((Answer(0, "red"), Answer(0, "red car")), (), (), (Answer(0, "x"),))
    examples = Questions(tuple("1234"), tuple("abcd"), ("red car x",) * 4, answers)
    scores = passage_scores(examples, ["car red", "", "x", "y"])
    assert (scores.exact.value, scores.f1.value) == (1 / 4, 2 / 4)
    assert {name: (exact.value, f1.value) for name, (exact, f1) in scores.by_kind.items()} == {
        "answered": (0, 1 / 2),
        "unanswerable": (1 / 2, 1 / 2),
    }
    assert json.loads(json.dumps(scores.as_dict(), allow_nan=False))["exact"]["count"] == 4
    assert [line.split()[0] for line in scores.text().splitlines()] == ["questions", "all", "answered", "unanswerable"]


def test_wilson_interval_is_that_of_its_formula():
    z = 1.959963984540054
    for hits, count in ((0, 10), (5, 8), (970, 1000), (7, 7)):
        found = share(hits, count)
        p = hits / count
        middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
        scale = 1 + z * z / count
        assert found.value == p
        assert (found.low, found.high) == pytest.approx(((middle - half) / scale, (middle + half) / scale), abs=1e-9)
    with pytest.raises(ValueError, match="A share of nothing"):
        share(0, 0)


def test_perplexity_is_of_pieces_and_its_interval_of_texts():
    rng = np.random.default_rng(0)
    pieces = rng.integers(5, 50, 4000)
    rates = rng.gamma(4.0, 0.5, 4000)
    whole = perplexity(rates * pieces, pieces)
    assert whole.value == pytest.approx(math.exp((rates * pieces).sum() / pieces.sum())) and whole.count == 4000
    # Of samples of 40 texts about 95 in 100 intervals hold the value of all.
    covered = 0
    for i in range(100):
        part = slice(40 * i, 40 * i + 40)
        found = perplexity(rates[part] * pieces[part], pieces[part])
        covered += found.low <= whole.value <= found.high
    assert 88 <= covered <= 99
    # The jackknife finds the spread of the mean loss without a formula for it.
    nats, counts = (rates * pieces)[:300], pieces[:300]
    without = (nats.sum() - nats) / (counts.sum() - counts)
    spread = math.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    found = perplexity(nats, counts)
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.96793 * spread, rel=0.01)
    # Texts of one length are a mean, whose interval is Student's.
    logs = np.array([1.0, 2.0, 4.0])
    found, half = perplexity(logs * 10, np.full(3, 10)), 4.302652729911275 * logs.std(ddof=1) / math.sqrt(3)
    assert math.log(found.low) == pytest.approx(logs.mean() - half)
    assert math.log(found.high) == pytest.approx(logs.mean() + half)
    assert mean(logs / 4).high == 1.0 and mean(logs / 10).low == pytest.approx(max(0, (logs.mean() - half) / 10))
    single = perplexity(np.array([3.0]), np.array([3]))
    assert single.low == single.value == single.high == pytest.approx(math.e)
    with pytest.raises(ValueError, match="the loss of 1 texts is not finite"):
        perplexity(np.array([1.0, np.nan]), np.array([1, 1]))
    with pytest.raises(ValueError, match="needs texts"):
        perplexity(np.zeros(0), np.zeros(0))


def test_figure_shows_f1_of_every_class_and_arm():
    scores = {name: label_scores(TRUE, ours, CLASSES, "texts") for name, ours in (("fp32", OURS), ("int8", TRUE))}
    with style(VENUES["icml"]):
        drawing = class_scores.draw(scores, {"fp32": "run-a", "int8": "run-b"}, VENUES["icml"])
        axes = drawing.figure.axes[0]
        marks = [line.get_xdata() for line in axes.lines if line.get_label() in scores]
        plot, files = drawing.saved()
    np.testing.assert_allclose(marks[0], [2 / 3, 2 / 5, 0, 0, *(row.f1 for row in scores["fp32"].averages)])
    np.testing.assert_allclose(marks[1], np.ones(6))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["a (5)", "b (2)", "c (1)", "d (no support)", "e (no support)", "micro", "macro", "weighted"]
    assert set(files) == {"pdf", "svg", "png"} and plot.runs == ("run-a", "run-b")
    assert plot.numbers[4] == {"arm": "fp32", "run": "run-a", "class": "e", "f1": None, "support": 0}
