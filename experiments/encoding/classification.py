"""Whole inputs with one label each: texts as pieces, images as numbers around zero."""

from __future__ import annotations

import numpy as np

from experiments.encoding.rows import IGNORED, Column, Rows
from experiments.encoding.subwords import Subwords
from experiments.tasks.examples import Images, LabelledTexts


def encode_texts(examples: LabelledTexts, subwords: Subwords, *, length: int) -> Rows:
    """Rows of labelled texts.

    Args:
      examples: texts.
      subwords: makes pieces.
      length: most positions of a row; a longer text loses its end, and is counted as cut.

    Returns:
      Columns `ids`, by position, and `labels`, int32 [rows].

    Raises:
      ValueError: `length` leaves no room for a text.
    """
    frame = subwords.single
    room = length - len(frame.opening) - len(frame.closing)
    if room < 1:
        raise ValueError(f"--length={length} has no room for a text between {length - room} special pieces, raise it.")
    pieces = [piece.ids for piece in subwords.split(examples.texts)]
    ids = [np.array([*frame.opening, *piece[:room], *frame.closing], np.int32) for piece in pieces]
    # A text of characters that the tokenizer drops still is a row.
    ids = [row if len(row) else np.array([subwords.unknown], np.int32) for row in ids]
    columns = {"ids": Column(ids), "labels": Column(examples.labels, IGNORED, counts=True)}
    return Rows(columns, sum(len(piece) > room for piece in pieces))


def image_statistics(train: Images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel of images to learn from, float32 [channels]; 1 for a deviation of 0."""
    axes = (0, 1, 2)
    mean, sd = train.pixels.mean(axes, np.float64).astype(np.float32), train.pixels.std(axes, np.float32)
    return mean, np.where(sd > 0, sd, np.float32(1))


def encode_images(examples: Images, statistics: tuple[np.ndarray, np.ndarray]) -> Rows:
    """Rows of labelled images.

    Args:
      examples: images.
      statistics: by `image_statistics`, which are taken out.

    Returns:
      Columns `pixels`, float32 [rows, height, width, channels], and `labels`, int32 [rows].
    """
    mean, sd = statistics
    pixels = examples.pixels.astype(np.float32)
    pixels -= mean
    pixels /= sd
    return Rows({"pixels": Column(pixels), "labels": Column(examples.labels, IGNORED, counts=True)})
