"""Text sources: what is read, how it is split, and what is refused."""

import hashlib
import subprocess
import sys

import pytest

from experiments.data import load
from experiments.data.text import stdlib_corpus, text_corpus


def documents(stream: bytes) -> list[bytes]:
    assert stream.endswith(b"\0")
    return stream[:-1].split(b"\0")


def write_files(folder, count: int) -> str:
    for index in range(count):
        (folder / f"doc{index:02}.txt").write_text(f"document {index} says é\n" * 20)
    return f"text:{folder}/*.txt"


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_corpus()


def test_stdlib_is_ten_megabytes_of_source_split_by_file(stdlib):
    train, validation = documents(stdlib.train), documents(stdlib.validation)
    assert 8e6 < len(stdlib.train) + len(stdlib.validation) < 16e6
    assert 0.02 < len(validation) / len(train) < 0.10
    assert not set(train) & set(validation)
    assert len(set(train)) == len(train)
    stream = stdlib.train + stdlib.validation
    assert b"def namedtuple(typename" in stream  # collections/__init__.py
    assert b"class TestCase(object)" in stream  # unittest/case.py, no test itself
    assert b"class BaseTaskTests" not in stream  # test/test_asyncio/test_tasks.py
    assert b"build_time_vars" not in b"".join(d[:2000] for d in train + validation if len(d) > 3e4)


def test_stdlib_is_the_same_each_time_and_its_digest_is_recorded(stdlib, tmp_path):
    dataset = load("stdlib", "auto", tmp_path)
    assert dataset.sha256 == {
        "train": hashlib.sha256(stdlib.train).hexdigest(),
        "validation": hashlib.sha256(stdlib.validation).hexdigest(),
    }
    assert dataset.train.parts[0].tobytes() == stdlib.train
    assert dataset.validation.parts[0].tobytes() == stdlib.validation
    assert (dataset.vocab_size, dataset.bytes_per_token, dataset.entropy_floor) == (256, 1.0, None)
    assert dataset.tokenizer.name == "bytes"
    assert list(tmp_path.iterdir()) == []


def test_twenty_files_are_split_by_name_whatever_else_is_there(tmp_path):
    data = write_files(tmp_path, 60)
    before = text_corpus(f"--data={data}", [f"{tmp_path}/*.txt"])
    train, validation = documents(before.train), documents(before.validation)
    in_order = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert train == [document for document in in_order if document not in validation]
    assert sorted(train + validation) == sorted(in_order)
    assert 1 <= len(validation) <= 10
    for index in range(60, 90):
        (tmp_path / f"doc{index:02}.txt").write_text(f"another {index}\n")
    after = text_corpus(f"--data={data}", [f"{tmp_path}/*.txt"])
    assert set(train) <= set(documents(after.train))
    assert set(validation) <= set(documents(after.validation))


def test_split_by_name_always_holds_a_file_out(tmp_path):
    for offset in range(8):
        folder = tmp_path / str(offset)
        folder.mkdir()
        for index in range(20):
            (folder / f"{offset}-{index}.txt").write_text(f"document {offset} {index}\n")
        corpus = text_corpus("--data", [f"{folder}/*.txt"])
        assert 1 <= len(documents(corpus.validation)) < 10


def test_identical_copies_do_not_leak_into_validation(tmp_path):
    write_files(tmp_path, 30)
    for index in range(30):
        (tmp_path / f"copy{index}.txt").write_bytes((tmp_path / f"doc{index:02}.txt").read_bytes())
    corpus = text_corpus("--data", [f"{tmp_path}/*.txt"])
    assert len(documents(corpus.train) + documents(corpus.validation)) == 30


def test_a_glob_may_match_empty_files(tmp_path):
    data = write_files(tmp_path, 3)
    before = load(data, "bytes", tmp_path).sha256
    (tmp_path / "empty.txt").write_text("")
    assert load(data, "bytes", tmp_path).sha256 == before


def test_few_files_are_split_at_a_line_near_the_end(tmp_path):
    lines = "".join(f"línea {number}\n" for number in range(2000)).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    (tmp_path / "b.txt").write_bytes(b"b" + lines)
    corpus = text_corpus("--data", [f"{tmp_path}/a.txt", f"{tmp_path}/?.txt"])
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert train[0] == lines
    assert train[1] + validation[0] == b"b" + lines
    assert train[1].endswith(b"\n") and len(validation) == 1
    assert len(validation[0]) / (2 * len(lines)) == pytest.approx(0.05, abs=0.001)


def test_text_without_lines_is_cut_between_two_characters(tmp_path):
    for length in range(40, 48):
        text = ("x" * (length % 4) + "🎉" * length).encode()
        (tmp_path / "a.txt").write_bytes(text)
        corpus = text_corpus("--data", [f"{tmp_path}/a.txt"])
        (head,), (tail,) = documents(corpus.train), documents(corpus.validation)
        assert head + tail == text
        assert tail.decode() == "🎉" * (len(tail) // 4)


def test_a_path_or_glob_that_exists_needs_no_prefix(tmp_path):
    data = write_files(tmp_path, 3)
    prefixed = load(data, "bytes", tmp_path)
    assert load(f"{tmp_path}/*.txt", "bytes", tmp_path).sha256 == prefixed.sha256
    single = tmp_path / "with,comma"
    single.write_text("one\ntwo\n" * 100)
    assert len(load(str(single), "bytes", tmp_path).train) == 760 + 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("", "choose one of stdlib"),
        ("no/such/file.txt", "nor a file: choose one of stdlib"),
        ("stdlib:3.11", "unknown option '3.11', choose from holdout="),
        ("text", "choose one of stdlib"),
        ("text:", "no file matches ''"),
        ("text:{tmp}/absent*.txt", "no file matches"),
        ("text:{tmp}/good.txt,{tmp}/absent.txt", "absent.txt', check the path"),
        ("text:{tmp}", "is a folder"),
        ("{tmp}", "is a folder"),
        ("text:{tmp}/empty.txt", "empty.txt is empty"),
        ("text:{tmp}/[eg]*.txt,{tmp}/empty.txt", "empty.txt is empty"),
        ("text:{tmp}/em*.txt", "every file that matches is empty"),
        ("text:{tmp}/loop.txt", "no file matches"),
        ("text:{tmp}/good.txt,{tmp}/latin.txt", "latin.txt is not UTF-8 (byte 3)"),
        ("text:{tmp}/zero.txt", "zero.txt contains a zero byte"),
        ("text:{tmp}/short.txt", "too little text"),
    ],
)
def test_errors_are_one_sentence_that_names_the_flag(data, says, tmp_path):
    (tmp_path / "good.txt").write_text("good\n" * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    data = data.format(tmp=tmp_path)
    with pytest.raises(ValueError) as error:
        load(data, "auto", tmp_path)
    message = str(error.value)
    assert message.startswith(f"--data={data}") and says in message
    assert message.endswith(".") and ". " not in message and "\n" not in message


def test_import_needs_neither_jax_nor_tokenizers():
    check = "import experiments.data, sys; print({'jax', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
