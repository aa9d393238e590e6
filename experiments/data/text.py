"""Text corpora: the Python standard library's own source, or the user's files.

A corpus is two byte strings, train and validation, in which every document ends with a zero byte.
The rule that splits them knows nothing of `--seed`, so runs that differ in seed share one held-out
set: with enough files a file goes to validation where the SHA-256 of its relative path says so,
which also keeps it there when other files come and go between Python versions.
"""

import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SEPARATOR = b"\0"
VALIDATION_SHARE = 20  # one in this many
MIN_FILES_TO_SPLIT_BY_FILE = 20

# Tests and codec tables are unlike other source. The generated modules hold paths and settings of
# the machine that built Python, and would give two machines with one Python different data.
_NOT_SOURCE = frozenset(["test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"])
_GENERATED = ("_sysconfigdata", "sitecustomize")


@dataclasses.dataclass(frozen=True)
class TextCorpus:
    """Training and validation text.

    Invariants: both are valid UTF-8, not empty, and every document in them ends with the only zero
    byte it contains.
    """

    train: bytes
    validation: bytes
    description: str


@dataclasses.dataclass(frozen=True)
class _File:
    name: str  # relative and with forward slashes, so that the split is the same on every machine
    text: bytes


def stdlib_corpus(holdout: int = VALIDATION_SHARE) -> TextCorpus:
    """The `*.py` files of the running Python's standard library, about 10 MB, split by file.

    Args:
        holdout: one file in this many, about, is held out.

    Raises:
        ValueError: this Python ships without source files.
    """
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SOURCE]
        paths += [
            os.path.join(folder, name) for name in names if name.endswith(".py") and not name.startswith(_GENERATED)
        ]
    flag = "--data=stdlib"
    if not paths:
        raise ValueError(f"{flag}: {root} holds no Python source, use --data=text:FILES instead.")
    files = [file for file in _read(flag, root, paths) if file.text]
    train, validation = split_by_file(_distinct(files), holdout)
    return _corpus(f"stdlib of Python {platform.python_version()}", train, validation)


def text_corpus(flag: str, patterns: Sequence[str]) -> TextCorpus:
    """The user's UTF-8 files: split by file from 20 files on, else the last 5 % are validation.

    Identical copies count once, so that no text is in both splits. A glob may match empty files.

    Args:
        flag: the flag and its value as the user wrote them, which opens every message.
        patterns: paths or globs; `**` descends into folders.

    Raises:
        ValueError: a pattern matches nothing, or a file is a folder, unreadable, empty, not UTF-8,
            or contains a zero byte.
    """
    paths: set[str] = set()
    named: set[str] = set()
    for pattern in patterns:
        matches = find_files(pattern)
        if not matches:
            raise ValueError(f"{flag}: no file matches {pattern!r}, check the path.")
        if os.path.isdir(matches[0]):
            raise ValueError(f"{flag}: {pattern} is a folder, name its files as {pattern}/**/*.txt.")
        paths.update(map(os.path.abspath, matches))
        if matches == [os.path.expanduser(pattern)]:
            named.add(os.path.abspath(matches[0]))
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = _read(flag, root, paths)
    for file in files:
        if not file.text and os.path.join(root, file.name) in named:
            raise ValueError(f"{flag}: {os.path.join(root, file.name)} is empty, leave it out.")
    files = [file for file in files if file.text]
    if not files:
        raise ValueError(f"{flag}: every file that matches is empty, name others.")
    files = _distinct(files)
    if len(files) >= MIN_FILES_TO_SPLIT_BY_FILE:
        train, validation = split_by_file(files)
    else:
        train, validation = _split_tail(flag, files)
    return _corpus(f"{len(files)} text file{'s'[: len(files) > 1]}", train, validation)


def find_files(pattern: str) -> list[str]:
    """The path itself where it exists, a folder too, else the files that it matches as a glob."""
    expanded = os.path.expanduser(pattern)
    if os.path.exists(expanded):
        return [expanded]
    return [path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]


def split_by_file(files: Sequence[_File], holdout: int = VALIDATION_SHARE) -> tuple[list[_File], list[_File]]:
    """Sends about one file in `holdout` to validation, always at least one, by the hash of its name."""
    hashes = {file.name: int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big") for file in files}
    held_out = {name for name, value in hashes.items() if value % holdout == 0}
    held_out = held_out or {min(hashes, key=hashes.__getitem__)}
    train = [file for file in files if file.name not in held_out]
    return train, [file for file in files if file.name in held_out]


def _split_tail(flag: str, files: Sequence[_File]) -> tuple[list[_File], list[_File]]:
    """Cuts the last 5 % of the concatenated files off, between two lines where there are any."""
    remaining = sum(len(file.text) for file in files) * (VALIDATION_SHARE - 1) // VALIDATION_SHARE
    train: list[_File] = []
    validation: list[_File] = []
    for file in files:
        cut = min(len(file.text), remaining)
        remaining -= cut
        if 0 < cut < len(file.text):
            newline = file.text.rfind(b"\n", 0, cut)
            cut = newline + 1 if newline > 0 else character_boundary(file.text, cut)
        train += [_File(file.name, file.text[:cut])] if cut else []
        validation += [_File(file.name, file.text[cut:])] if cut < len(file.text) else []
    if not train or not validation:
        raise ValueError(f"{flag}: too little text to hold 5 % out for validation, give more.")
    return train, validation


def character_boundary(text: bytes, cut: int) -> int:
    """The last position up to `cut` at which UTF-8 `text` can be cut between two characters."""
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _read(flag: str, root: str, paths: set[str] | list[str]) -> list[_File]:
    files = []
    for path in paths:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{flag}: cannot read {path} ({error.strerror}).") from error
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{flag}: {path} is not UTF-8 (byte {error.start}), convert it or leave it out."
            ) from error
        if SEPARATOR in text:
            raise ValueError(
                f"{flag}: {path} contains a zero byte, which separates documents, so leave it out or remove the byte."
            )
        files.append(_File(Path(os.path.relpath(path, root)).as_posix(), text))
    return sorted(files, key=lambda file: file.name)


def _distinct(files: Sequence[_File]) -> list[_File]:
    first_of: dict[bytes, _File] = {}
    for file in files:
        first_of.setdefault(file.text, file)
    return list(first_of.values())


def _corpus(name: str, train: Sequence[_File], validation: Sequence[_File]) -> TextCorpus:
    streams = [b"".join(file.text + SEPARATOR for file in files) for files in (train, validation)]
    description = f"{name}: {len(streams[0]):,} bytes to train on, {len(streams[1]):,} bytes held out"
    return TextCorpus(streams[0], streams[1], description)
