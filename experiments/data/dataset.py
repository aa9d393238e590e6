"""From the `--data` and `--tokenizer` strings to tokens, everything checked before training."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from experiments.data import markov, shards, text
from experiments.data.cache import cached_array
from experiments.data.spec import nearest, parse_integers
from experiments.data.streams import TokenStream
from experiments.data.tokenizers import (
    GivenTokens,
    HuggingFaceTokenizer,
    Tokenizer,
    check_choice,
    text_tokenizer,
)

SOURCES = ("stdlib[:holdout=…]", "markov[:order=…,vocab=…,tokens=…,seed=…]", "text:FILES", "shards:FOLDER")
_NAMES = ("stdlib", "markov", "text", "shards")
_LOSSLESS_SAMPLE = 2**16


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokens to train on and tokens held out.

    Invariants: both streams hold at least two tokens; ids are below `vocab_size` (those of shards
    are checked as they are read).

    Attributes:
        data: the `--data` value.
        train, validation: the two splits, with no document in both.
        tokenizer: its `name` is the resolved `--tokenizer`.
        sha256: of the bytes of each split (`train`, `validation`) and, where there is one, of the
            `tokenizer` JSON. Of shards, of which each is sampled, by their names.
        bytes_per_token: of the held-out text, separators counted on both sides, so that nats per
            token divided by it are nats per byte. None without text, or where decoding loses some.
        entropy_floor: lowest possible expected loss in nats per token, None where unknown.
        description: one line for a person.
    """

    data: str
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    sha256: dict[str, str]
    bytes_per_token: float | None
    entropy_floor: float | None
    description: str

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def load(data: str, tokenizer: str, cache_dir: str | os.PathLike) -> Dataset:
    """Reads, splits and tokenizes a source.

    Args:
        data: `stdlib` with optional `holdout`, one file in so many being held out; `markov` with
            optional `order`, `vocab`, `tokens`, `seed`; `text:` and paths or globs with commas
            between them, or one path or glob that exists;
            `shards:` and a folder or glob, optionally `,vocab=50304`.
        tokenizer: `auto` (bytes for text, else the source's own ids), `bytes`, `bpe:SIZE`, a path
            that ends in `.json`, or `given`.
        cache_dir: trained tokenizers and encoded corpora are kept here; `bytes` needs none of it.

    Raises:
        ValueError: one sentence that names the flag, what is wrong and what to do.
    """
    name, colon, rest = data.partition(":")
    patterns = [pattern.strip() for pattern in rest.split(",")]
    if name not in _NAMES or (name == "text" and not colon):
        if not text.find_files(data):
            raise ValueError(
                f"--data={data} is neither a source{nearest(name, _NAMES)} nor a file: "
                f"choose one of {', '.join(SOURCES)}."
            )
        name, patterns = "text", [data]
    check_choice(tokenizer, data=data, source_has_text=name in ("stdlib", "text"))
    flag = f"--data={data}"
    if name == "stdlib":
        given = parse_integers(flag, rest.split(",") if colon else [], {"holdout": (2, 1000)})
        return _load_text(data, text.stdlib_corpus(**given), tokenizer, Path(cache_dir))
    if name == "text":
        corpus = text.text_corpus(flag, patterns)
        return _load_text(data, corpus, tokenizer, Path(cache_dir))
    options = rest.split(",") if colon else []
    if name == "markov":
        return _load_markov(data, options)
    return _load_shards(data, options)


def _load_text(data: str, corpus: text.TextCorpus, choice: str, cache_dir: Path) -> Dataset:
    tokenizer = text_tokenizer(choice, corpus.train, cache_dir)
    streams = {"train": corpus.train, "validation": corpus.validation}
    sha256 = {split: hashlib.sha256(stream).hexdigest() for split, stream in streams.items()}
    lossless = True
    if isinstance(tokenizer, HuggingFaceTokenizer):
        sha256["tokenizer"] = hashlib.sha256(tokenizer.json.encode()).hexdigest()
        # Encoding is the slow part (0.5 s per MB on 2 cores), and every resume would repeat it.
        tokens = {
            split: cached_array(
                cache_dir / f"tokens-{sha256[split][:32]}-{sha256['tokenizer'][:32]}.npz",
                functools.partial(tokenizer.encode_stream, stream),
            )
            for split, stream in streams.items()
        }
        cut = text.character_boundary(corpus.validation, _LOSSLESS_SAMPLE)
        sample = corpus.validation[:cut].replace(text.SEPARATOR, b"").decode("utf-8")
        lossless = tokenizer.is_lossless(sample)
    else:
        tokens = {split: tokenizer.encode_stream(stream) for split, stream in streams.items()}
    return Dataset(
        data=data,
        train=TokenStream([tokens["train"]]),
        validation=TokenStream([tokens["validation"]]),
        tokenizer=tokenizer,
        sha256=sha256,
        bytes_per_token=len(corpus.validation) / len(tokens["validation"]) if lossless else None,
        entropy_floor=None,
        description=f"{corpus.description}; tokenizer {tokenizer.name}, vocabulary {tokenizer.vocab_size}",
    )


def _load_markov(data: str, options: list[str]) -> Dataset:
    ranges = {"order": (1, 8), "vocab": (2, 4096), "tokens": (100, 10**8), "seed": (0, 2**63 - 1)}
    source = markov.MarkovSource(**parse_integers(f"--data={data}", options, ranges))
    floor = source.entropy_floor
    tokens = source.sample()
    cut = len(tokens) - len(tokens) // text.VALIDATION_SHARE
    splits = {"train": tokens[:cut], "validation": tokens[cut:]}
    return Dataset(
        data=data,
        train=TokenStream([splits["train"]]),
        validation=TokenStream([splits["validation"]]),
        tokenizer=GivenTokens(source.vocab),
        sha256={split: hashlib.sha256(_bytes(part)).hexdigest() for split, part in splits.items()},
        bytes_per_token=None,
        entropy_floor=floor,
        description=f"Markov chain of order {source.order} over {source.vocab} tokens: "
        f"{cut:,} tokens to train on, {len(tokens) - cut:,} held out; "
        f"floor {floor:.4f} nats per token",
    )


def _bytes(tokens: np.ndarray) -> bytes:
    return tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()


def _load_shards(data: str, options: list[str]) -> Dataset:
    flag = f"--data={data}"
    pattern = options[0] if options else ""
    if not pattern:
        raise ValueError(f"{flag}: name the folder or glob of the shards, as in shards:FOLDER.")
    given = parse_integers(flag, options[1:], {"vocab": (2, 2**16)})
    vocab_size = given.get("vocab", shards.GPT2_VOCAB)
    train, validation = shards.find_shards(flag, pattern, vocab_size)
    counts = [sum(map(len, split)) for split in (train, validation)]
    return Dataset(
        data=data,
        train=TokenStream(train),
        validation=TokenStream(validation),
        tokenizer=GivenTokens(vocab_size),
        sha256=shards.digests([*train, *validation]),
        bytes_per_token=None,
        entropy_floor=None,
        description=f"{len(train) + len(validation)} token shards: {counts[0]:,} tokens to train "
        f"on, {counts[1]:,} held out; vocabulary {vocab_size}",
    )
