"""Token shards in the layout of FineWeb-10B for GPT-2 (llm.c, modded-nanogpt).

A `.bin` file is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and
then that many little-endian uint16 tokens. `_train_` or `_val_` in the file name says its split.
"""

import dataclasses
import functools
import glob
import hashlib
import os

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
GPT2_VOCAB = 50257
_SAMPLE_BLOCKS = 64
_SAMPLE_BYTES = 4096


# Every open map holds a file descriptor, and FineWeb-100B has more shards than a process may open.
@functools.lru_cache(maxsize=128)
def _open(path: str, count: int) -> np.memmap:
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Tokens of one file, memory-mapped when first read.

    Invariant: the file had the right header and exactly `count` tokens when it was found.
    """

    path: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice, /) -> np.ndarray:
        return _open(self.path, self.count)[index]


def find_shards(flag: str, pattern: str, vocab_size: int) -> tuple[list[Shard], list[Shard]]:
    """Finds and checks the shards of a folder or glob.

    Args:
        flag: the flag and its value as the user wrote them, which opens every message.
        pattern: a folder, whose `*.bin` are taken, or a glob.
        vocab_size: ids must be below it; the first 65,536 tokens of each shard are checked here.

    Returns:
        Train and validation shards, each sorted by path.

    Raises:
        ValueError: no file, a file of neither split, a wrong header, a truncated file, an id
            outside the vocabulary, or a split without shards.
    """
    expanded = os.path.expanduser(pattern)
    inside = os.path.join(glob.escape(expanded), "*.bin")
    paths = sorted(glob.glob(inside if os.path.isdir(expanded) else expanded, recursive=True))
    if not paths:
        raise ValueError(f"{flag}: no .bin file matches {pattern!r}, check the path.")
    train: list[Shard] = []
    validation: list[Shard] = []
    for path in paths:
        name = os.path.basename(path)
        if ("_train_" in name) == ("_val_" in name):
            raise ValueError(f"{flag}: the name of {path} must contain either _train_ or _val_, rename it.")
        shard = _check(flag, path, vocab_size)
        (train if "_train_" in name else validation).append(shard)
    for split, shards in (("train", train), ("val", validation)):
        if not shards:
            raise ValueError(f"{flag}: no file named *_{split}_*.bin among the shards, add one.")
    return train, validation


def _check(flag: str, path: str, vocab_size: int) -> Shard:
    try:
        header = np.fromfile(path, dtype="<i4", count=3)
        size = os.path.getsize(path)
    except OSError as error:
        raise ValueError(f"{flag}: cannot read {path} ({error.strerror}).") from error
    if size < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{flag}: {path} is no token shard (magic {MAGIC}, version {VERSION}), leave it out.")
    count = int(header[2])
    expected = HEADER_BYTES + 2 * count
    if size != expected or count < 1:
        raise ValueError(
            f"{flag}: {path} is truncated or damaged, its header says {count} tokens "
            f"({expected} bytes) and it has {size} bytes, so fetch it again."
        )
    shard = Shard(path, count)
    check_ids(flag, shard[:65536], vocab_size)
    return shard


def check_ids(flag: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError where a token id lies outside the vocabulary."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ValueError(
            f"{flag}: token id {largest} is outside the vocabulary of {vocab_size}, "
            f"add ,vocab={largest + 1} or the tokenizer's true size to --data."
        )


def sampled_sha256(shards: list[Shard]) -> str:
    """SHA-256 over every shard's name, size and 64 evenly spread blocks of 4 KiB.

    Hashing whole shards would read tens of gigabytes before the first step.
    """
    digest = hashlib.sha256()
    for shard in shards:
        size = HEADER_BYTES + 2 * shard.count
        digest.update(f"{os.path.basename(shard.path)}:{size}\n".encode())
        with open(shard.path, "rb") as file:
            for block in range(_SAMPLE_BLOCKS):
                file.seek(max(0, size - _SAMPLE_BYTES) * block // (_SAMPLE_BLOCKS - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
