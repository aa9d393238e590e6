"""Flax NNX: quantized dots as modules, layers, and whole-model quantization.

A layer is quantized by the module in its `dot_general` (or `einsum_op`) attribute; its parameters are untouched, so
they stay interchangeable with the float model's. One training step is

    loss, grads, amaxes = q8jax.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    q8jax.nnx.update_scaling(model, amaxes)

Of several microbatches, add the gradients and join the amaxes by `q8jax.scaling.combine`, and have kernels quantized
once for all of them by `prequantize`. `nnx.grad` differentiates a
quantized model as well, but observes nothing: only `value_and_grad` from here does.

Stochastic rounding draws by one key per layer and step, which `update_scaling` advances. So a layer that is called
twice in a step rounds equal values alike, and so do microbatches; `fold_rounding_keys` gives each of them its own keys:

    loss, grads, amaxes = q8jax.nnx.value_and_grad(loss_fn)(q8jax.nnx.fold_rounding_keys(model, i), microbatch)

Not supported: observing inside `jax.shard_map(..., check_vma=False)`, which hides from JAX what has to be summed (it
raises TypeError); stacks on other than the leading axes of a kernel (`nnx.vmap` with `out_axes` other than 0); and
taking a layer that observes out of a stack by `stack[i]`: use `jax.lax.scan` or `jax.lax.dynamic_index_in_dim`. Outside
`value_and_grad`, which says so, JAX's own error is "Cannot interpret 'fp8_meta32' as a data type".
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from q8jax import dot, scaling, tiles
from q8jax.contraction import DimensionNumbers
from q8jax.meshes import multiply
from q8jax.naming import path_scope
from q8jax.policy import Policy
from q8jax.recipe import Recipe
from q8jax.scaling import ScalingState

Model = TypeVar("Model", bound=nnx.Module)


class Scale(nnx.Variable):
    """float32 [..., S]: the scales of a dot's slots. Its cotangent is the vector of observed amaxes."""


class AmaxHistory(nnx.Variable):
    """float32 [..., S, H]: the amaxes of the last H steps, most recent first."""


class RoundingKey(nnx.Variable):
    """uint32 [..., K]: data of the key for stochastic rounding; `update_scaling` advances it."""


class KernelCodes(nnx.Variable):
    """Codes and amax of a kernel, or of a stack of them, that `prequantize` made."""


class QuantizedDot(nnx.Module):
    """State of one quantized dot; called by `DotGeneral` and `EinsumOp`. A recipe that quantizes nothing has none.

    Args:
      recipe: a Recipe or its string.
      stack: leading axes, for the dots of a stack of layers made by `nnx.vmap`.
      path: of its layer in the model, by which `q8jax.audit` names it; '' if not known.
      rngs: for recipes with stochastic rounding; takes one key of stream 'rounding'.

    Raises:
      ValueError: a recipe with stochastic rounding without rngs.
    """

    def __init__(
        self, recipe: Recipe | str, *, stack: tuple[int, ...] = (), path: str = "", rngs: nnx.Rngs | None = None
    ):
        self.path = path
        self.recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        self.calibrating = False
        if self.recipe.slots:
            state = scaling.init(self.recipe, stack)
            self.scale = Scale(state.scale)
            self.history = AmaxHistory(state.history)
        if self.recipe.needs_key:
            if rngs is None:
                raise ValueError("A recipe with stochastic rounding needs rngs=, for example nnx.Rngs(rounding=0).")
            key = rngs.rounding()
            self.key_impl = jax.random.key_impl(key)
            key_data = jax.random.key_data(jax.random.split(key, stack) if stack else key)
            self.rounding_key: nnx.Variable = RoundingKey(key_data)

    @property
    def state(self) -> ScalingState:
        if not self.recipe.slots:
            return scaling.init(self.recipe)
        return ScalingState(self.scale[...], self.history[...], self.recipe)

    def _key(self) -> jax.Array:
        return jax.random.wrap_key_data(self.rounding_key[...], impl=self.key_impl)

    def folded_key_data(self, number: int | jax.Array) -> jax.Array:
        """Data, uint32 [..., K], of the rounding key with a number folded into it."""
        fold = jnp.vectorize(lambda key: jax.random.fold_in(key, number), signature="()->()")
        return jax.random.key_data(fold(self._key()))

    def _multiply(
        self, product: Callable, plain: Callable, lhs, rhs, preferred_element_type, out_sharding
    ) -> jax.Array:
        # Calibration observes what the model computes before any scale is known, so it takes current scales.
        options = {"preferred_element_type": preferred_element_type, "calibrating": self.calibrating}
        product = functools.partial(product, recipe=self.recipe, **options)
        scale = self.scale[...] if self.recipe.slots else None
        key = self._key() if self.recipe.needs_key else None
        with path_scope(self.path) if self.path else contextlib.nullcontext():
            return multiply(product, plain, lhs, rhs, scale, key, out_sharding)

    def prequantized(self, kernel: jax.Array, dimension_numbers: DimensionNumbers, stack: int) -> dot.Prequantized:
        """Codes for products with these numbers of a kernel, or of a stack of kernels along so many leading axes."""
        key = self._key() if self.recipe.needs_key else None

        def one(kernel, scale, key):
            options = {"key": key, "calibrating": self.calibrating}
            return dot.prequantize(kernel, dimension_numbers, self.recipe, scale, **options)

        for _ in range(stack):
            one = jax.vmap(one)
        return one(kernel, self.scale[...], key)

    def follow(self, state: ScalingState) -> None:
        """Enters the next step: takes its scaling state and another rounding key."""
        self.scale.set_value(state.scale)
        self.history.set_value(state.history)
        if self.recipe.needs_key:
            self.rounding_key.set_value(self.folded_key_data(1))


