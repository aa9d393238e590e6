"""How far a quantized decoder drifts from a wide one: what it makes of a text, and where greedy texts part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.data.streams import TokenStream
from experiments.generating.decoding import Decoder
from experiments.scoring.intervals import CONFIDENCE, Estimate, perplexity

_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Drift:
    """What two decoders make of the same text and prompts.

    Attributes:
      reference, measured: perplexities of the text, read through the cache.
      change: relative change of the perplexity from the first to the second, with the interval that it has for being
        one of pairs of windows.
      tokens: of the text.
      length: tokens of each greedy text.
      parted: for each prompt the number, from 1, of the first new token at which the greedy texts differ, or None.
    """

    reference: Estimate
    measured: Estimate
    change: Estimate
    tokens: int
    length: int
    parted: list[int | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def text(self, reference: str, measured: str) -> str:
        """For a person; the arguments are what the decoders are called."""
        from q8jax.report import aligned

        change = " to ".join(f"{100 * end:+.3f}" for end in (self.change.low, self.change.high))
        rows: list[Sequence[str]] = [
            ("", f"perplexity of {self.tokens:,} tokens", "change"),
            (reference, self.reference.text(), ""),
            (measured, self.measured.text(), f"{100 * self.change.value:+.3f} % ({change})"),
        ]
        parted = sorted(place for place in self.parted if place is not None)
        same = len(self.parted) - len(parted)
        where = f"; the others part at token {', '.join(map(str, parted))}" if parted else ""
        greedy = f"{same} of {len(self.parted)} greedy texts of {self.length} tokens are the same{where}."
        return "\n".join([*aligned(rows), greedy])


def windows(stream: TokenStream | np.ndarray, length: int, tokens: int) -> np.ndarray:
    """Windows of a text, int [windows, length + 1], in which each token but the first is predicted once.

    Args:
      stream: the text.
      length: tokens that are predicted in a window.
      tokens: how many at most in all, spread evenly over the text.

    Raises:
      ValueError: the text is shorter than a window.
    """
    whole = (len(stream) - 1) // length
    count = min(whole, max(1, tokens // length))
    if whole < 1:
        raise ValueError(f"The text has {len(stream)} tokens, where a window has {length + 1}: give a longer one.")
    # Each batch of windows has the same shape, or one program would be compiled for the last.
    count = count // _ROWS * _ROWS or count
    starts = np.arange(count) * whole // count * length
    read = stream.read if isinstance(stream, TokenStream) else lambda start, n: stream[start : start + n]
    return np.stack([read(int(start), length + 1) for start in starts]).astype(np.int32)


def compare(
    reference: Decoder, measured: Decoder, texts: np.ndarray, prompts: Sequence[np.ndarray], *, slots: int, new: int
) -> Drift:
    """Measures the drift.

    Args:
      reference, measured: decoders, which are to be greedy.
      texts: windows of a text.
      prompts: of the greedy texts.
      slots, new: as `Decoder.generate`.
    """
    predicted = texts.shape[1] - 1
    batches = np.array_split(texts, max(1, len(texts) // _ROWS))
    losses = [np.concatenate([decoder.losses(batch) for batch in batches]) for decoder in (reference, measured)]
    written = [_written(decoder, prompts, slots, new) for decoder in (reference, measured)]
    parted = [_parted(*pair) for pair in zip(*written, strict=True)]
    pieces = np.full(len(texts), predicted)
    perplexities = [perplexity(nats, pieces) for nats in losses]
    change = _change((losses[1] - losses[0]) / predicted)
    return Drift(perplexities[0], perplexities[1], change, len(texts) * predicted, new, parted)


def _written(decoder: Decoder, prompts: Sequence[np.ndarray], slots: int, new: int) -> list[np.ndarray]:
    parts = decoder.generate(prompts, range(len(prompts)), slots=slots, new=new, seed=0)
    return [np.concatenate(row) for row in zip(*parts, strict=True)]


def _parted(first: np.ndarray, second: np.ndarray) -> int | None:
    common = min(len(first), len(second))
    differ = np.flatnonzero(first[:common] != second[:common])
    if len(differ):
        return int(differ[0]) + 1
    return None if len(first) == len(second) else common + 1


def _change(differences: np.ndarray) -> Estimate:
    """Of a perplexity, from the differences of the mean losses of windows."""
    middle, half = float(np.mean(differences)), 0.0
    if (n := len(differences)) > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n))
    return Estimate(math.expm1(middle), math.expm1(middle - half), math.expm1(middle + half), n)
