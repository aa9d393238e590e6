"""Tokenizers: lossless, deterministic, trained on the training split alone, cached."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import load
from experiments.data.bpe import pieces, train_bpe
from experiments.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer

ALL_ASCII_AND_LATIN = "".join(map(chr, range(256)))
# First characters of every length in UTF-8, the last one, combining marks, joined emoji, RTL, CRLF.
UNICODE = "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff e\u0301 👩‍👩‍👧 שלום 東京\r\n\t  \n   x"
SPELT_SPECIAL = "a <|endoftext|> that is text"
TRAIN = "".join(f"{n} is {n**3:b} and {n**5}\n" for n in range(200)).encode() + b"\0"


def write_corpus(folder, files: int = 40):
    for index in range(files):
        text = f"def function_{index}(argument):\n    return argument + {index}\n" * 8
        (folder / f"f{index}.py").write_text(text)
    return f"text:{folder}/*.py"


@pytest.fixture(scope="module")
def bpe():
    return HuggingFaceTokenizer("bpe:300", train_bpe(TRAIN, 300))


@pytest.mark.parametrize("text", [ALL_ASCII_AND_LATIN, UNICODE, SPELT_SPECIAL, " ", ""])
def test_round_trip(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.decode(tokens.astype(np.int32)) == text


def test_every_byte_has_an_id(bpe):
    vocabulary = json.loads(bpe.json)["model"]["vocab"]
    assert len([token for token in vocabulary if len(token) == 1]) == 256
    assert bpe.vocab_size == 300 == len(vocabulary)


def test_text_never_gives_the_separator(bpe):
    assert bpe.decode(np.array([bpe.separator])) == "<|endoftext|>"
    assert bpe.separator not in bpe.encode(SPELT_SPECIAL)
    stream = f"{SPELT_SPECIAL}\0{UNICODE}\0".encode()
    tokens = bpe.encode_stream(stream)
    ends = np.flatnonzero(tokens == bpe.separator)
    assert len(ends) == 2 and ends[-1] == len(tokens) - 1
    assert bpe.decode(tokens[: ends[0]]) == SPELT_SPECIAL
    assert bpe.decode(tokens[ends[0] + 1 : -1]) == UNICODE


def test_long_documents_are_cut_without_losing_text():
    line = "é" * 50 + "\n"
    many_lines, one_line = line * 6000, "x" + "🎉" * 150_000
    stream = f"{many_lines}\0short\0{one_line}\0".encode()
    cut = list(pieces(stream))
    assert "".join(text + "\0" * last for text, last in cut).encode() == stream
    assert max(len(text.encode()) for text, _ in cut) <= 2**18
    assert [last for _, last in cut].count(True) == 3 and len(cut) > 6
    assert cut[0][0].endswith("\n")


def test_training_is_deterministic_across_processes(bpe):
    program = (
        "import hashlib; from experiments.data.bpe import train_bpe;"
        f"print(hashlib.sha256(train_bpe({TRAIN!r}, 300).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(bpe.json.encode()).hexdigest()


def test_bpe_sees_only_the_training_split(tmp_path):
    data = write_corpus(tmp_path)
    held_out = load(data, "bytes", tmp_path / "cache").validation.read(0, 30).astype(np.uint8)
    marker = "zyzzyva"
    (victim,) = [path for path in tmp_path.glob("*.py") if path.read_bytes().startswith(held_out.tobytes())]
    before = load(data, "bpe:400", tmp_path / "cache").tokenizer
    victim.write_text(f"{marker}\n" * 200)
    after = load(data, "bpe:400", tmp_path / "other")
    assert after.tokenizer.json == before.json
    assert len(after.tokenizer.encode(marker)) == len(marker)
    # The same marker in the training split is learnt, so the test can fail.
    (trained_on,) = tmp_path.glob("f0.py") if victim.name != "f0.py" else tmp_path.glob("f1.py")
    trained_on.write_text(f"{marker}!\n" * 200)
    learnt = load(data, "bpe:400", tmp_path / "cache").tokenizer
    assert len(learnt.encode(marker)) < len(marker)


def test_second_load_neither_trains_nor_encodes(tmp_path, monkeypatch):
    data, cache = write_corpus(tmp_path), tmp_path / "cache"
    first = load(data, "bpe:300", cache)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.data.tokenizers.train_bpe", None)
        patch.setattr(HuggingFaceTokenizer, "encode_stream", lambda self, stream: 1 / 0)
        second = load(data, "bpe:300", cache)
    assert second.sha256 == first.sha256
    assert second.bytes_per_token == first.bytes_per_token
    np.testing.assert_array_equal(first.train.read(0, len(first.train)), second.train.read(0, len(second.train)))
    assert not list(cache.glob("*.partial"))
    cut = lambda content: content[:100]
    flipped = lambda content: content[:-400] + bytes([content[-400] ^ 1]) + content[-399:]
    for damage in (cut, flipped):  # on disk: made again
        paths = list(cache.glob("*.npz"))
        before = [path.read_bytes() for path in paths]
        for path in paths:
            path.write_bytes(damage(path.read_bytes()))
        again = load(data, "bpe:300", cache)
        assert [path.read_bytes() for path in paths] == before and len(before) == 2
        np.testing.assert_array_equal(again.train.read(0, len(again.train)), first.train.read(0, len(first.train)))
    assert load(data, "bpe:310", cache).vocab_size == 310


def test_bytes_per_token_counts_the_held_out_text(tmp_path):
    data = write_corpus(tmp_path)
    plain, merged = (load(data, choice, tmp_path / "cache") for choice in ("bytes", "bpe:400"))
    held_out = len(plain.validation)
    assert merged.bytes_per_token == held_out / len(merged.validation) > 2
    assert merged.sha256["validation"] == plain.sha256["validation"]
    assert merged.sha256["tokenizer"] == hashlib.sha256(merged.tokenizer.json.encode()).hexdigest()
    assert merged.train.parts[0].dtype == np.uint16
    text = merged.tokenizer.decode(merged.validation.read(0, len(merged.validation)))
    raw = plain.validation.read(0, held_out).astype(np.uint8).tobytes().decode()
    assert text.replace("<|endoftext|>", "\0") == raw


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(train, vocab_size):
        raise KeyboardInterrupt

    data, cache = write_corpus(tmp_path), tmp_path / "cache"
    monkeypatch.setattr("experiments.data.tokenizers.train_bpe", fails)
    with pytest.raises(KeyboardInterrupt):
        load(data, "bpe:300", cache)
    assert list(cache.iterdir()) == []


def test_given_file(tmp_path, bpe):
    data = write_corpus(tmp_path)
    path = tmp_path / "tokenizer.json"
    described = json.loads(bpe.json)
    described["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(described))
    dataset = load(data, str(path), tmp_path / "cache")
    assert (dataset.vocab_size, dataset.tokenizer.name) == (300, str(path))
    tokens = dataset.train.read(0, len(dataset.train))
    assert len(dataset.tokenizer.decode(tokens)) > 10_000  # not truncated
    assert dataset.bytes_per_token == pytest.approx(1.0, abs=0.3)

    described["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(described))
    (tmp_path / "f0.py").write_text("UPPER CASE\n")
    for source in tmp_path.glob("*.py"):
        source.write_text(source.read_text().upper())
    assert load(data, str(path), tmp_path / "cache").bytes_per_token is None


@pytest.mark.parametrize(
    ("data", "tokenizer", "says"),
    [
        ("stdlib", "byte", "did you mean 'bytes'"),
        ("stdlib", "", "choose one of auto, bytes"),
        ("stdlib", "bpe", "did you mean 'bpe:4096'"),
        ("stdlib", "bpe:many", "integer from 257"),
        ("stdlib", "bpe:256", "integer from 257"),
        ("stdlib", "bpe:-5", "integer from 257"),
        ("stdlib", "given", "is text, choose bytes"),
        ("stdlib", "absent/tokenizer.json", "no such file"),
        ("text", "{tmp}/broken.json", "is not a Hugging Face tokenizer.json"),
        ("text", "{tmp}/nospecial.json", "no special token to separate documents"),
        ("text", "{tmp}/binary.json", "cannot be read"),
        ("markov", "bytes", "is tokens already"),
        ("shards:anywhere", "bpe:4096", "is tokens already"),
    ],
)
def test_errors_are_one_sentence_that_names_the_flag(data, tokenizer, says, tmp_path, bpe):
    described = json.loads(bpe.json)
    described["added_tokens"] = []
    (tmp_path / "nospecial.json").write_text(json.dumps(described))
    (tmp_path / "broken.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "a.txt").write_text("text\n" * 100)
    data = data.replace("text", f"text:{tmp_path}/a.txt")
    tokenizer = tokenizer.format(tmp=tmp_path)
    with pytest.raises(ValueError) as error:
        load(data, tokenizer, tmp_path)
    message = str(error.value)
    assert message.startswith(f"--tokenizer={tokenizer}") and says in message
    assert message.endswith(".") and "\n" not in message


def test_unwritable_cache_is_a_sentence(tmp_path):
    data = write_corpus(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"^--cache_dir=.*file/cache cannot be written"):
        load(data, "bpe:300", tmp_path / "file" / "cache")


def test_missing_library_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"^--tokenizer=bpe:300 needs the tokenizers package"):
        load(write_corpus(tmp_path), "bpe:300", tmp_path / "cache")
