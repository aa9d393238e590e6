"""Which tokens step `n` sees: a pure function of (seed, step, row).

Nothing is kept between steps, so a resumed run needs only the step number, a process reads only
the rows that its devices hold, and runs that differ in precision, mesh or number of processes see
the same batches. Each epoch cuts the ring of training tokens at a random position into windows and
visits them in a random order, so every token is a target once per epoch, but for the fewer than
`seq_len` that do not fill a window.
"""

import numpy as np

from experiments.data.dataset import Dataset
from experiments.data.shards import check_ids
from experiments.data.shuffle import ROUNDS, permute
from experiments.data.streams import TokenStream


def check_batch(dataset: Dataset, *, batch_size: int, seq_len: int) -> None:
    """Checks what `train_batch` and `eval_batches` need, before anything is compiled.

    Raises:
        ValueError: a size below 1, or a split is shorter than one window.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be 1 or more.")
    if seq_len < 1:
        raise ValueError(f"--seq_len={seq_len} must be 1 or more.")
    if min(len(dataset.train), len(dataset.validation)) <= seq_len:
        raise ValueError(
            f"--seq_len={seq_len} needs {seq_len + 1} tokens in each split, but "
            f"--data={dataset.data} has {len(dataset.train)} to train on and "
            f"{len(dataset.validation)} held out, so lower it or give more data."
        )


def train_batch(
    dataset: Dataset, *, seed: int, step: int, batch_size: int, seq_len: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """Rows of the global batch of one step.

    Args:
        seed: 0 or more; another seed, another order.
        step: 0 or more.
        batch_size: rows of the global batch.
        seq_len: tokens that are predicted in a row.
        rows: which of them to read, integers; all by default.

    Returns:
        int32 [number of rows, seq_len + 1]: `[:, :-1]` are inputs, `[:, 1:]` targets.

    Raises:
        ValueError: see `check_batch`; a negative seed or step; an id outside the vocabulary.
    """
    check_batch(dataset, batch_size=batch_size, seq_len=seq_len)
    if seed < 0:
        raise ValueError(f"--seed={seed} must be 0 or more.")
    if step < 0:
        raise ValueError(f"step {step} must be 0 or more.")
    rows = np.arange(batch_size) if rows is None else rows
    starts = _window_starts(len(dataset.train), seq_len, seed, step * batch_size + rows.astype(np.int64))
    return _read(dataset, dataset.train, starts, seq_len)


def _window_starts(tokens: int, seq_len: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Positions, int64, at which the windows of these numbers begin."""
    windows = tokens // seq_len
    starts = np.empty(numbers.shape, np.int64)
    epochs, indices = np.divmod(numbers, windows)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        sequence = np.random.SeedSequence(seed, spawn_key=(int(epoch),))
        offset, *keys = sequence.generate_state(1 + ROUNDS, np.uint64)
        order = permute(indices[here], windows, np.array(keys))
        starts[here] = (int(offset) % tokens + order * seq_len) % tokens
    return starts


def eval_batches(
    dataset: Dataset, *, batch_size: int, seq_len: int, batches: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """The fixed held-out batches of a run: windows spread evenly over the validation split.

    They depend on neither the seed nor the step, and do not overlap unless the split has fewer
    windows than the last batch needs. Where the split holds fewer than `batches` batches, there
    are as many as cover it once.

    Args:
        batch_size: rows of a batch.
        seq_len: tokens that are predicted in a row.
        batches: how many at most.
        rows: which rows of each to read, integers; all by default.

    Returns:
        int32 [at most `batches`, number of rows, seq_len + 1].

    Raises:
        ValueError: see `check_batch`; `batches` below 1; an id outside the vocabulary.
    """
    check_batch(dataset, batch_size=batch_size, seq_len=seq_len)
    if batches < 1:
        raise ValueError(f"eval_batches needs 1 or more batches, not {batches}.")
    last_start = len(dataset.validation) - seq_len - 1
    windows = last_start // seq_len + 1
    batches = min(batches, -(-windows // batch_size))
    total = batches * batch_size
    starts = (np.arange(total) * last_start // max(1, total - 1)).reshape(batches, batch_size)
    mine = starts if rows is None else starts[:, rows]
    flat = _read(dataset, dataset.validation, mine.reshape(-1), seq_len)
    return flat.reshape(*mine.shape, seq_len + 1)


def _read(dataset: Dataset, stream: TokenStream, starts: np.ndarray, seq_len: int) -> np.ndarray:
    batch = np.stack([stream.read(int(start), seq_len + 1) for start in starts])
    check_ids(f"--data={dataset.data}", batch, dataset.vocab_size)
    return batch