def _value_of(rhs: jax.Array | dot.Prequantized) -> jax.Array:
    return rhs.value if isinstance(rhs, dot.Prequantized) else rhs


class DotGeneral(QuantizedDot):
    """A stateful `jax.lax.dot_general` for the `dot_general` of NNX layers."""

    def __call__(
        self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision  # the recipe says
        product = functools.partial(dot.dot_general, dimension_numbers=dimension_numbers)
        plain = lambda lhs, rhs: lax.dot_general(lhs, _value_of(rhs), dimension_numbers)
        return self._multiply(product, plain, lhs, rhs, preferred_element_type, out_sharding)


class EinsumOp(QuantizedDot):
    """A stateful two-operand `jnp.einsum` for the `einsum_op` of NNX layers."""

    def __call__(
        self, subscripts, lhs, rhs, precision=None, preferred_element_type=None, out_sharding=None
    ) -> jax.Array:
        del precision
        product = functools.partial(dot.einsum, subscripts)
        plain = lambda lhs, rhs: jnp.einsum(subscripts, lhs, _value_of(rhs))
        return self._multiply(product, plain, lhs, rhs, preferred_element_type, out_sharding)


class Linear(nnx.Linear):
    """`nnx.Linear` in a recipe's arithmetic.

    Args:
      in_features, out_features: sizes of the kernel.
      recipe: a Recipe or its string.
      rngs: as for nnx.Linear, and stream 'rounding' for stochastic rounding.
      **kwargs: as for nnx.Linear.

    Raises:
      ValueError: a tile that does not divide its axis of the kernel; the other axes are checked by a call.
    """

    def __init__(self, in_features: int, out_features: int, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        operation = DotGeneral(recipe, rngs=rngs)
        super().__init__(in_features, out_features, rngs=rngs, dot_general=operation, **kwargs)
        _check_tiles(self, operation.recipe)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(self, in_features, out_features, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs):
        operation = DotGeneral(recipe, rngs=rngs)
        super().__init__(in_features, out_features, rngs=rngs, dot_general=operation, **kwargs)
        _check_tiles(self, operation.recipe)


class Einsum(nnx.Einsum):
    """`nnx.Einsum` in a recipe's arithmetic; arguments as `Linear`."""

    def __init__(
        self, einsum_str: str, kernel_shape, bias_shape=None, *, recipe: Recipe | str, rngs: nnx.Rngs, **kwargs
    ):
        operation = EinsumOp(recipe, rngs=rngs)
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, einsum_op=operation, **kwargs)
        _check_tiles(self, operation.recipe)


_OPERATIONS: dict[str, type[QuantizedDot]] = {"dot_general": DotGeneral, "einsum_op": EinsumOp}


def _layers(model: nnx.Module) -> dict[str, Any]:
    """The modules with a dot of their own, by path; those inside nnx.MultiHeadAttention are its LinearGenerals."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if vars(module).keys() & _OPERATIONS}


def _kernel_shape(layer: Any) -> tuple[int, ...] | None:
    """Shape of the kernel of one layer, also where the layer is a stack; None of a layer of another kind."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    return tuple(layer.kernel_shape) if isinstance(layer, nnx.Einsum) else None


def _check_tiles(layer: Any, recipe: Recipe) -> None:
    kernel = _kernel_shape(layer)
    if kernel is None:
        return
    if isinstance(layer, nnx.Einsum):
        tiles.check_einsum(recipe, layer.einsum_str, kernel)
    elif isinstance(layer, nnx.LinearGeneral):
        tiles.check_kernel(recipe, kernel, len(layer.batch_axis), len(layer.in_features))
    else:
        tiles.check_kernel(recipe, kernel, 0, 1)


def _stack(layer: Any, recipe: Recipe) -> tuple[int, ...]:
    """Leading axes of a layer that is a stack: as it says itself, or those that `nnx.vmap` gave to its kernel."""
    if hasattr(layer, "stack"):
        return tuple(layer.stack)
    own = _kernel_shape(layer)
    if own is None:
        return ()
    shape = layer.kernel[...].shape
    stack = shape[: len(shape) - len(own)]
    if stack and recipe.is_quantized and shape != stack + own:
        raise ValueError(
            f"its kernel of shape {shape} is no stack of kernels of shape {own} along leading axes: give nnx.vmap "
            "out_axes=0."
        )
    return stack


def quantize_model(model: nnx.Module, policy: Policy | Recipe | str, *, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """Makes an NNX model's layers run in the recipes of a policy, in place.

    Args:
      model: a model with `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum` layers at any depth, also inside
        `nnx.MultiHeadAttention` and in stacks made by `nnx.vmap`. Any other module with an attribute `dot_general`
        or `einsum_op` that it multiplies with is a layer too; if it is a stack, its attribute `stack`, a tuple of
        ints, gives the leading axes.
      policy: a Policy, a Recipe for every layer, or the string of either. A layer shared by several modules has the
        path of the first.
      rngs: for recipes with stochastic rounding.

    Returns:
      The same model. Its parameters are as before; each quantized layer has gained scaling state.

    Raises:
      ValueError: no layer to quantize, a rule that matches none, a tile that does not divide its axis of a kernel, or
        a stack on other than the leading axes.
    """
    if isinstance(policy, str):
        policy = Policy.parse(policy)
    elif isinstance(policy, Recipe):
        policy = Policy(((".*", policy),))
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "quantize_model found no layer: give it a model with nnx.Linear, nnx.LinearGeneral, nnx.Einsum, or modules "
            "with an attribute dot_general or einsum_op."
        )
    recipes = policy.resolve(layers)
    stacks = {}
    for path, recipe in recipes.items():
        try:
            stacks[path] = _stack(layers[path], recipe)
            _check_tiles(layers[path], recipe)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from None
    for path, recipe in recipes.items():
        layer = layers[path]
        for name in [name for name in _OPERATIONS if name in vars(layer)]:
            setattr(layer, name, nnx.data(_OPERATIONS[name](recipe, stack=stacks[path], path=path, rngs=rngs)))
        if hasattr(layer, "dot_general_cls"):
            layer.dot_general_cls = None  # it would take precedence
    return model


def _dots(model: nnx.Module) -> dict[tuple, QuantizedDot]:
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedDot)}


