"""Shapes of the decoder-only transformer, by name."""

import dataclasses
from types import MappingProxyType

from q8jax import choices

ACTIVATIONS = ("swiglu", "smooth_swiglu", "gelu")
REMAT_KEEPS = ("nothing", "products")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """What lets rotary embeddings reach further than they were trained to (Llama 3.1: Grattafiori et al. 2024,
    arXiv:2407.21783): frequencies that turn less than `low` times over the trained positions are divided, those that
    turn more than `high` times are kept, and between the two it goes over from one to the other.

    Attributes:
      factor: divisor of the low frequencies.
      low, high: numbers of turns.
      positions: that the model was trained on before.

    Raises:
      ValueError: a value out of its range.
    """

    factor: float
    low: float
    high: float
    positions: int

    def __post_init__(self):
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor={self.factor} of rotary scaling must be finite and at least 1.")
        if not 0 < self.low < self.high < float("inf"):
            raise ValueError(f"low={self.low} of rotary scaling must be positive and less than high={self.high}.")
        if self.positions < 1:
            raise ValueError(f"positions={self.positions} of rotary scaling must be at least 1.")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer.

    Attributes:
      layers: number of blocks.
      d_model: width of the residual stream.
      heads: query heads.
      kv_heads: key and value heads, a divisor of `heads` (grouped-query attention).
      d_ff: hidden width of the feed-forward layer.
      activation: 'swiglu', 'smooth_swiglu' or 'gelu'.
      tied: whether the output head is the embedding.
      vocab: number of tokens.
      rope_theta: base of the rotary frequencies.
      remat: whether to recompute each block in the backward pass.
      remat_keeps: what of a block is not recomputed then: 'nothing', or the 'products' with weights.
      norm_eps: added to the mean square in normalization.
      scaled_embedding: whether embeddings enter the residual stream times the root of d_model.
      rope_scaling: of the rotary frequencies, or None.

    Raises:
      ValueError: a value out of its range, or sizes that do not divide each other, naming the flag.
    """

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_ff: int
    activation: str = "swiglu"
    tied: bool = False
    vocab: int = 256
    rope_theta: float = 10_000.0
    remat: bool = False
    remat_keeps: str = "nothing"
    norm_eps: float = 1e-6
    scaled_embedding: bool = True
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        choices.check("--activation", self.activation, ACTIVATIONS)
        choices.check("--remat_keeps", self.remat_keeps, REMAT_KEEPS)
        for name in ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1.")
        if not 1 <= self.rope_theta < float("inf"):
            raise ValueError(f"--rope_theta={self.rope_theta} must be finite and at least 1.")
        if self.norm_eps < 0:
            raise ValueError(f"--norm_eps={self.norm_eps} must not be negative.")
        if self.d_model % (2 * self.heads):
            raise ValueError(
                f"--heads={self.heads} must divide --d_model={self.d_model} into even sizes, because rotary embeddings "
                "turn pairs: choose another."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--kv_heads={self.kv_heads} must divide --heads={self.heads}.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def gated(self) -> bool:
        return self.activation != "gelu"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the weight GEMMs of one block, by path within it."""
        return {
            "attention/qkv": (self.d_model, (self.heads + 2 * self.kv_heads) * self.head_dim),
            "attention/out": (self.heads * self.head_dim, self.d_model),
            "mlp/up": (self.d_model, (2 if self.gated else 1) * self.d_ff),
            "mlp/down": (self.d_ff, self.d_model),
        }

    @property
    def matmul_params(self) -> int:
        """Parameters that multiply every token, the head included."""
        per_block = sum(rows * columns for rows, columns in self.projections.values())
        return self.layers * per_block + self.d_model * self.vocab

    @property
    def params(self) -> int:
        embedding = 0 if self.tied else self.d_model * self.vocab
        norms = (2 * self.layers + 1) * self.d_model
        return self.matmul_params + embedding + norms

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs per trained token, 6 per parameter and 6 per causal attention pair and channel."""
        return 6 * self.matmul_params + 6 * self.layers * self.d_model * seq_len


# The larger names are what the parameters come to with the vocabulary of GPT-2 (124m, 350m) or Llama 3 (1b, 8b).
SIZES = MappingProxyType(
    {
        "tiny": TransformerConfig(layers=4, d_model=128, heads=2, kv_heads=2, d_ff=384),
        "small": TransformerConfig(layers=6, d_model=384, heads=6, kv_heads=6, d_ff=1024),
        "124m": TransformerConfig(layers=12, d_model=768, heads=12, kv_heads=12, d_ff=2048, tied=True),
        "350m": TransformerConfig(layers=24, d_model=1024, heads=16, kv_heads=16, d_ff=2816, tied=True),
        "1b": TransformerConfig(
            layers=16, d_model=2048, heads=32, kv_heads=8, d_ff=8192, tied=True, rope_theta=500_000.0
        ),
        "8b": TransformerConfig(
            layers=32, d_model=4096, heads=32, kv_heads=8, d_ff=14336, rope_theta=500_000.0, remat=True
        ),
    }
)
