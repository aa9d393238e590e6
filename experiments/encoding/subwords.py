"""Text in the pieces that a model reads: those of a tokenizer.json, or bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.data.bpe import huggingface
from experiments.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """A text in pieces.

    Attributes:
      ids: int32 [pieces].
      offsets: int32 [pieces, 2], the characters of the text that each is made of, `text[start:stop]`.
    """

    ids: np.ndarray
    offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a model expects around its input: special pieces, and to which of two texts each belongs.

    Attributes:
      opening, middle, closing: ids before the first text, between two, and at the end.
      types: of the opening, the first text, the middle, the second text, and the closing.
    """

    opening: tuple[int, ...]
    middle: tuple[int, ...]
    closing: tuple[int, ...]
    types: tuple[int, int, int, int, int]


class Subwords:
    """A tokenizer as tasks need it.

    Attributes:
      name: what it was made from, as the user wrote it.
      vocab_size: ids are below it.
      single, pair: what stands around one text, and around two.
      unknown: stands for a word that has no pieces, being of characters that the tokenizer drops.
      separator: ends a document; no text has it.
    """

    def __init__(self, tokenizer: TextTokenizer):
        """Of a tokenizer of `experiments.data`, which may be one that was trained for a run."""
        self.name, self.vocab_size, self.separator = tokenizer.name, tokenizer.vocab_size, tokenizer.separator
        self.unknown = self.separator
        self.single = self.pair = Frame((), (self.separator,), (), (0, 0, 0, 1, 1))
        self._library = None
        self._cache: dict[str, Pieces] = {}
        if tokenizer.json is not None:
            self._library = library = huggingface(f"--tokenizer={tokenizer.name}").Tokenizer.from_str(tokenizer.json)
            library.no_truncation()
            library.no_padding()
            library.encode_special_tokens = True
            unknown = getattr(library.model, "unk_token", None)
            self.unknown = library.token_to_id(unknown) if unknown else self.separator
            one, two = library.encode("a"), library.encode("a", "a")
            self.single, self.pair = _frame(one), _frame(two)
        # Whether words run together, as bytes do and pieces with a mark of their own for a beginning do not.
        letter = self.split(["a"])[0].ids
        self._needs_blanks = self.decode(np.concatenate([letter, letter])) == "aa"

    @classmethod
    def load(cls, tokenizer: str) -> Subwords:
        """Of "bytes", or the path of a tokenizer.json.

        Raises:
          ValueError: the file is missing or is no tokenizer.
        """
        if tokenizer == "bytes":
            return cls(ByteTokenizer())
        try:
            with open(tokenizer, encoding="utf-8") as file:
                json = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--tokenizer={tokenizer} cannot be read ({error}), choose another file.") from error
        return cls(HuggingFaceTokenizer(tokenizer, json))

    def split(self, texts: Sequence[str]) -> list[Pieces]:
        """Pieces of each text, which may be none; a text that spells a special piece is not that piece."""
        if self._library is None:
            return [_bytes(text) for text in texts]
        encodings = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [
            Pieces(np.array(one.ids, np.int32), np.array(one.offsets, np.int32).reshape(-1, 2)) for one in encodings
        ]

    def words(self, words: Iterable[str]) -> list[np.ndarray]:
        """Pieces of each word, at least one: int32 [pieces]. A word has the same ones wherever it stands.

        They tell where it begins; where only a blank does that, it is the beginning of the word.
        """
        words = list(words)
        new = [word for word in dict.fromkeys(words) if word not in self._cache]
        blank = " " * self._needs_blanks
        self._cache.update(zip(new, self.split([blank + word for word in new]), strict=True))
        nothing = np.array([self.unknown], np.int32)
        return [ids if len(ids := self._cache[word].ids) else nothing for word in words]

    def special(self, text: str) -> np.ndarray:
        """int32 [pieces] of a marker of a template: the special piece of this name, or its text in pieces."""
        found = None if self._library is None else self._library.token_to_id(text)
        return self.split([text])[0].ids if found is None else np.array([found], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of pieces, int [pieces], without special ones."""
        if self._library is None:
            return ByteTokenizer().decode(ids[ids != self.separator])
        return self._library.decode(ids.tolist(), skip_special_tokens=True)


def _bytes(text: str) -> Pieces:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    character = np.cumsum(ids & 0xC0 != 0x80, dtype=np.int32) - 1
    return Pieces(ids, np.stack([character, character + 1], axis=1))


def _frame(encoding: Any) -> Frame:
    """What an encoding of one text or two has around them."""
    of = encoding.sequence_ids
    first, second = ([i for i, number in enumerate(of) if number == which] for which in (0, 1))
    gaps = [range(first[0]), range(first[-1] + 1, second[0] if second else len(of))]
    gaps += [range(second[-1] + 1, len(of)) if second else range(0)]
    opening, middle, closing = (tuple(encoding.ids[i] for i in gap) for gap in gaps)
    kind = lambda places: encoding.type_ids[places[0]] if len(places) else 0
    types = (kind(gaps[0]), kind(first), kind(gaps[1]), kind(second), kind(gaps[2]))
    return Frame(opening, middle, closing, types) if second else Frame(opening, (), middle, types)
