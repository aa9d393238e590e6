"""Telemetry of a model's dots."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from q8jax import scaling
from q8jax.nnx.dots import ProbeVariable, dots_of
from q8jax.recipe import Recipe
from q8jax.telemetry import Probe


def watching(
    loss_fn: Callable[..., Any], kinds: tuple[str, ...], recipes: Mapping[str, Recipe] | None = None, *, has_aux=False
) -> Callable[..., tuple[Any, Any, dict[str, Probe]]]:
    """Differentiates a loss and looks at what quantization does to every dot; the scaling state is only read.

    Args:
      loss_fn: function of (model, *args), args being pytrees of arrays, that returns a scalar, or (scalar, aux). It
        must not prequantize the model.
      kinds: of `q8jax.telemetry.KINDS`.
      recipes: by the path of the layer, what to look at in place of the recipe that the layer runs in, with current
        scales; layers that it leaves out are not looked at. None looks at each layer's own.
      has_aux: whether loss_fn returns aux.

    Returns:
      A function of (model, *args) that returns (loss, grads, probes), or ((loss, aux), grads, probes): `grads` is the
      nnx.State of the nnx.Param's gradients, `probes` has for the path of every dot what `q8jax.telemetry.summary`
      makes numbers of; of several microbatches, join them by `q8jax.telemetry.combine`. It compiles itself, and may be
      called inside jit as well.
    """

    def wrapped(model: nnx.Module, *args: Any) -> tuple[Any, Any, dict[str, Probe]]:
        graphdef, state = nnx.split(model)
        twin = nnx.merge(graphdef, state)
        watched = {}
        for path, dot in dots_of(twin).items():
            layer = "/".join(map(str, path[:-1]))
            if recipes is None or layer in recipes:
                dot.watch(kinds, None if recipes is None else recipes[layer])
                watched[layer] = path
        parts: Any = nnx.split(twin, nnx.Param, ProbeVariable, ...)
        value, grads, seen = _differentiated(loss_fn, has_aux, *parts, args)
        flat = dict(nnx.to_flat_state(seen))
        return value, grads, {layer: flat[(*path, "probe")].get_value() for layer, path in watched.items()}

    return wrapped


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _differentiated(loss_fn, has_aux, graphdef, params, probes, rest, args):
    def pure(params, probes):
        observing = jax.tree.map(Probe.observing, probes, is_leaf=lambda node: isinstance(node, Probe))
        return loss_fn(nnx.merge(graphdef, params, observing, rest, copy=True), *args)

    with scaling.explained():
        value, (grads, seen) = jax.value_and_grad(pure, argnums=(0, 1), has_aux=has_aux)(params, probes)
    return value, grads, seen
