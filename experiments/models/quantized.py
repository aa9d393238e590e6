"""Quantized models in folders: codes beside the other weights, and how they are to be read in the header of the file.

Beside what is not quantized, under its published names, model.safetensors holds for each layer with stored codes

    PATH.codes .scale .zero_point .codebook .whole    what `q8jax.stored.Stored` is made of
    PATH.input_scale .input_zero_point .inverse .outliers .outlier_kernel    what is done to inputs

of which those that there are, with dots in place of the slashes of paths. The header's entry "q8jax" is JSON: the
policy, and for each path the format of its codes and the recipe of its product. All of it is checked against the model
before anything is taken over.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import q8jax.nnx as qnnx
from experiments.models import tensors
from experiments.models.tensors import Tensor
from q8jax.nnx.frozen import Extras, StoredDot, embeddings_of, freeze_embedding, freeze_layer
from q8jax.nnx.layers import kernel_shape, layers_of
from q8jax.recipe import Recipe
from q8jax.stored import Form, Stored

ENTRY = "q8jax"
_STORED = ("codes", "scale", "zero_point", "codebook", "whole")
_INPUTS = {"input_scale": "scale", "input_zero_point": "zero_point"} | {
    name: name for name in ("inverse", "outliers", "outlier_kernel")
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What the header says.

    Attributes:
      policy: as the user gave it.
      layers: by path, `form`, `recipe`, and `inputs`, the format of affine inputs, or None.
      embeddings: by path, `form`.
    """

    policy: str
    layers: Mapping[str, Mapping[str, Any]]
    embeddings: Mapping[str, Mapping[str, Any]]

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def is_quantized(model: nnx.Module) -> bool:
    """Whether a model has stored codes."""
    return any(isinstance(node, qnnx.StoredKernel) for _, node in nnx.iter_graph(model))


def describe(model: nnx.Module, policy: str) -> Description:
    """What the header is to say of a model with stored codes."""
    layers = {}
    for path, (layer, dot) in _stored_layers(model).items():
        form = dataclasses.asdict(layer.kernel[...].form)
        layers[path] = {"form": form, "recipe": str(dot.recipe), "inputs": dot.affine}
    tables = {path: table.embedding[...] for path, table in embeddings_of(model).items()}
    embeddings = {
        path: {"form": dataclasses.asdict(table.form)} for path, table in tables.items() if isinstance(table, Stored)
    }
    return Description(policy, layers, embeddings)


def values(model: nnx.Module) -> dict[str, np.ndarray]:
    """The tensors that a model with stored codes adds to the file, by name."""
    found: dict[str, Any] = {}
    for path, (layer, dot) in _stored_layers(model).items():
        found |= {f"{path}.{name}": getattr(layer.kernel[...], name) for name in _STORED}
        for name, ours in _INPUTS.items():
            variable = getattr(dot, ours)
            found[f"{path}.{name}"] = None if variable is None else variable[...]
    for path, table in embeddings_of(model).items():
        if isinstance(stored := table.embedding[...], Stored):
            found |= {f"{path}.{name}": getattr(stored, name) for name in _STORED}
    return {name.replace("/", "."): np.asarray(value) for name, value in found.items() if value is not None}


