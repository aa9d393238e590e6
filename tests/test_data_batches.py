"""Order is a pure function of (seed, step, process), and every token is a target once per epoch."""

import numpy as np
import pytest

from experiments.data import Dataset, TokenStream, check_batch, eval_batches, train_batch
from experiments.data.shuffle import ROUNDS, permute
from experiments.data.tokenizers import GivenTokens

SEQ_LEN = 7


def positions(train: int, validation: int = 500) -> Dataset:
    """A dataset whose tokens are their own positions."""
    vocabulary = max(train, validation)
    return Dataset(
        data="positions",
        train=TokenStream([np.arange(train, dtype=np.uint32)]),
        validation=TokenStream([np.arange(validation, dtype=np.uint32)]),
        tokenizer=GivenTokens(vocabulary),
        sha256={},
        bytes_per_token=None,
        entropy_floor=None,
        description="",
    )


def rows(dataset: Dataset, seed: int, first: int, stop: int) -> np.ndarray:
    return np.concatenate(
        [train_batch(dataset, seed=seed, step=step, batch_size=1, seq_len=SEQ_LEN) for step in range(first, stop)]
    )


@pytest.mark.parametrize("tokens", [8, 14, 100, 701, 1400])
def test_every_token_is_a_target_once_per_epoch(tokens):
    dataset = positions(tokens)
    windows = tokens // SEQ_LEN
    orders = []
    for epoch in range(3):
        epoch_rows = rows(dataset, 0, epoch * windows, (epoch + 1) * windows)
        assert (np.diff(epoch_rows, axis=1) % tokens == 1).all()  # contiguous on the ring
        targets = epoch_rows[:, 1:].reshape(-1)
        assert len(np.unique(targets)) == len(targets) > tokens - SEQ_LEN
        orders.append(epoch_rows[:, 0].tolist())
    if tokens >= 100:
        assert orders[0] != orders[1] != orders[2]
        phases = {order[0] % SEQ_LEN for order in orders}
        offsets = {min(order) for order in orders}
        assert len(phases | offsets) > 1  # windows are cut elsewhere in another epoch
        steps = np.diff(orders[0])
        assert len(np.unique(steps)) > len(steps) / 4  # not in reading order


def test_same_arguments_same_batch_and_steps_need_no_history():
    dataset = positions(10_000)
    options = {"seed": 3, "batch_size": 8, "seq_len": SEQ_LEN}
    forwards = [train_batch(dataset, step=step, **options) for step in range(250)]
    for step in (249, 0, 177, 178):  # step 178 straddles two epochs
        np.testing.assert_array_equal(train_batch(dataset, step=step, **options), forwards[step])
    assert forwards[0].shape == (8, SEQ_LEN + 1) and forwards[0].dtype == np.int32


def test_batch_size_only_regroups_rows_even_over_epochs():
    dataset = positions(150)
    large = train_batch(dataset, seed=1, step=0, batch_size=64, seq_len=SEQ_LEN)
    np.testing.assert_array_equal(large, rows(dataset, 1, 0, 64))