def scaling_states(model: nnx.Module) -> dict[str, ScalingState]:
    """The scaling state of every quantized dot, by path."""
    return {"/".join(map(str, path)): module.state for path, module in _dots(model).items()}


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, Any, Any]]:
    """Differentiates a loss with respect to a model's parameters, and observes its amaxes.

    Args:
      loss_fn: function of (model, *args), args being pytrees of arrays, that returns a scalar, or (scalar, aux).
      has_aux: whether it returns aux.

    Returns:
      A function of (model, *args) that returns (loss, grads, amaxes), or ((loss, aux), grads, amaxes): `grads` is the
      nnx.State of the nnx.Param's gradients, `amaxes` that of the Scale's observed amaxes, all uses of a layer
      combined by max. Other state that the loss changes is updated in the model. It compiles itself, once for each
      `loss_fn`, and may be called inside jit as well.
    """

    def wrapped(model, *args):
        graphdef, params, scales, rest = nnx.split(model, nnx.Param, Scale, ...)
        value, changed, grads, amaxes = _value_and_grad(loss_fn, has_aux, graphdef, params, scales, rest, args)
        nnx.update(model, changed)
        return value, grads, amaxes

    return wrapped


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _value_and_grad(loss_fn, has_aux, graphdef, params, scales, rest, args):
    def pure(params, scales):
        model = nnx.merge(graphdef, params, jax.tree.map(scaling.observing, scales), rest, copy=True)
        before = {path: _value(leaf) for path, leaf in _other_state(model)}
        result = loss_fn(model, *args)
        loss, aux = result if has_aux else (result, None)
        # NNX lets a model be updated only where it was made, so what stayed as it was is left out: a scan over
        # microbatches can then close over the model.
        changed = {path: leaf for path, leaf in _other_state(model) if _value(leaf) is not before.get(path)}
        return loss, (aux, nnx.from_flat_state(changed))

    with scaling.explained():
        (loss, (aux, changed)), (grads, amaxes) = jax.value_and_grad(pure, argnums=(0, 1), has_aux=True)(params, scales)
    return ((loss, aux) if has_aux else loss), changed, grads, amaxes


