"""One loader for published weights, and its inverse: tensors by their published names to a model's variables.

A table says which tensors make up which variable and how they are laid out; it is all that the loader knows of a model.
Nothing is skipped in silence: what the file has and the model has not, or the other way round, is an error unless the
table names it.
"""

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import q8jax.nnx as qnnx
from experiments.models import tensors
from experiments.models.tensors import Tensor
from q8jax import choices
from q8jax.nnx import StoredKernel

# What float32 holds exactly, and needs no scale.
_TYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors make up a variable: joined along its last axis, which is in groups that each have a part of all.

    Attributes:
      transposed: whether the tensors are matrices with the axes in the other order.
      shares: in which proportion the tensors are in each group; (1,) of one tensor.
      groups: number of groups.
    """

    transposed: bool = False
    shares: tuple[int, ...] = (1,)
    groups: int = 1

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The variable [..., groups · sum of shares · n], of tensors [..., groups · share · n] or their transposes."""
        parts = [part.T for part in parts] if self.transposed else parts
        grouped = [part.reshape(*part.shape[:-1], self.groups, -1) for part in parts]
        return np.concatenate(grouped, axis=-1).reshape(*parts[0].shape[:-1], -1)

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """Inverse of `join`."""
        grouped = value.reshape(*value.shape[:-1], self.groups, sum(self.shares), -1)
        parts = np.split(grouped, np.cumsum(self.shares)[:-1], axis=-2)
        flat = [part.reshape(*value.shape[:-1], -1) for part in parts]
        return [part.T for part in flat] if self.transposed else flat