def scalar_permute(index: int, size: int, keys: list[int]) -> int:
    """Oracle in unbounded integers."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = divmod(index, 2**half)
        for key in keys:
            mixed = (right + key) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 31) % 2**half
        index = left * 2**half + right
        if index < size:
            return index


def test_order_is_the_documented_one_and_stays():
    """Pinned too: a change of order would silently break the resume of every stored run."""
    batch = train_batch(positions(1000), seed=0, step=5, batch_size=4, seq_len=SEQ_LEN)
    sequence = np.random.SeedSequence(0, spawn_key=(0,))
    offset, *round_keys = sequence.generate_state(1 + ROUNDS, np.uint64).tolist()
    starts = [(offset + SEQ_LEN * scalar_permute(window, 142, round_keys)) % 1000 for window in range(20, 24)]
    assert batch[:, 0].tolist() == starts == [450, 157, 338, 590]


def test_seeds_differ():
    dataset = positions(10_000)
    starts = {seed: tuple(rows(dataset, seed, 0, 20)[:, 0]) for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**70)}
    assert len(set(starts.values())) == len(starts)


def test_any_rows_are_those_of_the_global_batch():
    dataset = positions(150)  # of which a batch takes more than an epoch
    for make in (
        lambda **kw: train_batch(dataset, seed=5, step=11, batch_size=64, seq_len=SEQ_LEN, **kw),
        lambda **kw: eval_batches(dataset, batch_size=64, seq_len=SEQ_LEN, batches=3, **kw),
    ):
        for some in ([0], [63, 5, 5], range(40, 64), range(64)):
            np.testing.assert_array_equal(make(rows=np.array(some)), make()[..., list(some), :])


def test_eval_windows_are_spread_evenly_and_do_not_overlap():
    batches = eval_batches(positions(1000, 5000), batch_size=10, seq_len=SEQ_LEN, batches=4)
    assert batches.shape == (4, 10, SEQ_LEN + 1) and batches.dtype == np.int32
    starts = batches[..., 0].reshape(-1)
    assert starts[0] == 0 and batches[-1, -1, -1] == 4999
    assert set(np.diff(starts)) <= {127, 128, 129}
    full = eval_batches(positions(1000, 701), batch_size=10, seq_len=SEQ_LEN, batches=10)
    assert sorted(full[..., 1:].reshape(-1)) == list(range(1, 701))


@pytest.mark.parametrize("validation", [8, 20, 700, 702])
def test_a_small_split_is_covered_once_and_no_more(validation):
    batches = eval_batches(positions(1000, validation), batch_size=6, seq_len=SEQ_LEN, batches=99)
    windows = (validation - 1) // SEQ_LEN
    assert len(batches) == -(-windows // 6)
    assert batches.max() == validation - 1 or validation == 8
    assert (np.diff(batches, axis=-1) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 0, "seq_len": 8}, "--batch_size=0 must be 1 or more"),
        ({"batch_size": 4, "seq_len": 0}, "--seq_len=0 must be 1 or more"),
        ({"batch_size": 4, "seq_len": 50}, "--seq_len=50 needs 51 tokens in each split"),
        ({"batch_size": 4, "seq_len": 100}, "--seq_len=100 needs 101 tokens in each split"),
    ],
)
def test_errors_are_one_sentence_that_names_the_flag(arguments, says):
    dataset = positions(100, 50)
    for call in (
        lambda: check_batch(dataset, **arguments),
        lambda: train_batch(dataset, seed=0, step=0, **arguments),
        lambda: eval_batches(dataset, batches=1, **arguments),
    ):
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert message.startswith(says) and message.endswith(".") and ". " not in message


def test_negative_seed_and_step_are_refused():
    dataset = positions(100)
    with pytest.raises(ValueError, match=r"^--seed=-1 must be"):
        train_batch(dataset, seed=-1, step=0, batch_size=1, seq_len=8)
    with pytest.raises(ValueError, match=r"^step -1 must be"):
        train_batch(dataset, seed=0, step=-1, batch_size=1, seq_len=8)
    with pytest.raises(ValueError, match=r"^eval_batches needs 1 or more"):
        eval_batches(dataset, batch_size=1, seq_len=8, batches=0)


def keys(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 65537])
def test_permute_is_a_bijection(size):
    assert sorted(permute(np.arange(size), size, keys(size))) == list(range(size))


def test_permute_of_a_huge_domain_needs_no_memory_and_stays_inside():
    for size in (10**12 + 39, 2**62):
        out = permute(np.arange(0, size, size // 1000), size, keys(1))
        assert len(np.unique(out)) == len(out)
        assert 0 <= out.min() < size // 50 and size - size // 50 < out.max() < size


def test_permute_looks_uniform():
    size, draws = 12, 2000
    out = np.stack([permute(np.arange(size), size, keys(seed)) for seed in range(draws)])
    places = np.stack([np.bincount(column, minlength=size) for column in out.T])
    pairs = np.zeros((size, size))
    np.add.at(pairs, (out[:, 3], out[:, 4]), 1)
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    for counts in (places.reshape(-1), off_diagonal):
        expected = counts.mean()
        deviation = np.sqrt(((counts - expected) ** 2).mean() / expected)
        assert 0.8 < deviation < 1.2  # 1 for Poisson counts
