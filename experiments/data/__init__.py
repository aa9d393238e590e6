"""Pretraining data: a source, a tokenizer, and batches that depend only on (seed, step, process).

dataset = load("stdlib", "bpe:4096", cache_dir)
shape = dict(batch_size=64, seq_len=256)
check_batch(dataset, **shape)
for batch in prefetch(lambda step: train_batch(dataset, seed=0, step=step, **shape), 0, 300):
    inputs, targets = batch[:, :-1], batch[:, 1:]
"""

from experiments.data.batches import check_batch, eval_batches, train_batch
from experiments.data.dataset import Dataset, load
from experiments.data.prefetch import prefetch
from experiments.data.streams import TokenStream

__all__ = [
    "Dataset",
    "TokenStream",
    "check_batch",
    "eval_batches",
    "load",
    "prefetch",
    "train_batch",
]