PLAIN = Layout()
TRANSPOSED = Layout(transposed=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A variable, or that of every layer, and its tensors.

    Attributes:
      variable: its path in the model; '{i}' stands for the number of a layer.
      names: published names of the tensors; with '{i}' where the path has none, the variable is a stack of the layers.
      layout: how the tensors make it up.
    """

    variable: str
    names: tuple[str, ...]
    layout: Layout = PLAIN


@dataclasses.dataclass(frozen=True)
class Table:
    """What a model's tensors are called where it is published.

    Attributes:
      rows: one for every variable, or variable of every layer.
      layers: number of layers.
      prefix: which all names begin with, or none, in a file of the model without its head.
      bare: whether a file is written without it.
      optional: paths of modules that a file may lack, if the caller says so.
      unread: names of tensors that a file may have and the model has no use for; '{i}' as in rows.
      copies: names of tensors that a file may have and that equal the one beside them, as a tied head does.
      endings: older endings of names, and what they are today.
    """

    rows: tuple[Row, ...]
    layers: int
    prefix: str = ""
    bare: bool = False
    optional: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    endings: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A variable, and its tensors' names layer by layer: of one layer, unless it is a stack."""

    variable: str
    names: tuple[tuple[str, ...], ...]
    layout: Layout
    stacked: bool

    def is_in(self, module: str) -> bool:
        return self.variable.startswith(f"{module}/")

    @property
    def all_names(self) -> list[str]:
        return [name for names in self.names for name in names]

    def shapes(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of the tensors, where this is the variable's."""
        for name, part in self.split(np.broadcast_to(np.float32(0), shape)):
            yield name, part.shape

    def join(self, found: Mapping[str, Tensor]) -> np.ndarray:
        layers = [self.layout.join([found[name].read().astype(np.float32) for name in names]) for names in self.names]
        return np.stack(layers) if self.stacked else layers[0]

    def split(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for names, layer in zip(self.names, value if self.stacked else value[None], strict=True):
            # Outputs that have several axes, as those of gate and up, are columns of one matrix.
            joined = layer.ndim > 2 and self.layout != PLAIN
            matrix = layer.reshape(layer.shape[0], -1) if joined else layer
            yield from zip(names, self.layout.split(matrix), strict=True)


def load(
    model: nnx.Module,
    table: Table,
    path: str | os.PathLike[str],
    *,
    new: Collection[str] = (),
    beside: Collection[str] = (),
) -> tuple[str, ...]:
    """Gives a model the weights in a file or folder; all is checked before any is given.

    Args:
      model: which may be abstract (`nnx.eval_shape`) if it has parameters alone; one that is quantized and keeps scales
        is to be calibrated afterwards.
      table: the model's.
      path: a .safetensors file, an index of several, or a folder that holds either; float32, bfloat16 or float16.
      beside: names of tensors that are read otherwise, as those of stored codes.
      new: paths of optional modules that stay as they are where the file has nothing for them, as a head to be trained.

    Returns:
      The variables that stayed as they are.

    Raises:
      ValueError: a module that is not optional, a file that cannot be read or is damaged, or a tensor that is missing,
        too many, or of another shape or type.
    """
    for module in new:
        choices.check("optional module", module, table.optional)
    variables = _variables(model, table)
    found = tensors.find(Path(path))
    bare = not any(name.startswith(table.prefix) for name in found)
    given = _by_todays_name(found, table.endings)

    slots = [slot for slot in _slots(table, bare) if slot.variable in variables]
    stay = [name for module in new for name in _absent([s for s in slots if s.is_in(module)], given)]
    slots = [slot for slot in slots if slot.variable not in stay]
    copies = {copy: _named(original, table, bare) for copy, original in table.copies if copy in given}
    unread = [name for row in table.unread for name in _of_layers(_named(row, table, bare), table.layers)]
    needed = [name for slot in slots for name in slot.all_names]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{path} lacks {_some(missing)}: give weights of the model that config.json describes.")
    known = {*needed, *copies, *unread, *beside}
    if extra := [given[name] for name in given if name not in known]:
        held = _some([tensor.name for tensor in extra])
        raise ValueError(f"{extra[0].file} holds {held}, for which the model has no place: give weights of this model.")
    for slot in slots:
        for name, shape in slot.shapes(variables[slot.variable].shape):
            _check(given[name], shape)
    for copy, original in copies.items():
        _check(given[copy], given[original].shape)
        if given[copy].read().tobytes() != given[original].read().tobytes():
            raise ValueError(
                f"{copy!r} in {given[copy].file} differs from {original!r}, which config.json ties it to: repair that."
            )
    for slot in slots:
        variable = variables[slot.variable]
        variable.set_value(jnp.array(slot.join(given).reshape(variable.shape)))
    return tuple(stay)


def save(
    model: nnx.Module,
    table: Table,
    path: str | os.PathLike[str],
    *,
    beside: Mapping[str, np.ndarray] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Writes a model's float32 parameters to a .safetensors file; `load` gives them back bit for bit.

    Args:
      model: whose kernels may be stored codes.
      table: the model's.
      path: of the file.
      beside: further tensors, as those of stored codes.
      header: what else the header of the file is to say.

    Raises:
      ValueError: the file cannot be written.
    """
    variables = _variables(model, table)
    values: dict[str, np.ndarray] = {}
    for slot in _slots(table, table.bare):
        if slot.variable in variables:
            values.update(slot.split(np.asarray(variables[slot.variable][...])))
    tensors.write(Path(path), values | dict(beside or {}), header)


def is_weight(node: Any) -> bool:
    """Whether a node of a model is one of its parameters; ranges that are learned with them are scales' beginnings."""
    return isinstance(node, nnx.Param) and not isinstance(node, qnnx.Range)


def _variables(model: nnx.Module, table: Table) -> dict[str, nnx.Param]:
    """Parameters by path, which the table has to list, as it does those that are stored as codes."""
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    variables = {path: node for path, node in nodes.items() if is_weight(node)}
    listed = variables.keys() | {path for path, node in nodes.items() if isinstance(node, StoredKernel)}
    if apart := listed ^ {slot.variable for slot in _slots(table, bare=False)}:
        raise ValueError(f"The table of names is not of this model, they differ in {_some(sorted(apart))}.")
    return variables


def _slots(table: Table, bare: bool) -> Iterator[_Slot]:
    for row in table.rows:
        names = [_of_layers(_named(name, table, bare), table.layers) for name in row.names]
        by_layer = tuple(zip(*names, strict=True))
        if "{i}" in row.names[0] and "{i}" not in row.variable:
            yield _Slot(row.variable, by_layer, row.layout, stacked=True)
            continue
        for variable, of_layer in zip(_of_layers(row.variable, table.layers), by_layer, strict=True):
            yield _Slot(variable, (of_layer,), row.layout, stacked=False)


def _absent(slots: Sequence[_Slot], given: Mapping[str, Tensor]) -> list[str]:
    """The variables of a module if nothing of it is given; of half a module, the other half is missing."""
    return [] if any(name in given for slot in slots for name in slot.all_names) else [slot.variable for slot in slots]


def _of_layers(name: str, layers: int) -> list[str]:
    return [name.replace("{i}", str(i)) for i in range(layers)] if "{i}" in name else [name]


def _named(name: str, table: Table, bare: bool) -> str:
    return name.removeprefix(table.prefix) if bare else name


def _by_todays_name(found: Mapping[str, Tensor], endings: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for name, tensor in found.items():
        for old, today in endings:
            name = name.removesuffix(old) + today if name.endswith(old) else name
        if name in given:
            raise ValueError(f"{tensor.file} holds both {tensor.name!r} and {given[name].name!r}: leave one out.")
        given[name] = tensor
    return given


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _TYPES:
        raise ValueError(
            f"{tensor.name!r} in {tensor.file} is of type {tensor.dtype}, not one of {', '.join(_TYPES)}: "
            "give weights that are not quantized."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.name!r} in {tensor.file} has shape {tensor.shape}, where the model's is {shape}: give weights of "
            "the model that config.json describes."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
