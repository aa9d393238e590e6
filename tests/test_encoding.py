"""Examples as pieces: against encodings of whole sentences by the library, brute force, and what must come back."""

import itertools

import numpy as np
import pytest
import wordpiece

from experiments.data.bpe import train_bpe
from experiments.data.tokenizers import HuggingFaceTokenizer
from experiments.encoding import (
    CASINGS,
    IGNORED,
    TEMPLATES,
    Batches,
    Subwords,
    encode_conversations,
    encode_documents,
    encode_images,
    encode_texts,
    encode_words,
    image_statistics,
    word_predictions,
)
from experiments.encoding.words import _windows, casing
from experiments.tasks import Conversations, Documents, Images, LabelledTexts, TaggedSentences, Turn

WORDS = ["Hello", "wörlds", "U.S.", "don't", "xyzzy", "\x07", "hellohello", "a", "Äa", "東京"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return wordpiece.made(tmp_path_factory.mktemp("bert") / "tokenizer.json")


def sentences(seed: int, count: int, longest: int, words=WORDS) -> TaggedSentences:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, count)
    return TaggedSentences(
        words=tuple(tuple(words[i] for i in rng.integers(0, len(words), size)) for size in sizes),
        tags=tuple(rng.integers(0, 5, size).astype(np.int32) for size in sizes),
        documents=np.sort(rng.integers(0, 1 + count // 4, count)).astype(np.int32),
    )


def test_first_pieces_carry_labels_as_the_library_aligns_words(bert):
    subwords, library = bert
    examples = sentences(0, 40, 12)
    rows = encode_words(examples, subwords, length=256)
    number = itertools.count()
    for i, (words, tags) in enumerate(zip(examples.words, examples.tags)):
        # A word that the normalizer drops has no pieces in the library, and is unknown to us.
        kept = [word if word != "\x07" else "xyzzy" for word in words]
        expected = library.encode(kept, is_pretokenized=True)
        ids, labels, word = (rows.columns[name].values[i] for name in ("ids", "labels", "word"))
        assert ids.tolist() == expected.ids
        seen = set()
        for at, of in enumerate(expected.word_ids):
            is_head = of is not None and of not in seen
            seen.add(of)
            assert labels[at] == (tags[of] if is_head else IGNORED)
            assert word[at] == (next(number) if is_head else IGNORED)
    assert (rows.cut, len(rows)) == (0, 40)
    for batch in Batches(rows, 16).once():
        assert (batch["labels"][~batch["mask"]] == IGNORED).all() and (batch["word"][batch["row"] < 0] == IGNORED).all()


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("length", [9, 16, 40])
def test_every_word_is_labelled_once_with_what_is_around_it(bert, length, by_document):
    subwords, _ = bert
    examples = sentences(1, 60, 30)
    rows = encode_words(examples, subwords, length=length, by_document=by_document)
    ids, word, labels = (rows.columns[name].values for name in ("ids", "word", "labels"))
    flat = list(itertools.chain(*examples.words))
    numbers = np.concatenate([found[found != IGNORED] for found in word])
    assert sorted(numbers.tolist()) == list(range(len(flat)))
    assert rows.lengths.max() <= length and (by_document or len(rows) >= 60)
    tags = np.concatenate(examples.tags)
    pieces = [subwords.words([one])[0].tolist() for one in flat]
    unit_of = np.repeat(
        np.arange(60) if not by_document else examples.documents, [len(words) for words in examples.words]
    )
    for row, number, label in zip(ids, word, labels):
        heads = np.flatnonzero(number != IGNORED)
        np.testing.assert_array_equal(label[heads], tags[number[heads]])
        assert len(set(unit_of[number[heads]])) == 1
        # Brute force: the row is the pieces of a stretch of words that has those that it labels in their places.
        first = number[heads[0]]
        start = first
        while sum(map(len, pieces[start:first])) < heads[0] - 1:
            start -= 1
        stop = start + 1
        while sum(map(len, pieces[start:stop])) < len(row) - 2:
            stop += 1
        assert [2, *itertools.chain(*pieces[start:stop]), 3] == row.tolist()
        assert len({*unit_of[start:stop]}) == 1
    if length == 40:
        # Words at a cut are read with some before and after them.
        cut = [row for row, number in zip(ids, word) if number[1] == IGNORED]
        assert len(cut) > 3
    predicted = [np.concatenate([label, [7, 7]]) for label in labels]
    found = word_predictions(examples, rows, predicted)
    assert [tags.tolist() for tags in found] == [tags.tolist() for tags in examples.tags]


def test_windows_by_hand():
    # Eight words fit, two of which the next window has as well: each labels one of them.
    assert list(_windows([(0, 20), (20, 22)], [1] * 22, 8)) == [
        (0, 8, 0, 7), (6, 14, 7, 13), (12, 20, 13, 20), (20, 22, 20, 22),
    ]  # fmt: skip
    # A word of six leaves room for two before it.
    assert list(_windows([(0, 9)], [1, 1, 1, 1, 1, 1, 1, 6, 1], 8)) == [(0, 7, 0, 6), (5, 8, 6, 8), (8, 9, 8, 9)]


def test_rows_by_document_go_on_over_the_ends_of_sentences(bert):
    examples = sentences(1, 60, 6)
    alone, together = (encode_words(examples, bert[0], length=60, by_document=by) for by in (False, True))
    documents = len(set(examples.documents.tolist()))
    assert len(alone) == 60 and documents <= len(together) < 40


def test_a_word_longer_than_a_row_is_cut_and_counted(bert):
    subwords, _ = bert
    examples = TaggedSentences((("a" * 30, "b"),), (np.array([1, 2], np.int32),), np.zeros(1, np.int32))
    rows = encode_words(examples, subwords, length=10)
    assert rows.cut == 1 and [row.tolist() for row in rows.columns["ids"].values] == [[2, 15, *[16] * 7, 3], [2, 17, 3]]
    with pytest.raises(ValueError, match="--length=2 has no room for words between 2 special pieces"):
        encode_words(examples, subwords, length=2)


def test_casing_is_that_of_the_word():
    expected = {"no letters": "12 ,", "lower": "ab größe", "capitalized": "Ab A", "upper": "AB U.S.", "mixed": "aB McD"}
    found = {name: {CASINGS[casing(word)] for word in words.split()} for name, words in expected.items()}
    assert found == {name: {name} for name in expected}


def test_words_run_together_only_where_pieces_tell_them_apart(bert):
    subwords, _ = bert
    assert subwords.words(["a", "\x07", ""])[0].tolist() == [15]
    assert [ids.tolist() for ids in subwords.words(["\x07", ""])] == [[1], [1]]
    by_bytes = Subwords.load("bytes")
    assert [ids.tolist() for ids in by_bytes.words(["é", ""])] == [[32, 0xC3, 0xA9], [32]]
    trained = Subwords(HuggingFaceTokenizer("bpe", train_bpe(b"def f(x): return x\n" * 20 + b"\0", 280)))
    assert trained.decode(np.concatenate(trained.words(["return", "x"]))) == " return x"
    assert trained.separator not in trained.split(["<|endoftext|>"])[0].ids
    assert trained.special("<|endoftext|>").tolist() == [trained.separator]


@pytest.mark.parametrize("name", ["bert", "bytes"])
def test_offsets_are_of_characters(bert, name):
    subwords = bert[0] if name == "bert" else Subwords.load("bytes")
    text = "Hello wörlds, 東京 don't"
    [pieces] = subwords.split([text])
    parts = [text[start:stop] for start, stop in pieces.offsets]
    if name == "bert":
        assert parts == ["Hello", "wör", "ld", "s", ",", "東", "京", "don", "'", "t"]
    else:
        assert parts == [letter for letter in text for _ in letter.encode()]


def test_texts_are_framed_cut_and_labelled(bert):
    subwords, library = bert
    examples = LabelledTexts(("Hello wörlds", "a b a b a b", "\x07", "[SEP]"), np.array([3, 1, 0, 2], np.int32))
    rows = encode_texts(examples, subwords, length=6)
    ids = [row.tolist() for row in rows.columns["ids"].values]
    assert ids[0] == library.encode("Hello wörlds").ids and ids[1:3] == [[2, 15, 17, 15, 17, 3], [2, 3]]
    assert 3 not in ids[3][1:-1] and rows.cut == 1 and rows.columns["labels"].values.tolist() == [3, 1, 0, 2]
    batch = next(Batches(rows, 8).once())
    assert batch["labels"].tolist() == [3, 1, 0, 2, -1, -1, -1, -1] and batch["mask"][4:].any(1).all()
    assert encode_texts(LabelledTexts(("é",), np.zeros(1, np.int32)), Subwords.load("bytes"), length=4).lengths == [2]


def test_images_have_mean_zero_and_deviation_one_by_channel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (50, 6, 6, 2), np.uint8)
    pixels[..., 1] = 7
    train = Images(pixels, np.zeros(50, np.int32))
    found = encode_images(train, image_statistics(train)).columns["pixels"].values
    assert found.dtype == np.float32 and np.all(found[..., 1] == 0)
    assert abs(found[..., 0].mean()) < 1e-3 and abs(found[..., 0].std() - 1) < 1e-3
    shifted = encode_images(Images(pixels + 50, train.labels), image_statistics(train)).columns["pixels"].values
    np.testing.assert_allclose((shifted - found)[..., 0], 50 / pixels[..., 0].std(dtype=np.float64), rtol=1e-3)


def text(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode(errors="replace").replace("\0", "|")


PAIR = (Turn("user", "2+2="), Turn("assistant", "4"))
TALK = (
    Turn("system", "s"),
    Turn("user", "u"),
    Turn("assistant", "ab"),
    Turn("user", "v"),
    Turn("assistant", "c"),
    Turn("user", "w"),
)


@pytest.mark.parametrize(
    ("turns", "template", "read", "learned"),
    [
        (PAIR, "plain", "|2+2=4|", "4|"),
        (TALK, "plain", "|suab|vc|", "ab|c|"),
        (
            TALK,
            "chatml",
            "|<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n"
            "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n",
            "ab<|im_end|>\nc<|im_end|>\n",
        ),
    ],
)
def test_only_what_the_assistant_says_counts(turns, template, read, learned):
    examples = Conversations((turns,))
    rows = encode_conversations(examples, Subwords.load("bytes"), length=400, template=TEMPLATES[template], pack=False)
    ids, targets, weights = (rows.columns[name].values[0] for name in ("ids", "targets", "weights"))
    assert text(ids) == read[:-1] and text(targets) == read[1:]
    assert text(targets[weights == 1]) == learned and set(weights.tolist()) == {0.0, 1.0}


def test_packed_rows_hold_every_conversation_whole():
    rng = np.random.default_rng(0)
    turns = tuple((Turn("user", "x" * a), Turn("assistant", "y" * b)) for a, b in rng.integers(1, 20, (50, 2)))
    alone, packed = (
        encode_conversations(
            Conversations(turns), Subwords.load("bytes"), length=48, template=TEMPLATES["plain"], pack=pack
        )
        for pack in (False, True)
    )
    assert len(alone) == 50 and 15 <= len(packed) <= 1.15 * alone.lengths.sum() / 48 + 1 and packed.lengths.max() <= 48
    expected = sorted(
        zip(*([tuple(row.tolist()) for row in alone.columns[n].values] for n in ("ids", "targets", "weights")))
    )
    found = []
    for row in range(len(packed)):
        of = {name: column.values[row] for name, column in packed.columns.items()}
        for segment in range(1, of["segments"].max() + 1):
            mine = of["segments"] == segment
            assert of["positions"][mine].tolist() == list(range(mine.sum()))
            found.append(tuple(tuple(of[name][mine].tolist()) for name in ("ids", "targets", "weights")))
    assert sorted(found) == expected
    batch = next(Batches(packed, 64, lengths=(48,)).once())
    assert batch["weights"].sum() == sum(weights.sum() for weights in packed.columns["weights"].values)
    assert batch["segments"].dtype == np.int32 and (batch["segments"][~batch["mask"]] == 0).all()


def test_long_conversations_lose_their_beginning():
    examples = Conversations(((Turn("user", "x" * 30), Turn("assistant", "yz")), PAIR))
    rows = encode_conversations(examples, Subwords.load("bytes"), length=9, template=TEMPLATES["plain"], pack=False)
    assert rows.cut == 1 and text(rows.columns["ids"].values[0]) == "xxxxxxxyz" and rows.lengths.tolist() == [9, 6]


@pytest.mark.parametrize("length", [2, 7, 64])
def test_every_piece_of_a_document_is_scored_once_after_half_a_row(length):
    examples = Documents(tuple("abcdefghijklmnopqrstuvwxyz"[:size] * 2 for size in (1, 3, 7, 26)))
    rows = encode_documents(examples, Subwords.load("bytes"), length=length)
    scored = dict.fromkeys(range(4), "")
    for ids, targets, weights, number in zip(*(column.values for column in rows.columns.values())):
        assert len(ids) <= length and ids[1:].tolist() == targets[:-1].tolist()
        if scored[number]:
            assert weights[: length // 2].sum() == 0
        else:
            assert ids[0] == 0
        scored[number] += text(targets[weights == 1])
    assert [scored[number] for number in range(4)] == [one + "|" for one in examples.texts]
