"""One layer's products forward and backward, quantization included.

The four products of a transformer layer, each with both gradients, are the twelve GEMMs that Transformer Engine is
measured on; a sweep over square ones finds from which size on 8 bits pay. Activations and incoming gradients are
bfloat16, weights float32, as they are in training: a contender casts or quantizes them, reads its scaling state and
returns the next. The bound for all of them multiplies codes that were made before.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import q8jax
from experiments.benchmarks.contenders import CONTENDERS, REFERENCE, Contender, Dense, Network, Variables
from experiments.benchmarks.contest import Entrant, contest
from experiments.benchmarks.results import Measurement, Program
from q8jax.contraction import contractions
from q8jax.gemm import gemm
from q8jax.naming import role_scope
from q8jax.qarray import QArray
from q8jax.recipe import GEMM_TENSORS, GEMMS

PREQUANTIZED = {"pre-quantized fp8": "e4m3fn", "pre-quantized int8": "int8"}
# Both operands contiguous along the axis that is summed over.
_ALONG_ROWS = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Product:
    """[tokens, inputs] · [inputs, outputs], and its two gradients."""

    name: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 6 * self.tokens * self.inputs * self.outputs

    @property
    def sizes(self) -> dict[str, int]:
        return {"tokens": self.tokens, "inputs": self.inputs, "outputs": self.outputs}

    def tensors(self) -> tuple[jax.Array, jax.Array]:
        """Activations and incoming gradients, bfloat16 [1, tokens, inputs] and [1, tokens, outputs].

        They have a batch axis as in a model, or a square weight would have their shape, by which Qwix knows weights.
        """
        shapes = (1, self.tokens, self.inputs), (1, self.tokens, self.outputs)
        keys = jax.random.split(jax.random.key(0), 2)
        activations, gradients = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
        return activations, gradients


def of_a_layer(tokens: int, width: int, hidden: int) -> list[Product]:
    """The products of a transformer layer without a gate."""
    return [
        Product("QKV", tokens, width, 3 * width),
        Product("output", tokens, width, width),
        Product("FC1", tokens, width, hidden),
        Product("FC2", tokens, hidden, width),
    ]


def square(size: int) -> Product:
    return Product(str(size), size, size, size)


class _Single(nn.Module):
    outputs: int
    dense: Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.dense(self.outputs, name="dot")(x)


class Differentiated:
    """A contender's product and its gradients as a pure function.

    Args:
      contender: whose.
      outputs: columns of the weight.
    """

    def __init__(self, contender: Contender, outputs: int):
        self._network = Network(contender, lambda dense: _Single(outputs, dense))

    def init(self, activations: jax.Array, gradients: jax.Array) -> Variables:
        """The weight, float32, and the scaling state for these tensors."""
        variables = {**self._network.init(activations), "activations": activations}
        variables = self._network.calibrate(self._pairing, variables, gradients, has_aux=True)
        return {name: value for name, value in variables.items() if name != "activations"}

    def _pairing(self, variables: Variables, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A scalar whose gradient in the product is `gradients`, and the product."""
        out = self._network({n: v for n, v in variables.items() if n != "activations"}, variables["activations"])
        return jnp.sum(out * gradients.astype(out.dtype)), out

    def __call__(
        self, variables: Variables, activations: jax.Array, gradients: jax.Array
    ) -> tuple[jax.Array, jax.Array, Variables]:
        """Returns the product, the activations' gradient, and the weight's as `params` with the next scaling state."""
        pairing = self._network.value_and_grad(self._pairing, has_aux=True)
        (_, out), following = pairing({**variables, "activations": activations}, gradients)
        return out, following.pop("activations"), following


class _Entrant:
    losses: list[jax.Array]

    def __init__(self, function: Callable, *arguments: Any):
        lowered = jax.jit(function).lower(*arguments)
        self._compiled = lowered.compile()
        self._arguments = arguments
        self.program = Program.of(q8jax.audit(lowered, self._compiled))
        self.losses = []

    def __call__(self) -> Any:
        return self._compiled(*self._arguments)


class _Stateful(_Entrant):
    """One whose scaling state goes on from call to call, while the weight stays."""

    def __call__(self) -> Any:
        variables, *tensors = self._arguments
        out = self._compiled(variables, *tensors)
        self._arguments = {**out[2], "params": variables["params"]}, *tensors
        return out


def entrant(name: str, product: Product, tensors: tuple[jax.Array, jax.Array]) -> Entrant:
    """A contender, of CONTENDERS or PREQUANTIZED, at a product of these `tensors`.

    A call returns the product, the activations' gradient, and the weight's: of a contender that keeps state, as
    `params` with the next state.
    """
    if name in PREQUANTIZED:
        qtype = PREQUANTIZED[name]
        weight = jax.nn.initializers.lecun_normal()(jax.random.key(2), (product.inputs, product.outputs))
        codes = jax.jit(functools.partial(codes_of, qtype))(tensors[0][0], weight, tensors[1][0])
        return _Entrant(multiply_codes, codes)
    differentiated = Differentiated(CONTENDERS[name], product.outputs)
    return _Stateful(differentiated, jax.jit(differentiated.init)(*tensors), *tensors)


def codes_of(qtype: str, lhs: jax.Array, rhs: jax.Array, grad: jax.Array) -> dict[str, list[QArray]]:
    """The operands of the three GEMMs in 8 bits, one scale for each tensor, each contiguous as its GEMM sums.

    Args:
      qtype: their format.
      lhs, rhs, grad: [M, K], [K, N] and [M, N].
    """
    by_name = {"lhs": lhs, "rhs": rhs, "grad": grad}
    quantized = {n: q8jax.quantize(x, qtype, scale_format="power_of_two") for n, x in by_name.items()}
    turned = {"fwd": (False, True), "dlhs": (False, False), "drhs": (True, True)}
    return {
        role: [
            dataclasses.replace(quantized[n], qvalue=quantized[n].qvalue.T) if turn else quantized[n]
            for n, turn in zip(GEMM_TENSORS[role], turned[role], strict=True)
        ]
        for role in GEMMS
    }


def multiply_codes(codes: dict[str, list[QArray]]) -> list[jax.Array]:
    """The three GEMMs of what `codes_of` makes, bfloat16: [M, N], [M, K] and [K, N]."""
    results = []
    for role in GEMMS:
        first, second = codes[role]
        contraction = contractions(first.qvalue.shape, second.qvalue.shape, _ALONG_ROWS)["fwd"]
        with role_scope(role, first.qtype, second.qtype):
            options = {"accurate": role != "fwd", "powers_of_two": True}
            results.append(gemm(first, second, contraction, jnp.bfloat16, **options))
    return results


def measure(names: Iterable[str], product: Product, rounds: int) -> Measurement:
    """Times a product of the named contenders, REFERENCE among them."""
    tensors = product.tensors()
    builders = {name: functools.partial(entrant, name, product, tensors) for name in names}
    return contest(product.name, product.sizes, product.flops, builders, REFERENCE, rounds, repeats=True)
