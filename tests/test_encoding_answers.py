"""Questions as pieces of their contexts and back: against the library, every place of an answer, and brute force."""

import itertools

import numpy as np
import pytest
import wordpiece

from experiments.encoding import Subwords, answer_texts, encode_questions
from experiments.tasks import Answer, Questions


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return wordpiece.made(tmp_path_factory.mktemp("bert") / "tokenizer.json")


CONTEXT = "Hello wörlds a b 東京 . " * 12


def test_an_answer_is_in_every_window_that_has_all_of_it(bert):
    subwords, _ = bert
    [pieces] = subwords.split([CONTEXT])
    spans = [(a, b) for a, b in itertools.product(range(108), repeat=2) if a <= b < a + 3]
    answers = [Answer(start := int(pieces.offsets[a, 0]), CONTEXT[start : pieces.offsets[b, 1]]) for a, b in spans]
    count = len(spans)
    examples = Questions(
        tuple(map(str, range(count))), ("a",) * count, (CONTEXT,) * count, tuple((a,) for a in answers)
    )
    rows = encode_questions(examples, subwords, length=69)
    start, end = rows.columns["start"].values.reshape(count, -1), rows.columns["end"].values.reshape(count, -1)
    # 65 pieces of context fit, windows begin 33 pieces apart, and 3 pieces stand before them.
    windows = [(0, 65), (33, 98), (66, 108)]
    assert rows.lengths[:3].tolist() == [4 + stop - first for first, stop in windows]
    for (a, b), starts, ends in zip(spans, start.tolist(), end.tolist()):
        has = [first <= a and b < stop for first, stop in windows]
        assert starts == [a - first + 3 if inside else 0 for inside, (first, _) in zip(has, windows)]
        assert ends == [b - first + 3 if inside else 0 for inside, (first, _) in zip(has, windows)]


def questions(answer: str, count: int = 1) -> Questions:
    starts = [i for i in range(len(CONTEXT)) if CONTEXT.startswith(answer, i)]
    answers = tuple((Answer(starts[(i * 5) % len(starts)], answer),) for i in range(count))
    return Questions(tuple(map(str, range(count))), ("don't a",) * count, (CONTEXT,) * count, answers)


@pytest.mark.parametrize("answer", ["wörlds", "b 東", "a b 東京", " b "])
def test_answers_go_to_pieces_and_back(bert, answer):
    subwords, library = bert
    examples = questions(answer, 6)
    rows = encode_questions(examples, subwords, length=75)
    column = lambda name: rows.columns[name].values
    whole = library.encode("don't a", CONTEXT)
    assert column("ids")[0].tolist() == [*whole.ids[:74], 3] and column("types")[0].tolist() == [
        *whole.type_ids[:74],
        1,
    ]
    # Every piece of the context is in a window.
    seen = [
        set(zip(b.tolist(), f.tolist())) - {(-1, -1)}
        for b, f, q in zip(column("begin"), column("finish"), column("question"))
        if q == 0
    ]
    assert set.union(*seen) == {
        o for o, t, s in zip(whole.offsets, whole.type_ids, whole.special_tokens_mask) if t and not s
    }
    logits = lambda at, size: np.eye(size)[at] * 9.0
    starts, ends = ([logits(at, size) for at, size in zip(column(name), rows.lengths)] for name in ("start", "end"))
    assert answer_texts(examples, rows, starts, ends, may_be_none=True) == [answer.strip()] * 6
    for number in range(6):
        mine = np.flatnonzero((column("question") == number) & (column("start") > 0))
        assert len(mine) >= 1
        for row in mine:
            begin, finish = column("begin")[row][column("start")[row]], column("finish")[row][column("end")[row]]
            assert CONTEXT[begin:finish] == answer.strip()
            assert abs(begin - examples.answers[number][0].start) <= 1


def test_passages_are_those_of_brute_force(bert):
    subwords, _ = bert
    examples = questions("b", 25)
    rows = encode_questions(examples, subwords, length=76)
    rng = np.random.default_rng(0)
    start, end = ([rng.normal(size=size + 3) for size in rows.lengths] for _ in range(2))
    expected = []
    for number in range(25):
        best, nothing = (-np.inf, ""), np.inf
        for row in np.flatnonzero(rows.columns["question"].values == number):
            begin, finish = rows.columns["begin"].values[row], rows.columns["finish"].values[row]
            nothing = min(nothing, start[row][0] + end[row][0])
            for i, j in itertools.product(range(len(begin)), repeat=2):
                if begin[i] >= 0 and finish[j] >= 0 and i <= j < i + 4:
                    best = max(best, (start[row][i] + end[row][j], CONTEXT[begin[i] : finish[j]]))
        expected.append((best, nothing))
    found = answer_texts(examples, rows, start, end, longest=4, may_be_none=False)
    assert found == [text for (_, text), _ in expected]
    for row in range(len(rows)):
        start[row][0] += 20
    start[0][0] -= 40  # one window of the first question is sure that there is something
    found = answer_texts(examples, rows, start, end, longest=4, may_be_none=True)
    assert found == [expected[0][0][1], *[""] * 24]


def test_unanswerable_questions_point_to_the_beginning(bert):
    subwords, _ = bert
    examples = Questions(("1",), ("a " * 70,), ("b a",), ((),))
    rows = encode_questions(examples, subwords, length=80)
    assert (rows.columns["start"].values, rows.columns["end"].values, rows.cut) == (0, 0, 1)
    with pytest.raises(ValueError, match="--length=60 has no room for a question and a context, give 131."):
        encode_questions(examples, subwords, length=60)
    with pytest.raises(ValueError, match="--tokenizer=bytes begins no text with a piece"):
        encode_questions(examples, Subwords.load("bytes"), length=200)
