"""The Markov source: its floor is the true entropy rate and its tokens follow the chain."""

import numpy as np
import pytest

from experiments.data import load
from experiments.data.markov import MarkovSource


def entropy_rate(source: MarkovSource) -> float:
    """Oracle: the stationary distribution as a left eigenvector of the chain over contexts."""
    transitions = source.transitions()
    contexts = source.vocab**source.order
    dense = np.zeros((contexts, contexts))
    for context in range(contexts):
        for token in range(source.vocab):
            dense[context, (context * source.vocab + token) % contexts] += transitions[context, token]
    values, vectors = np.linalg.eig(dense.T)
    pi = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    pi /= pi.sum()
    return float(-(pi[:, None] * transitions * np.log(transitions)).sum())


@pytest.mark.parametrize(("order", "vocab"), [(1, 2), (1, 40), (2, 7), (3, 4)])
def test_floor_is_the_entropy_rate(order, vocab):
    for seed in range(3):
        source = MarkovSource(order=order, vocab=vocab, seed=seed)
        np.testing.assert_allclose(source.transitions().sum(axis=1), 1.0, rtol=1e-12)
        assert source.entropy_floor == pytest.approx(entropy_rate(source), rel=1e-9)
        assert 0 < source.entropy_floor < np.log(vocab)


def test_floor_of_a_known_chain(monkeypatch):
    # Leaves state 0 with probability 0.2 and state 1 with 0.3: π = (0.6, 0.4).
    known = np.array([[0.8, 0.2], [0.3, 0.7]])
    monkeypatch.setattr(MarkovSource, "transitions", lambda self: known)
    source = MarkovSource(order=1, vocab=2, tokens=40_000)
    floor = -0.6 * (0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    floor += -0.4 * (0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    assert source.entropy_floor == pytest.approx(floor, rel=1e-12)
    tokens = source.sample()
    assert tokens.mean() == pytest.approx(0.4, abs=0.02)
    assert tokens[1:][tokens[:-1] == 0].mean() == pytest.approx(0.2, abs=0.01)


def test_true_model_reaches_the_floor_and_a_shorter_context_does_not():
    source = MarkovSource(order=2, vocab=8, tokens=100_000, seed=3)
    tokens, transitions = source.sample().astype(int), source.transitions()
    losses = -np.log(transitions[tokens[:-2] * 8 + tokens[1:-1], tokens[2:]])
    error = losses.std() / np.sqrt(len(losses))
    assert losses.mean() == pytest.approx(source.entropy_floor, abs=4 * error)
    pairs = np.zeros((8, 8))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    bigram = -np.log(pairs / pairs.sum(axis=1, keepdims=True))[tokens[:-1], tokens[1:]].mean()
    assert bigram > source.entropy_floor + 0.1


def test_load_is_deterministic_and_seed_matters(tmp_path):
    data = "markov:order=1,vocab=300,tokens=5000,seed=4"
    first, second = (load(data, "auto", tmp_path) for _ in range(2))
    other = load(data.replace("seed=4", "seed=5"), "given", tmp_path)
    assert first.sha256 == second.sha256
    assert first.sha256["train"] != other.sha256["train"]
    assert (len(first.train), len(first.validation)) == (4750, 250)
    assert first.train.parts[0].dtype == np.uint16
    assert (first.vocab_size, first.bytes_per_token) == (300, None)
    assert first.entropy_floor == MarkovSource(order=1, vocab=300, seed=4).entropy_floor
    with pytest.raises(ValueError, match="--tokenizer=given cannot decode"):
        first.tokenizer.decode(np.array([1]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ordr=2", "did you mean 'order'"),
        ("", "unknown option ''"),
        ("order", "order must be an integer from 1 to 8, not ''"),
        ("order=0", "order must be an integer from 1"),
        ("vocab=1.5", "vocab must be an integer from 2"),
        ("seed=-1", "seed must be an integer from 0"),
        ("order=1,order=2", "'order' is given twice"),
        ("order=4,vocab=64", "so lower one of them"),
    ],
)
def test_errors_are_one_sentence_that_names_the_flag(options, says, tmp_path):
    with pytest.raises(ValueError) as error:
        load(f"markov:{options}", "auto", tmp_path)
    message = str(error.value)
    assert message.startswith("--data=markov") and says in message
    assert message.endswith(".") and ". " not in message
