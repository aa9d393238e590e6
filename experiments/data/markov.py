"""A synthetic source whose best possible loss is known: a Markov chain of any order.

A learning curve on text has no visible floor. Here the floor is the entropy rate of the chain,
H = -Σ_c π(c) Σ_t P(t|c) ln P(t|c) nats per token, with π the stationary distribution over contexts
c of `order` tokens (Shannon, "A Mathematical Theory of Communication", 1948, theorem 5).
"""

import array
import bisect
import dataclasses

import numpy as np

from experiments.data.streams import smallest_dtype

MAX_TABLE = 2**22
UNIFORM_SHARE = 1e-3
_BLOCK = 2**18


@dataclasses.dataclass(frozen=True)
class MarkovSource:
    """Chain over `vocab` tokens in which the next token depends on the last `order` ones.

    Invariants: order >= 1, vocab >= 2, vocab**(order + 1) <= 2**22. Equal fields give equal tokens.
    """

    order: int = 2
    vocab: int = 32
    tokens: int = 4_000_000
    seed: int = 0

    def __post_init__(self):
        if self.vocab ** (self.order + 1) > MAX_TABLE:
            raise ValueError(
                f"--data=markov: vocab={self.vocab} at order={self.order} needs a table of "
                f"vocab**(order+1) probabilities, more than {MAX_TABLE}, so lower one of them."
            )

    def transitions(self) -> np.ndarray:
        """P(next | context): float64 [vocab**order, vocab], rows sum to 1, all entries positive.

        Powers of exponential variates make a few continuations likely and most rare, as in text.
        The uniform share makes every context reachable, hence the stationary distribution unique.
        """
        uniform = np.random.default_rng([self.seed, 0]).random((self.vocab**self.order, self.vocab))
        weights = (-np.log1p(-uniform)) ** 4
        rows = weights / weights.sum(axis=1, keepdims=True)
        return (1 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / self.vocab

    def stationary(self, transitions: np.ndarray) -> np.ndarray:
        """π over contexts, float64 [vocab**order], by power iteration to 1e-13 in L1."""
        table = transitions.reshape(self.vocab, -1, self.vocab)  # oldest token, other tokens, next
        pi = np.full(len(transitions), 1 / len(transitions))
        for _ in range(100_000):
            following = np.einsum("of,oft->ft", pi.reshape(self.vocab, -1), table).reshape(-1)
            following /= following.sum()
            if np.abs(following - pi).sum() < 1e-13:
                break
            pi = following
        return following

    @property
    def entropy_floor(self) -> float:
        """The entropy rate in nats per token: no model has a lower expected loss."""
        transitions = self.transitions()
        entropies = -(transitions * np.log(transitions)).sum(axis=1)
        return float(self.stationary(transitions) @ entropies)

    def sample(self) -> np.ndarray:
        """The sequence: uint8 or uint16 [tokens], in the stationary state from its first token."""
        transitions = self.transitions()
        contexts = len(transitions)
        cdf = np.cumsum(transitions, axis=1)
        cdf[:, -1] = 1.0
        flat = array.array("d", cdf.tobytes())
        rng = np.random.default_rng([self.seed, 1])
        start = np.searchsorted(np.cumsum(self.stationary(transitions)), rng.random())
        context = min(int(start), contexts - 1)
        # One chain, drawn token by token: chains drawn side by side and then joined would break the
        # Markov property at every joint and put the reachable loss above the floor.
        tokens = np.empty(self.tokens, smallest_dtype(self.vocab))
        for first in range(0, self.tokens, _BLOCK):
            entries = []
            for uniform in rng.random(min(_BLOCK, self.tokens - first)).tolist():
                row = context * self.vocab
                entry = bisect.bisect_right(flat, uniform, row, row + self.vocab)
                entries.append(entry)
                context = entry % contexts
            tokens[first : first + len(entries)] = np.array(entries) % self.vocab
        return tokens
