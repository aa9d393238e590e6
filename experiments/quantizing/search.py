"""Mixed precision by measurement: what each layer costs the model as each candidate, and the best choice for all.

Of one candidate at a time the model has both products in every layer, the float one and the quantized one, and a
variable says which of them counts. So all layers are tried with one program. Then greedily: of all ways to make one
layer smaller, take the one with the least damage for each byte that it saves, until the budget is met. Damages are
taken to add up; whether they do is for the measurement of the policy as a whole to say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q8jax import choices
from q8jax.nnx.frozen import StoredDot, StoredKernel
from q8jax.nnx.layers import kernel_shape, layers_of
from q8jax.policy import Policy
from q8jax.recipe import Recipe

_KINDS = ("size", "loss")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a policy has to meet.

    Attributes:
      kind: 'size', the most bytes of all kernels as a share of their float32 ones; 'loss', the most damage.
      limit: of it.
    """

    kind: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Of size:SHARE or loss:DAMAGE; a ValueError names the flag."""
        kind, _, number = text.partition(":")
        choices.check("--budget", kind, _KINDS)
        if not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", number) or float(number) <= 0:
            raise ValueError(f"--budget={text} needs a number above 0: write for example size:0.2 or loss:0.01.")
        return cls(kind, float(number))

    def __str__(self) -> str:
        return f"{self.kind}:{self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Option:
    """What one layer may become.

    Attributes:
      path: of the layer.
      candidate: what it becomes; '' if it stays.
      bytes: of its kernel then.
      damage: what that costs the model, 0 or more.
    """

    path: str
    candidate: str
    bytes: int
    damage: float


class _Switch(nnx.Module):
    """Both products of a layer, and which of them counts."""

    def __init__(self, plain: Any, stored: StoredDot, codes: Any, stack: tuple[int, ...]):
        self.plain = plain
        self.stored = stored
        self.codes = StoredKernel(codes)
        self.is_on = nnx.Variable(jnp.zeros(stack, bool))

    def turn(self, on: bool) -> None:
        self.is_on.set_value(jnp.full_like(self.is_on[...], on))

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        at = 2 if isinstance(args[0], str) else 1
        with_codes = (*args[:at], self.codes[...], *args[at + 1 :])
        plain = self.plain(*args, **options)
        stored = self.stored(*with_codes, **options)
        return jnp.where(self.is_on[...], stored.astype(plain.dtype), plain)


def damages(
    plain: nnx.Module, quantized: nnx.Module, damage: Callable[[Any, Any], float]
) -> dict[str, tuple[int, float]]:
    """What each layer's quantization alone costs a model.

    Args:
      plain: the model; its layers are changed.
      quantized: the same frozen, of one candidate.
      damage: of the graph and the state of a model, how much worse it is than the plain one.

    Returns:
      By path the bytes of the quantized kernel, and the damage.
    """
    frozen, layers = layers_of(quantized), layers_of(plain)
    switched: dict[str, _Switch] = {}
    for path, layer in frozen.items():
        for name, product in vars(layer).items():
            if isinstance(product, StoredDot):
                shape = layers[path].kernel[...].shape
                stack = shape[: len(shape) - len(kernel_shape(layer) or ())]
                switch = _Switch(getattr(layers[path], name), product, layer.kernel[...], stack)
                setattr(layers[path], name, nnx.data(switch))
                switched[path] = switch
    found = {}
    for path, switch in switched.items():
        switch.turn(True)
        graphdef, state = nnx.split(plain)
        found[path] = switch.codes[...].nbytes, max(damage(graphdef, state), 0.0)
        switch.turn(False)
    return found


def choose(options: Sequence[Option], budget: Budget, floating: int) -> dict[str, Option]:
    """The options, one for each layer, that meet a budget with the least damage that is found greedily.

    Args:
      options: of all layers, staying among them.
      budget: what to meet.
      floating: bytes of all kernels in float32.

    Raises:
      ValueError: a size that no choice meets.
    """
    by_layer: dict[str, list[Option]] = {}
    for option in options:
        by_layer.setdefault(option.path, []).append(option)
    chosen = {path: max(each, key=lambda o: (o.bytes, -o.damage)) for path, each in by_layer.items()}
    size = lambda: sum(option.bytes for option in chosen.values())
    lost = lambda: sum(option.damage for option in chosen.values())
    while budget.kind == "loss" or size() > budget.limit * floating:
        moves = [o for each in by_layer.values() for o in each if o.bytes < chosen[o.path].bytes]
        if budget.kind == "loss":
            moves = [o for o in moves if lost() - chosen[o.path].damage + o.damage <= budget.limit]
        if not moves:
            break
        cost = lambda o: (o.damage - chosen[o.path].damage) / (chosen[o.path].bytes - o.bytes)
        best = min(moves, key=cost)
        chosen[best.path] = best
    if budget.kind == "size" and size() > budget.limit * floating:
        raise ValueError(f"--budget={budget}: the smallest choice takes {size() / floating:.3f}, so allow that.")
    return chosen


def policy_of(chosen: Mapping[str, Option], recipes: Mapping[str, Recipe], compute: str) -> Policy:
    """The policy that gives every layer what was chosen for it."""
    rules = [(re.escape(o.path), recipes[o.candidate]) for o in chosen.values() if o.candidate]
    return Policy((*rules, (".*", Recipe(compute=compute))))


def outputs_differ(reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The mean of (1 − cosine) of outputs, [rows, n] each: damage where there is nothing to be right about."""
    one, other = (np.concatenate([np.asarray(x, np.float64) for x in each]) for each in (reference, found))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean(1 - np.sum(one * other, axis=1) / np.maximum(norms, 1e-30)))
