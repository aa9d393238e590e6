"""Token shards: the FineWeb layout, read through memory maps, damaged files refused."""

import time

import numpy as np
import pytest

from experiments.data import TokenStream, check_batch, load, shards, train_batch


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50257, 1000)
    write_shard(tmp_path / "web_train_000001.bin", tokens[:400])
    write_shard(tmp_path / "web_train_000002.bin", tokens[400:901])
    write_shard(tmp_path / "web_val_000000.bin", tokens[901:])
    return tmp_path, tokens


def test_round_trip_across_shards(folder, tmp_path):
    path, tokens = folder
    dataset = load(f"shards:{path}", "auto", tmp_path)
    np.testing.assert_array_equal(dataset.train.read(0, 901), tokens[:901])
    np.testing.assert_array_equal(dataset.validation.read(0, 99), tokens[901:])
    np.testing.assert_array_equal(dataset.train.read(390, 20), tokens[390:410])
    np.testing.assert_array_equal(dataset.train.read(895, 12), np.concatenate([tokens[895:901], tokens[:6]]))
    assert dataset.train.read(0, 2).dtype == np.int32
    assert (dataset.vocab_size, dataset.bytes_per_token) == (50257, None)
    assert load(f"shards:{path}/*.bin,vocab=50304", "given", tmp_path).vocab_size == 50304


def test_batches_come_from_the_right_place(folder, tmp_path):
    path, tokens = folder
    dataset = load(f"shards:{path}", "auto", tmp_path)
    check_batch(dataset, batch_size=4, seq_len=50)
    ring = np.concatenate([tokens[:901], tokens[:901]])
    windows = {tuple(ring[start : start + 51]) for start in range(901)}
    for step in range(9):
        batch = train_batch(dataset, seed=0, step=step, batch_size=4, seq_len=50)
        assert all(tuple(row) in windows for row in batch)


def test_sampled_digests_name_each_shard_and_see_its_size_and_content(folder, tmp_path):
    path, tokens = folder
    before = load(f"shards:{path}", "auto", tmp_path).sha256
    assert sorted(before) == ["web_train_000001.bin", "web_train_000002.bin", "web_val_000000.bin"]
    assert len(set(before.values())) == 3
    assert load(f"shards:{path}", "auto", tmp_path).sha256 == before
    changed = tokens[901:].copy()
    changed[-1] ^= 1
    write_shard(path / "web_val_000000.bin", changed)
    after = load(f"shards:{path}", "auto", tmp_path).sha256
    assert {name for name in before if after[name] != before[name]} == {"web_val_000000.bin"}
    (path / "more").mkdir()
    write_shard(path / "more/web_val_000000.bin", tokens[:50])
    deep = load(f"shards:{path}/**/*.bin", "auto", tmp_path).sha256
    assert deep.keys() - after.keys() == {"more/web_val_000000.bin"}


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(1400)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(1500)
        file.write(b"\xff")


