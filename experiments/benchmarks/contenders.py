"""What q8jax, plain Flax and the incumbents multiply with: each is a Linen `Dense` without bias.

A network is made of whatever `Dense` it is given, so all contenders are the same network, and differ in its products.
Incumbents need the extra q8jax[incumbents].
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import fp8_ops

import q8jax.linen as qlinen
from q8jax.recipe import Recipe

Variables = dict[str, Any]
# Takes the number of features, and a name.
Dense = Callable[..., nn.Module]
REFERENCE, OWN_REFERENCE = "flax bf16", "q8jax bf16"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes:
      dtype: in which a layer computes.
      dot_general_cls: makes the `dot_general_cls` of its layers; called only where it is measured.
      quantize: what becomes of the whole network.
      value_and_grad: of a function of the variables.
      calibrates: whether the scaling state starts from what q8jax observes in the first batch.
      requires: the package that it is imported from, None for ours and Flax's.
    """

    dtype: Any
    dot_general_cls: Callable[[], Any] | None = None
    quantize: Callable[[nn.Module], nn.Module] | None = None
    value_and_grad: Callable[..., Any] = jax.value_and_grad
    calibrates: bool = False
    requires: str | None = None

    @property
    def is_installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def network(self, make: Callable[[Dense], nn.Module]) -> nn.Module:
        """What `make` makes of this contender's `Dense`."""
        options = {"dot_general_cls": self.dot_general_cls()} if self.dot_general_cls else {}
        module = make(functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, **options))
        return self.quantize(module) if self.quantize else module


class Network:
    """A contender's network and its derivatives, as pure functions of variables.

    Args:
      contender: whose.
      make: from a `Dense` to the network.
    """

    def __init__(self, contender: Contender, make: Callable[[Dense], nn.Module]):
        self._contender = contender
        self._module = contender.network(make)
        params, rounding = jax.random.split(jax.random.key(2))
        self._rngs = {"params": params, "stochastic_rounding": rounding}
        self.value_and_grad = contender.value_and_grad

    def init(self, x: jax.Array) -> Variables:
        """The variables before the first step."""
        return dict(self._module.init(self._rngs, x))

    def calibrate(self, loss: Callable, variables: Variables, *batch: jax.Array, has_aux: bool = False) -> Variables:
        """The variables with scales that this batch brings, where the contender has a warm start."""
        if not self._contender.calibrates:
            return variables
        return qlinen.calibrate(loss, variables, *batch, has_aux=has_aux)

    def __call__(self, variables: Variables, x: jax.Array) -> Any:
        return self._module.apply(variables, x, rngs=self._rngs)


def _q8jax(precision: str) -> Contender:
    recipe = Recipe.parse(precision)
    return Contender(
        jnp.dtype(recipe.compute),
        dot_general_cls=functools.partial(qlinen.dot_general_cls, recipe),
        value_and_grad=qlinen.value_and_grad,
        calibrates=recipe.keeps_state,
    )


def _aqt() -> Any:
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

    return functools.partial(aqt_flax.AqtDotGeneral, config.config_v4())


def _qwix(forward: str, gradient: str) -> Contender:
    def quantize(module: nn.Module) -> nn.Module:
        import qwix

        rule = qwix.QtRule(module_path=".*", weight_qtype=forward, act_qtype=forward, bwd_qtype=gradient)
        return qwix.quantize_model(module, qwix.QtProvider([rule]))

    return Contender(jnp.bfloat16, quantize=quantize, requires="qwix")


CONTENDERS = {
    "flax fp32": Contender(jnp.float32),
    REFERENCE: Contender(jnp.bfloat16),
    "q8jax fp32": _q8jax("fp32"),
    OWN_REFERENCE: _q8jax("bf16"),
    "q8jax fp8": _q8jax("fp8"),
    "q8jax fp8-current": _q8jax("fp8-current"),
    "q8jax fp8-row": _q8jax("fp8-row"),
    "q8jax fp8-block": _q8jax("fp8-block"),
    "q8jax int8": _q8jax("int8"),
    "q8jax int8-tensor": _q8jax("int8-tensor"),
    "flax fp8": Contender(jnp.bfloat16, lambda: fp8_ops.Fp8DirectDotGeneralOp),
    "qwix fp8": _qwix("float8_e4m3fn", "float8_e5m2"),
    "qwix int8": _qwix("int8", "int8"),
    "aqt int8": Contender(jnp.bfloat16, _aqt, requires="aqt"),
}
