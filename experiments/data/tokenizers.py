"""Text to token ids and back: bytes, byte-level BPE trained on the run's text, or a given file."""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

import numpy as np

from experiments.data.bpe import (
    END_OF_TEXT,
    MAX_VOCAB,
    MIN_VOCAB,
    huggingface,
    pieces,
    train_bpe,
)
from experiments.data.cache import replacing
from experiments.data.spec import nearest
from experiments.data.streams import smallest_dtype

CHOICES = ("auto", "bytes", "given", "bpe:SIZE", "PATH/tokenizer.json")
_END_OF_TEXT_NAMES = (
    END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]",
)  # fmt: skip
_BATCH_CHARACTERS = 2**20


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; zero is the separator."""

    name: str = "bytes"
    vocab_size: int = 256
    separator: int = 0
    json: None = None

    def encode(self, text: str) -> np.ndarray:
        """uint8 [bytes of `text`]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_stream(self, stream: bytes) -> np.ndarray:
        """uint8 [len(stream)], without copying."""
        return np.frombuffer(stream, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens`, any integer dtype [n]; broken characters become U+FFFD."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face `tokenizers` library.

    Invariants: every id is in `range(vocab_size)`; `separator` is a special token that no text
    encodes to; `json` rebuilds the tokenizer.
    """

    def __init__(self, name: str, json: str):
        self.name = name
        self.json = json
        flag = f"--tokenizer={name}"
        library = huggingface(flag)
        try:
            self._tokenizer = library.Tokenizer.from_str(json)
        except Exception as error:  # the library has no narrower type for what it cannot parse
            raise ValueError(f"{flag} is not a Hugging Face tokenizer.json ({error}), choose another file.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not stored in the file: text that spells a special token must not become that token.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder().values()
        specials = {token.content for token in added if token.special}
        found = [text for text in _END_OF_TEXT_NAMES if text in specials]
        if not found:
            raise ValueError(
                f"{flag} has no special token to separate documents, add one of {', '.join(_END_OF_TEXT_NAMES)} to it."
            )
        self.separator: int = vocabulary[found[0]]
        self.vocab_size: int = max(vocabulary.values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, the narrowest unsigned dtype [n], without special tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, smallest_dtype(self.vocab_size))

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens`, any integer dtype [n]; separators appear by name."""
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def encode_stream(self, stream: bytes) -> np.ndarray:
        """Ids of a whole corpus, every document followed by the separator.

        Args:
            stream: UTF-8 documents, each ended by a zero byte.

        Returns:
            The narrowest unsigned dtype that holds the vocabulary, [tokens].
        """
        dtype = smallest_dtype(self.vocab_size)
        arrays: list[np.ndarray] = []
        batch: list[tuple[str, bool]] = []
        characters = 0

        def encode_batch():
            texts = [text for text, _ in batch]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for encoding, (_, is_last) in zip(encodings, batch, strict=True):
                arrays.append(np.array(encoding.ids + [self.separator] * is_last, dtype))
            batch.clear()

        for text, is_last in pieces(stream):
            batch.append((text, is_last))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                encode_batch()
                characters = 0
        encode_batch()
        return np.concatenate(arrays)

    def is_lossless(self, text: str) -> bool:
        """Whether decoding gives `text` back: False for tokenizers that lower-case or drop."""
        return self.decode(self.encode(text)) == text


@dataclasses.dataclass(frozen=True)
class GivenTokens:
    """Stands where a source has ids and no text: shards and the Markov chain."""

    vocab_size: int
    name: str = "given"
    separator: None = None
    json: None = None

    def encode(self, text: str) -> np.ndarray:
        raise ValueError("--tokenizer=given cannot encode text, use a run with a text tokenizer.")

    def decode(self, tokens: np.ndarray) -> str:
        raise ValueError("--tokenizer=given cannot decode to text, print the ids instead.")


TextTokenizer = ByteTokenizer | HuggingFaceTokenizer
Tokenizer = TextTokenizer | GivenTokens


def check_choice(tokenizer: str, *, data: str, source_has_text: bool) -> None:
    """Raises ValueError unless `tokenizer` is a valid `--tokenizer` for this kind of source."""
    flag = f"--tokenizer={tokenizer}"
    kind, colon, size = tokenizer.partition(":")
    if kind == "bpe" and colon:
        if not re.fullmatch(r"[0-9]+", size) or not MIN_VOCAB <= int(size) <= MAX_VOCAB:
            raise ValueError(
                f"{flag}: the vocabulary must be an integer from {MIN_VOCAB} to {MAX_VOCAB}, as in bpe:4096."
            )
    elif tokenizer.endswith(".json"):
        if not os.path.isfile(os.path.expanduser(tokenizer)):
            raise ValueError(f"{flag}: there is no such file, check the path.")
    elif tokenizer not in ("auto", "bytes", "given"):
        near = nearest(tokenizer, ("auto", "bytes", "given", "bpe:4096"))
        raise ValueError(f"{flag} is unknown{near}: choose one of {', '.join(CHOICES)}.")
    if source_has_text and tokenizer == "given":
        raise ValueError(f"{flag}: --data={data} is text, choose bytes, bpe:SIZE or a file.")
    if not source_has_text and tokenizer not in ("auto", "given"):
        raise ValueError(f"{flag}: --data={data} is tokens already, use --tokenizer=auto.")


def text_tokenizer(tokenizer: str, train: bytes, cache_dir: Path) -> TextTokenizer:
    """Builds the tokenizer of a text corpus, training it where it has to be trained.

    Args:
        tokenizer: a `--tokenizer` value that `check_choice` accepts for text.
        train: the training split; a trained tokenizer sees nothing else.
        cache_dir: trained tokenizers are kept here, keyed by vocabulary and SHA-256 of `train`.

    Raises:
        ValueError: the file cannot be read or used, or the cache cannot be written.
    """
    if tokenizer in ("auto", "bytes"):
        return ByteTokenizer()
    if tokenizer.startswith("bpe:"):
        vocab_size = int(tokenizer.removeprefix("bpe:"))
        path = cache_dir / f"bpe-{vocab_size}-{hashlib.sha256(train).hexdigest()[:32]}.json"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(train_bpe(train, vocab_size), encoding="utf-8")
        return HuggingFaceTokenizer(tokenizer, path.read_text(encoding="utf-8"))
    try:
        json = Path(tokenizer).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tokenizer={tokenizer} cannot be read ({error}), choose another file.") from error
    return HuggingFaceTokenizer(tokenizer, json)
