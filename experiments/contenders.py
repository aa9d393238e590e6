"""The training step that q8jax, plain Flax and the incumbents are compared on.

An MLP of residual blocks [width -> hidden, gelu, hidden -> width] under SGD, everything in the step: forward, backward,
update of parameters and of scaling state. All contenders are the same Linen module, the same loss and the same update,
and differ in what their `Dense` multiplies with. Incumbents need the extra q8jax[incumbents].
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import fp8_ops

import q8jax.linen as qlinen
from q8jax.recipe import Recipe

Variables = dict[str, Any]
REFERENCE = "flax bf16"
_LEARNING_RATE = np.float32(0.1)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of the MLP and of its batch."""

    layers: int
    width: int
    hidden: int
    tokens: int


class Mlp(nn.Module):
    """Residual blocks of two Dense layers, whose options a contender chooses."""

    shapes: Shapes
    dtype: Any
    dense: dict[str, Any] = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.shapes.layers):
            layer: Callable[..., nn.Module] = functools.partial(
                nn.Dense, use_bias=False, dtype=self.dtype, **self.dense
            )
            hidden = nn.gelu(layer(self.shapes.hidden, name=f"up{i}")(x))
            x = x + layer(self.shapes.width, name=f"down{i}")(hidden).astype(x.dtype)
        return x


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train the MLP.

    Attributes:
      build: from shapes to the Linen module.
      value_and_grad: of a function of the variables.
      calibrates: whether the scaling state starts from what q8jax observes in the first batch.
      requires: the package that it is imported from, None for ours and Flax's.
    """

    build: Callable[[Shapes], nn.Module]
    value_and_grad: Callable[..., Any] = jax.value_and_grad
    calibrates: bool = False
    requires: str | None = None

    @property
    def is_installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


def _flax(dtype: Any, dot_general_cls: Any = None) -> Contender:
    options = {"dot_general_cls": dot_general_cls} if dot_general_cls else {}
    return Contender(lambda shapes: Mlp(shapes, dtype, options))


def _q8jax(precision: str) -> Contender:
    recipe = Recipe.parse(precision)
    options = {"dot_general_cls": qlinen.dot_general_cls(recipe)}
    build = lambda shapes: Mlp(shapes, jnp.dtype(recipe.compute), options)
    return Contender(build, qlinen.value_and_grad, calibrates=recipe.keeps_state)


def _aqt(shapes: Shapes) -> nn.Module:
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

    return Mlp(shapes, jnp.bfloat16, {"dot_general_cls": functools.partial(aqt_flax.AqtDotGeneral, config.config_v4())})


def _qwix(forward: str, gradient: str, shapes: Shapes) -> nn.Module:
    import qwix

    rule = qwix.QtRule(module_path=".*", weight_qtype=forward, act_qtype=forward, bwd_qtype=gradient)
    return qwix.quantize_model(Mlp(shapes, jnp.bfloat16), qwix.QtProvider([rule]))


CONTENDERS = {
    "flax fp32": _flax(jnp.float32),
    REFERENCE: _flax(jnp.bfloat16),
    "q8jax fp32": _q8jax("fp32"),
    "q8jax bf16": _q8jax("bf16"),
    "q8jax fp8": _q8jax("fp8"),
    "q8jax int8": _q8jax("int8"),
    "q8jax int8-tensor": _q8jax("int8-tensor"),
    "flax fp8": _flax(jnp.bfloat16, fp8_ops.Fp8DirectDotGeneralOp),
    "qwix fp8": Contender(functools.partial(_qwix, "float8_e4m3fn", "float8_e5m2"), requires="qwix"),
    "qwix int8": Contender(functools.partial(_qwix, "int8", "int8"), requires="qwix"),
    "aqt int8": Contender(_aqt, requires="aqt"),
}


class Step:
    """One contender's training as pure functions of its variables and of a batch: x, and what is to come out if given.

    Args:
      contender: whose.
      shapes: of the MLP and of the batch.
    """

    def __init__(self, contender: Contender, shapes: Shapes):
        self._contender = contender
        self._model = contender.build(shapes)
        params, rounding = jax.random.split(jax.random.key(2))
        self._rngs = {"params": params, "stochastic_rounding": rounding}

    def init(self, x: jax.Array) -> Variables:
        """The variables before the first step."""
        return dict(self._model.init(self._rngs, x))

    def calibrate(self, variables: Variables, *batch: jax.Array) -> Variables:
        """The variables with scales that this batch brings, where a contender has a warm start."""
        return qlinen.calibrate(self._loss, variables, *batch) if self._contender.calibrates else variables

    def _loss(self, variables: Variables, x: jax.Array, *target: jax.Array) -> jax.Array:
        out: Any = self._model.apply(variables, x, rngs=self._rngs)
        out = out.astype(jnp.float32)
        return jnp.mean(jnp.square(out - target[0] if target else out))

    def __call__(self, variables: Variables, *batch: jax.Array) -> tuple[jax.Array, Variables]:
        """Returns the loss and the next variables."""
        value, gradients = self._contender.value_and_grad(self._loss)(variables, *batch)
        descend = lambda param, gradient: param - _LEARNING_RATE * gradient
        # Every other collection is state, whose gradient is its next value.
        params = jax.tree.map(descend, variables["params"], gradients["params"])
        return value, {**gradients, "params": params}
