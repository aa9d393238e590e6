"""Models that nobody else publishes, in the form of published ones: their shapes in config.json, and tensors by the
paths of their variables, with dots in place of slashes.
"""

import dataclasses
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from experiments.models import weights
from experiments.models.cnn import Cnn, CnnConfig
from experiments.models.config import RopeScaling, TransformerConfig
from experiments.models.published import Options
from experiments.models.recurrent import RecurrentConfig, Tagger
from experiments.models.transformer import Transformer
from experiments.models.weights import Row, Table
from q8jax.nnx import StoredKernel

TYPES: Mapping[type, str] = MappingProxyType(
    {TransformerConfig: "q8jax-transformer", CnnConfig: "q8jax-cnn", RecurrentConfig: "q8jax-lstm"}
)
_PLAIN = (int, float, bool, str)


def is_own(model: nnx.Module) -> bool:
    """Whether a model is one of these: a transformer is that if it is no Llama."""
    if isinstance(model, Transformer):
        return model.config.scaled_embedding or not model.config.gated
    return isinstance(model, Cnn | Tagger)


def options_of(model: Any) -> dict[str, Any]:
    """What config.json says of a model."""
    return {"model_type": TYPES[type(model.config)], "shapes": dataclasses.asdict(model.config)}


def config(kind: type, path: str | os.PathLike[str]) -> Any:
    """Shapes of a model, of a class that TYPES has; otherwise as `published.bert_config`."""
    options = Options.read(path, TYPES[kind])
    shapes = Options(options.file, options.get("shapes", dict), "shapes.")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and field.type in _PLAIN:
            values[field.name] = shapes.get(field.name, field.type)
        elif isinstance(field.default, tuple):
            values[field.name] = shapes.whole_numbers(field.name)
        elif shapes.values.get(field.name) is not None:
            inner = shapes.inner(field.name)
            positions = {"positions": inner.get("positions", int)}
            found = {name: inner.get(name, float) for name in ("factor", "low", "high")}
            values[field.name] = options.make(RopeScaling, **found, **positions)
    return options.make(kind, **values)


def table(model: nnx.Module) -> Table:
    """Names of a model's tensors, for `weights.load` and `weights.save`."""
    graph = nnx.iter_graph(model)
    paths = [
        "/".join(map(str, path)) for path, node in graph if weights.is_weight(node) or isinstance(node, StoredKernel)
    ]
    return Table(tuple(Row(path, (path.replace("/", "."),)) for path in paths), layers=1)