def read_header(path: Path) -> Description | None:
    """What the header of a file says; None of a file that is not quantized.

    Args:
      path: as `tensors.find` takes it.

    Raises:
      ValueError: the file cannot be read, or the entry is not as it must be.
    """
    file = path / tensors.FILE if path.is_dir() else path
    if not file.exists() or file.name.endswith(".index.json"):
        return None
    text = tensors.metadata(file).get(ENTRY)
    if text is None:
        return None
    try:
        entry = json.loads(text)
        found = Description(**entry)
        is_right = isinstance(found.policy, str) and all(
            isinstance(group, dict) and all(isinstance(each, dict) for each in group.values())
            for group in (found.layers, found.embeddings)
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The header of {file} is damaged in {ENTRY!r} ({str(error)[:100]}): restore it.") from None
    if not is_right:
        raise ValueError(f"The header of {file} is damaged in {ENTRY!r}: restore it.")
    return found


def restore(model: nnx.Module, path: Path, description: Description) -> set[str]:
    """Gives a model its stored codes.

    Args:
      model: as it was before it was quantized.
      path: of the file, or its folder.
      description: of its header.

    Returns:
      The names of the tensors that were read.

    Raises:
      ValueError: a layer that the model has not, or a tensor that is missing or not as the header says.
    """
    found = tensors.find(path)
    file = path / tensors.FILE if path.is_dir() else path
    layers = layers_of(model)
    taken: set[str] = set()
    for name, entry in description.layers.items():
        try:
            if name not in layers:
                raise ValueError("the model has no such layer")
            layer = layers[name]
            stack = layer.kernel[...].ndim - len(kernel_shape(layer) or ())
            kernel = _stored(found, name, entry, taken)
            extras = _extras(found, name, entry, kernel, stack, taken)
            freeze_layer(layer, kernel, Recipe.parse(_text(entry, "recipe")), extras, path=name)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged in layer {name!r} ({error}): restore it.") from None
    for name, entry in description.embeddings.items():
        try:
            freeze_embedding(model, name, _stored(found, name, entry, taken))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged in embeddings {name!r} ({error}): restore it.") from None
    return taken


def _stored_layers(model: nnx.Module) -> dict[str, tuple[Any, StoredDot]]:
    found = {}
    for path, layer in layers_of(model).items():
        dots = [value for value in vars(layer).values() if isinstance(value, StoredDot)]
        if dots:
            found[path] = layer, dots[0]
    return found


def _text(entry: Mapping[str, Any], name: str) -> str:
    if not isinstance(entry.get(name), str):
        raise ValueError(f"{name} is no text")
    return entry[name]


def _read(found: Mapping[str, Tensor], name: str, taken: set[str]) -> jax.Array | None:
    name = name.replace("/", ".")
    if name not in found:
        return None
    taken.add(name)
    return jnp.asarray(found[name].read())


def _stored(found: Mapping[str, Tensor], path: str, entry: Mapping[str, Any], taken: set[str]) -> Stored:
    """Codes as the header describes them, of which everything is checked but that they are of this kernel."""
    fields = entry.get("form")
    types = {field.name: str if field.type == "str" or field.type is str else int for field in dataclasses.fields(Form)}
    if not isinstance(fields, dict) or fields.keys() != types.keys():
        raise ValueError("form is incomplete")
    for name, kind in types.items():
        if type(fields[name]) is not kind:
            raise ValueError(f"{name} is {fields[name]!r}")
    form = Form(**fields)
    parts: dict[str, Any] = {name: _read(found, f"{path}.{name}", taken) for name in _STORED}
    if parts["codes"] is None or parts["scale"] is None:
        raise ValueError(f"{path.replace('/', '.')}.codes or .scale is missing")
    stored = Stored(**parts, sums=None, form=form)
    stored.check()
    return stored


def _extras(
    found: Mapping[str, Tensor], path: str, entry: Mapping[str, Any], kernel: Stored, stack: int, taken: set[str]
) -> Extras:
    arrays = {ours: _read(found, f"{path}.{name}", taken) for name, ours in _INPUTS.items()}
    leading, (inputs, outputs) = kernel.shape[:stack], kernel.shape[-2:]
    affine = entry.get("inputs")
    if affine not in (None, "int8", "uint8"):
        raise ValueError(f"inputs are {affine!r}")
    recipe = Recipe.parse(_text(entry, "recipe"))
    slots = () if affine else (len(recipe.slots),)
    count = 0 if arrays["outliers"] is None else arrays["outliers"].shape[-1]
    wanted = {
        "scale": (leading + slots, jnp.float32),
        "zero_point": (leading, jnp.int32),
        "inverse": ((*leading, inputs), jnp.float32),
        "outliers": ((*leading, count), jnp.int32),
        "outlier_kernel": ((*leading, count, outputs), jnp.float32),
    }
    for name, (shape, dtype) in wanted.items():
        array = arrays[name]
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(f"{name} of inputs is {array.dtype} of shape {array.shape}, not {shape}")
    outliers = arrays["outliers"]
    if (outliers is None) != (arrays["outlier_kernel"] is None):
        raise ValueError("outliers and their kernel do not come together")
    if outliers is not None and not bool(jnp.all((outliers >= 0) & (outliers < inputs))):
        raise ValueError("outliers are no channels of inputs")
    return Extras(**arrays, affine=affine)
