"""What the loss curve of one run tells: when it reached a loss, and how often it jumped up."""

from __future__ import annotations

import numpy as np

# A spike stands out of the lines of metrics before it. In white noise one line in a thousand would.
SPIKE_WINDOW, SPIKE_MADS = 16, 8.0
# Lines that are judged at a time: each is held with all those before it that it is judged by.
_STRETCH = 1 << 16


def tokens_to_reach(tokens: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """The tokens at which a curve, linear between its points, first comes down to a loss; None if it never does.

    Args:
      tokens: ascending [S]; of the first point, if that is low enough already.
      losses: [S]; where not finite, there is no point.
      target: the loss to reach.
    """
    known = np.isfinite(losses)
    tokens, losses = tokens[known].astype(np.float64), losses[known]
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return None
    i = reached[0]
    if i == 0:
        return float(tokens[0])
    # Not np.interp: the point before is above the target and this one is not, in that order.
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def spikes(losses: np.ndarray) -> int:
    """How often the training loss jumps up.

    A line of metrics spikes if its loss is above the median of the 16 lines before it by more than 8 times their median
    absolute deviation (5.4 standard deviations in normal noise). Spiking lines in a row are one spike. The first 16
    lines have nothing to be judged by.

    Args:
      losses: of the lines of metrics [S]; those that are not finite are left out.
    """
    losses = losses[np.isfinite(losses)]
    if len(losses) <= SPIKE_WINDOW:
        return 0
    is_spike = np.concatenate(
        [_stands_out(losses[start : start + _STRETCH + SPIKE_WINDOW]) for start in range(0, len(losses), _STRETCH)]
    )
    return int(is_spike[0]) + int(np.sum(is_spike[1:] & ~is_spike[:-1]))


def _stands_out(losses: np.ndarray) -> np.ndarray:
    """Whether each line [S] is above the lines before it; of all but the first, which have too few: bool [S - 16]."""
    if len(losses) <= SPIKE_WINDOW:
        return np.zeros(0, bool)
    before = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_WINDOW)[:-1]
    median = np.median(before, -1)
    deviation = np.median(np.abs(before - median[:, None]), -1)
    return losses[SPIKE_WINDOW:] > median + SPIKE_MADS * deviation