def _other_state(model: nnx.Module) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, Scale, KernelCodes))))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def update_scaling(model: nnx.Module, amaxes: nnx.State) -> None:
    """Turns the amaxes of one step into the model's next scaling state, in place, for all layers at once.

    Args:
      model: the model.
      amaxes: as `value_and_grad` returned them; of several microbatches, joined by `q8jax.scaling.combine`.
    """
    observed = dict(nnx.to_flat_state(amaxes))
    stateful = {path: module for path, module in _dots(model).items() if module.recipe.slots}
    found = [observed[*path, "scale"][...] for path in stateful]
    following = scaling.update([module.state for module in stateful.values()], found)
    for module, state in zip(stateful.values(), following, strict=True):
        module.follow(state)


def fold_rounding_keys(model: nnx.Module, number: int | jax.Array) -> nnx.Module:
    """A twin of a model, or of a layer, that rounds stochastically by keys into which a number is folded.

    Args:
      model: stays as it is; the twin shares all its variables but the keys.
      number: of the microbatch, or of the call, within the step; an int32 scalar may be traced.
    """
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    for module in _dots(twin).values():
        if module.recipe.needs_key:
            module.rounding_key = module.rounding_key.replace(module.folded_key_data(number))
    return twin


def prequantize(model: Model) -> Model:
    """A twin of a model whose layers multiply by codes of their kernels that are made here, once.

    Call it before a loop over microbatches, or over layers where they are a stack, and differentiate the twin instead:
    losses, gradients and amaxes are those of the model, bit for bit (but kernels that are rounded stochastically are so
    once, whatever `fold_rounding_keys` does later). It holds for kernels as they are now, so for one step. Its price is
    memory for the codes of all kernels.

    An nnx.Einsum, a layer without a dtype of its own, or with a kernel that is sharded along explicit mesh axes,
    quantizes as before, and so does any other product of a layer's `dot_general`.

    Args:
      model: stays as it is; the twin shares all its variables.
    """
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    for layer in _layers(twin).values():
        product = vars(layer).get("dot_general")
        if not isinstance(layer, nnx.Linear | nnx.LinearGeneral) or not isinstance(product, DotGeneral):
            continue
        if layer.dtype is None or isinstance(layer.promote_dtype, _Promote) or not product.recipe.is_quantized:
            continue
        (kernel,) = layer.promote_dtype((layer.kernel[...],), dtype=layer.dtype)
        if jax.typeof(kernel).sharding.mesh.explicit_axes:
            continue
        stack = kernel.ndim - len(_kernel_shape(layer) or ())
        with path_scope(product.path) if product.path else contextlib.nullcontext():
            made = product.prequantized(kernel, _dimension_numbers(layer), stack)
        layer.promote_dtype = nnx.data(_Promote(layer.promote_dtype, made))
    return twin


class _Promote(nnx.Module):
    """A layer's `promote_dtype` that adds to its kernel the codes of it."""

    def __init__(self, promote: Callable, made: dot.Prequantized):
        self.promote = promote
        self.uses = made.uses
        self.made: nnx.Variable = KernelCodes((made.codes, made.amax))

    def __call__(self, arrays, *, dtype=None, **kwargs):
        inputs, kernel, bias = self.promote(arrays, dtype=dtype, **kwargs)
        return inputs, dot.Prequantized(kernel, *self.made.get_value(), uses=self.uses), bias


def _dimension_numbers(layer: nnx.Linear | nnx.LinearGeneral) -> DimensionNumbers:
    """Of the layer's product with an input of as few axes as can be."""
    batch, contracting = (0, 1) if isinstance(layer, nnx.Linear) else (len(layer.batch_axis), len(layer.in_features))
    own = tuple(range(batch, batch + contracting))
    return (own, own), (tuple(range(batch)),) * 2


def calibrate(model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> None:
    """Warm start: sets the scales from one forward and backward pass in which every scale is the tensor's own.

    Args:
      model: the model; its scaling state changes in place, as in one step, and nothing else does.
      loss_fn, has_aux: as for `value_and_grad`.
      *args: the first global batch.
    """
    twin = nnx.clone(model)
    with calibrating(twin):
        _, _, amaxes = value_and_grad(loss_fn, has_aux=has_aux)(twin, *args)
    update_scaling(model, amaxes)


@contextlib.contextmanager
def calibrating(model: nnx.Module) -> Iterator[None]:
    """Context in which a model's dots scale each tensor by its own amax, whatever their recipe says."""
    modules = _dots(model).values()
    for module in modules:
        module.calibrating = True
    try:
        yield
    finally:
        for module in modules:
            module.calibrating = False
