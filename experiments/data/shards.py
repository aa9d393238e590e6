"""Token shards in the layout of FineWeb-10B for GPT-2 (llm.c, modded-nanogpt).

A `.bin` file is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and
then that many little-endian uint16 tokens. `_train_` or `_val_` in the file name says its split.

They are read, not mapped: where a mapped file is cut short, or its disk fails, the process dies of SIGBUS and can say
nothing.
"""

import dataclasses
import functools
import glob
import hashlib
import os
import weakref
from collections.abc import Sequence

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
GPT2_VOCAB = 50257
_SAMPLE_BLOCKS = 64
_SAMPLE_BYTES = 4096


# FineWeb-100B has more shards than a process may open files.
@functools.lru_cache(maxsize=128)
def _open(path: str) -> "_File":
    return _File(path)


class _File:
    """An open shard, which is closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, start)

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Size, time of the last change, and which file it is."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ino

    def sampled_sha256(self) -> str:
        """SHA-256 over the size and 64 evenly spread blocks of 4 KiB.

        Hashing whole shards would read tens of gigabytes before the first step.
        """
        size = self.stamp[0]
        digest = hashlib.sha256(f"{size}\n".encode())
        for block in range(_SAMPLE_BLOCKS):
            digest.update(self.read(max(0, size - _SAMPLE_BYTES) * block // (_SAMPLE_BLOCKS - 1), _SAMPLE_BYTES))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
    """Tokens of one file, opened when first read.

    Invariant: the file had the right header and exactly `count` tokens when it was found.

    Attributes:
        flag: the flag and its value as the user wrote them, which opens every message.
        path: of the file.
        count: its tokens.
        sha256: of the parts that are sampled, as it was found.
        stamp: of the file, as it was found.
    """

    flag: str
    path: str
    count: int
    sha256: str
    stamp: tuple[int, int, int]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice, /) -> np.ndarray:
        """The tokens, uint16.

        Raises:
            ValueError: the file cannot be read, or is no longer what was found.
        """
        start, stop, _ = index.indices(self.count)
        try:
            file = _open(self.path)
            data = file.read(HEADER_BYTES + 2 * start, 2 * (stop - start))
            # Elsewhere stands a copy of it, or the same file where a mount numbers files anew. A sample shows that, but
            # not what was written into it.
            moved = file.stamp != self.stamp
            changed = file.stamp[:2] != self.stamp[:2] or (moved and file.sampled_sha256() != self.sha256)
        except OSError as error:
            raise ValueError(
                f"{self.flag}: {self.path} can no longer be read ({os.strerror(error.errno or 0).lower()}), restore it "
                "and repeat the command."
            ) from error
        if changed or len(data) < 2 * (stop - start):
            raise ValueError(
                f"{self.flag}: {self.path} was changed while it was in use, restore it and repeat the command."
            )
        return np.frombuffer(data, "<u2")


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
        file = _File(path)
        header = file.read(0, 12)
        stamp, sha256 = file.stamp, file.sampled_sha256()
    except OSError as error:
        raise ValueError(f"{flag}: cannot read {path} ({error.strerror}).") from error
    size = stamp[0]
    if size < HEADER_BYTES or (magic_version_count := np.frombuffer(header, "<i4").tolist())[:2] != [MAGIC, VERSION]:
        raise ValueError(f"{flag}: {path} is no token shard (magic {MAGIC}, version {VERSION}), leave it out.")
    count = magic_version_count[2]
    expected = HEADER_BYTES + 2 * count
    if size != expected or count < 1:
        raise ValueError(
            f"{flag}: {path} is truncated or damaged, its header says {count} tokens "
            f"({expected} bytes) and it has {size} bytes, so fetch it again."
        )
    shard = Shard(flag, path, count, sha256, stamp)
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


def digests(shards: Sequence[Shard]) -> dict[str, str]:
    """The SHA-256 of what is sampled of each shard, by its path from the folder that holds all."""
    root = os.path.commonpath([os.path.dirname(shard.path) for shard in shards])
    return {os.path.relpath(shard.path, root): shard.sha256 for shard in shards}
