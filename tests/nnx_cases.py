"""Small NNX models, and what the tests of q8jax.nnx ask of them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import q8jax.nnx as qnnx

DELAYED_INT8 = "/".join(f"{gemm}=int8:tensor:delayed,int8:tensor:delayed" for gemm in ("fwd", "dlhs", "drhs"))
STOCHASTIC = "fwd=e4m3fn:tensor:delayed:stochastic,e4m3fn:tensor:delayed"


def normal(seed: int):
    """An initializer that costs no compilation."""

    def init(key, shape, dtype, out_sharding=None):
        del key, out_sharding
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(8), dtype)

    return init


def linear(seed: int = 0) -> nnx.Linear:
    return nnx.Linear(8, 8, kernel_init=normal(seed), rngs=nnx.Rngs(0))


class Net(nnx.Module):
    """Every kind of layer that quantize_model knows."""

    def __init__(self, seed: int = 0, rngs: nnx.Rngs | None = None):
        options = {"kernel_init": normal(seed), "rngs": rngs or nnx.Rngs(0)}
        self.linear = nnx.Linear(8, 8, **options)
        self.general = nnx.LinearGeneral(8, (2, 4), **options)
        self.layers = nnx.List([nnx.Einsum("bhd,hdk->bk", (2, 4, 8), (8,), **options)])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **options)

    def __call__(self, x):
        x = self.layers[0](self.general(nnx.relu(self.linear(x))))
        return self.attention(x[None])[0]


PATHS = ["attention/key", "attention/out", "attention/query", "attention/value", "general", "layers/0", "linear"]


def inputs(rows: int = 16):
    return jax.random.normal(jax.random.key(1), (rows, 8))


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit
def forward(model, x):
    return model(x)


def relative_error(found, exact) -> float:
    return float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def states_of(model):
    return {path: (state.scale, state.history) for path, state in qnnx.scaling_states(model).items()}