def zero_between_samples(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2 // 63 + 4096)
        file.write(bytes(4096))


def replace(path):
    write_shard(path.with_name("new"), np.zeros(400, np.int64))
    path.with_name("new").replace(path)


@pytest.mark.parametrize(
    ("spoil", "is_open", "says"),
    [
        (truncate, True, "web_train_000001.bin was changed while it was in use"),
        (truncate, False, "web_train_000001.bin was changed while it was in use"),
        (overwrite, True, "web_train_000001.bin was changed while it was in use"),
        (replace, False, "web_train_000001.bin was changed while it was in use"),
        (lambda path: path.unlink(), False, "web_train_000001.bin can no longer be read (no such file or directory)"),
    ],
)
def test_a_shard_that_is_spoilt_while_it_is_in_use_is_named(folder, tmp_path, spoil, is_open, says):
    path, tokens = folder
    dataset = load(f"shards:{path}", "auto", tmp_path)
    shards._open.cache_clear()
    if is_open:
        np.testing.assert_array_equal(dataset.train.read(0, 400), tokens[:400])
    # What is changed in the same tick of the kernel's clock as it was found has the same time.
    time.sleep(0.02)
    spoil(path / "web_train_000001.bin")
    with pytest.raises(ValueError) as error:
        dataset.train.read(300, 20)
    assert str(error.value).startswith(f"--data=shards:{path}: ") and says in str(error.value)
    np.testing.assert_array_equal(dataset.train.read(400, 501), tokens[400:901])


def test_a_shard_that_is_moved_away_once_open_still_is_what_it_was(folder, tmp_path):
    path, tokens = folder
    dataset = load(f"shards:{path}", "auto", tmp_path)
    np.testing.assert_array_equal(dataset.train.read(0, 400), tokens[:400])
    (path / "web_train_000001.bin").unlink()
    np.testing.assert_array_equal(dataset.train.read(0, 400), tokens[:400])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x_train_3.bin", {"tokens": [1, 2], "count": 3}, "x_train_3.bin is truncated"),
        (
            "x_train_3.bin",
            {"tokens": [1, 2, 3], "count": 2},
            "x_train_3.bin is truncated or damaged",
        ),
        ("x_train_3.bin", {"tokens": [], "count": 0}, "x_train_3.bin is truncated or damaged"),
        ("x_train_3.bin", {"tokens": [1], "magic": 20240801}, "x_train_3.bin is no token shard"),
        ("x_train_3.bin", {"tokens": [1], "version": 2}, "x_train_3.bin is no token shard"),
        (
            "x_train_3.bin",
            {"tokens": [50257]},
            "token id 50257 is outside the vocabulary of 50257",
        ),
        ("train.bin", {"tokens": [1]}, "must contain either _train_ or _val_"),
    ],
)
def test_bad_shards_are_named(folder, tmp_path, name, content, says):
    path, _ = folder
    write_shard(path / name, **content)
    expect_sentence(f"shards:{path}", says, tmp_path)


def test_empty_file_is_no_shard(folder, tmp_path):
    path, _ = folder
    (path / "x_val_1.bin").write_bytes(b"")
    expect_sentence(f"shards:{path}", "x_val_1.bin is no token shard", tmp_path)


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("", "name the folder or glob"),
        ("{tmp}/absent", "no .bin file matches"),
        ("{tmp}/*_train_*", "no file named *_val_*.bin"),
        ("{tmp}/*_val_*", "no file named *_train_*.bin"),
        ("{tmp},vocb=50304", "did you mean 'vocab'"),
        ("{tmp},vocab=70000", "vocab must be an integer from 2 to 65536"),
        ("{tmp},vocab=100", "outside the vocabulary of 100"),
    ],
)
def test_errors_are_one_sentence_that_names_the_flag(folder, tmp_path, rest, says):
    expect_sentence("shards:" + rest.format(tmp=folder[0]), says, tmp_path)


def expect_sentence(data, says, tmp_path):
    with pytest.raises(ValueError) as error:
        load(data, "auto", tmp_path)
    message = str(error.value)
    assert message.startswith("--data=shards:") and says in message
    assert message.endswith(".") and "\n" not in message


def test_an_id_outside_the_vocabulary_is_caught_when_read(folder, tmp_path):
    path, _ = folder
    tokens = np.zeros(70_000, np.int64)
    tokens[69_000:] = 60_000
    write_shard(path / "x_train_3.bin", tokens)
    dataset = load(f"shards:{path}", "auto", tmp_path)
    with pytest.raises(ValueError, match=r"^--data=shards.*token id 60000 is outside"):
        for step in range(8):
            train_batch(dataset, seed=0, step=step, batch_size=100, seq_len=90)


def test_stream_reads_like_the_concatenation():
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 9, n).astype(np.uint8) for n in (1, 5, 2, 30)]
    joined = np.concatenate(parts * 4)
    stream = TokenStream(parts)
    assert len(stream) == 38
    for start in range(38):
        for length in (1, 2, 7, 38, 90):
            np.testing.assert_array_equal(stream.read(start, length), joined[start : start + length])


def test_what_is_written_between_the_samples_of_a_long_shard_is_noticed_while_it_is_in_use(tmp_path):
    path, tokens = tmp_path / "shards", np.arange(1_000_000) % 50_000
    path.mkdir()
    for split in ("train", "val"):
        write_shard(path / f"web_{split}_000001.bin", tokens)
    dataset = load(f"shards:{path}", "auto", tmp_path)
    before = dataset.sha256
    time.sleep(0.02)
    zero_between_samples(path / "web_train_000001.bin")
    assert load(f"shards:{path}", "auto", tmp_path).sha256 == before  # no sample sees it
    with pytest.raises(ValueError, match=r"web_train_000001.bin was changed while it was in use"):
        dataset.train.read(0, 400)
