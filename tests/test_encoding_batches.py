"""Batches of encoded examples: every row once an epoch, in few lengths, from nothing but seed, epoch and step."""

import itertools

import numpy as np
import pytest

from experiments.encoding import Batches, Column, Rows, bucket_lengths


def ragged(lengths) -> Rows:
    """Rows whose ids are their own number, with a label by row, a label by position and a vector."""
    ids = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    count = len(lengths)
    return Rows(
        {
            "ids": Column(ids, 999),
            "labels": Column(np.arange(count, dtype=np.int32), -1, counts=True),
            "weights": Column([np.ones(length, np.float32) for length in lengths], counts=True),
            "vector": Column(np.arange(2 * count).reshape(count, 2)),
        }
    )


LENGTHS = np.random.default_rng(0).integers(1, 100, 203)


def test_every_row_comes_once_an_epoch_padded_and_counted():
    batches = Batches(ragged(LENGTHS), 16)
    orders: list[list[int]] = []
    together: dict[tuple[int, int], set[frozenset[int]]] = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        seen = []
        for step in range(batches.per_epoch):
            batch = batches.train(seed=seed, epoch=epoch, step=step)
            together.setdefault((seed, epoch), set()).add(frozenset(batch["row"].tolist()))
            length = batch["ids"].shape[1]
            assert length in batches.lengths and all(len(values) == 16 for values in batch.values())
            for i, row in enumerate(batch["row"].tolist()):
                held = batch["mask"][i].sum()
                number = batch["ids"][i, 0]
                assert held == LENGTHS[number] and batch["mask"][i, :held].all()
                assert (batch["ids"][i, :held] == number).all() and (batch["ids"][i, held:] == 999).all()
                assert batch["vector"][i].tolist() == [2 * number, 2 * number + 1]
                counts = row != -1
                assert batch["labels"][i] == (number if counts else -1) and (row == number or not counts)
                assert batch["weights"][i].sum() == (held if counts else 0)
            seen += batch["row"].tolist()
        assert sorted(row for row in seen if row != -1) == list(range(203))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len(set.union(*together.values())) > 2 * batches.per_epoch  # not the same ones together again


def test_same_arguments_same_batch_and_nothing_is_kept():
    batches, again = Batches(ragged(LENGTHS), 8), Batches(ragged(LENGTHS), 8)
    ahead = [batches.train(seed=3, epoch=2, step=step) for step in range(batches.per_epoch)]
    for step in (batches.per_epoch - 1, 0, 5):
        batch = again.train(seed=3, epoch=2, step=step)
        assert all(np.array_equal(batch[name], ahead[step][name]) for name in batch)
    with pytest.raises(ValueError, match=f"step {batches.per_epoch} must be from 0 to"):
        batches.train(seed=0, epoch=0, step=batches.per_epoch)


def test_outputs_come_back_by_row():
    batches = Batches(ragged(LENGTHS), 16)
    outputs = [(batch["ids"], batch["vector"][:, 0]) for batch in batches.once()]
    ids = batches.in_order(ids for ids, _ in outputs)
    assert all((row[: LENGTHS[i]] == i).all() for i, row in enumerate(ids)) and len(ids) == 203
    assert batches.in_order(vector for _, vector in outputs) == [2 * i for i in range(203)]
    with pytest.raises(ValueError, match="shorter"):
        batches.in_order(ids for ids, _ in outputs[:-1])


def test_images_are_batches_without_lengths():
    rows = Rows({"pixels": Column(np.arange(10.0)), "labels": Column(np.arange(10), -1, counts=True)})
    batches = Batches(rows, 4)
    assert batches.lengths == (0,) and batches.per_epoch == 3
    found = list(batches.once())
    assert {*found[2]} == {"row", "pixels", "labels"} and found[2]["labels"].tolist() == [8, 9, -1, -1]
    assert found[2]["pixels"].tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lengths_are_those_that_pad_least(count):
    rng = np.random.default_rng(count)
    lengths = rng.choice([3, 8, 9, 17, 30, 41, 64, 70], 40, p=np.array([8, 4, 1, 7, 2, 9, 5, 4]) / 40)
    multiples = sorted({-(-length // 8) * 8 for length in lengths.tolist()})
    padded = lambda chosen: sum(min(c for c in chosen if c >= length) for length in lengths)
    found = bucket_lengths(ragged(lengths[:20]), ragged(lengths[20:]), count=count)
    every = [c for n in range(1, count + 1) for c in itertools.combinations(multiples, n) if c[-1] == multiples[-1]]
    assert padded(found) == min(map(padded, every)) and len(found) <= count
    assert bucket_lengths(ragged([5, 5]), count=4) == (8,)


def test_lengths_can_be_given_and_must_hold_every_row():
    batches = Batches(ragged([3, 9]), 1, lengths=(16, 4, 32))
    assert [batch["ids"].shape for batch in batches.once()] == [(1, 4), (1, 16)]
    with pytest.raises(ValueError, match="A row of 9 positions does not fit into 8: give longer lengths."):
        Batches(ragged([3, 9]), 1, lengths=(8,))
    with pytest.raises(ValueError, match="--batch_size=0 must be 1 or more."):
        Batches(ragged([3]), 0)
    with pytest.raises(ValueError, match="There are no rows"):
        Batches(ragged([]), 1)
