"""Published models: shapes by the options in their config.json, and weights, both ways.

Options are those of the Transformers library, as which nearly all models are published. Those that change what a model
computes, and that the models here do not have, are refused by name; of the many others none is looked at.
"""

import dataclasses
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax import nnx

from experiments.models import names, weights
from experiments.models.bert import BertConfig
from experiments.models.config import RopeScaling, TransformerConfig
from experiments.models.gpt2 import Gpt2, Gpt2Config
from experiments.models.tensors import FILE, read_json
from experiments.models.transformer import Transformer
from experiments.runs.files import write_json

CONFIG = "config.json"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}

_BERT_SIZES = MappingProxyType(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "intermediate_size": "d_ff",
        "vocab_size": "vocab",
        "max_position_embeddings": "positions",
        "type_vocab_size": "types",
    }
)
_GPT2_SIZES = MappingProxyType(
    {
        "n_layer": "layers",
        "n_embd": "d_model",
        "n_head": "heads",
        "n_inner": "d_ff",
        "vocab_size": "vocab",
        "n_positions": "positions",
    }
)
_LLAMA_SIZES = MappingProxyType(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "d_ff",
        "vocab_size": "vocab",
    }
)
_ROPE_SCALING = MappingProxyType(
    {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "positions",
    }
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a file; a ValueError names it, and the option that is not as it must be.

    Attributes:
      file: a config.json.
      values: the options.
      within: what stands before their names.
    """

    file: Path
    values: dict[str, Any]
    within: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str], model_type: str) -> "Options":
        file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
        options = cls(file, read_json(file))
        options.only("model_type", model_type)
        options.only("quantization_config", None)
        return options

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """An option of a type, which has to be there if there is no default."""
        value: Any = self.values.get(name)
        if value is None and default is None:
            raise ValueError(f"{self.file} does not say {self.within}{name}: give the {CONFIG} of the model.")
        if value is None:
            return default
        # To Python true is a whole number, and NaN a number.
        is_kind = isinstance(value, bool) == (kind is bool) and isinstance(
            value, (int, kind) if kind is float else kind
        )
        if not is_kind or (kind is float and not abs(value) <= sys.float_info.max):
            raise ValueError(
                f"{self.file} gives {self.within}{name} the value {value!r}, which must be {_KINDS[kind]}: repair it."
            )
        return float(value) if kind is float else value

    def sizes(self, table: Mapping[str, str], **defaults: int) -> dict[str, int]:
        return {ours: self.get(name, int, defaults.get(ours)) for name, ours in table.items()}

    def only(self, name: str, default: Any, *others: Any) -> None:
        """Refuses an option that has none of these values."""
        value = self.values.get(name)
        if value is not None and value not in (default, *others):
            valid = " or ".join(dict.fromkeys(map(repr, (default, *others))))
            raise ValueError(
                f"{self.file} has {value!r} for {self.within}{name}, where only {valid} is supported: choose another "
                "model."
            )

    def whole_numbers(self, name: str) -> tuple[int, ...]:
        found = self.values.get(name)
        if not isinstance(found, list) or any(type(item) is not int for item in found):
            raise ValueError(
                f"{self.file} gives {self.within}{name} the value {found!r}, which must be whole numbers: repair it."
            )
        return tuple(found)

    def inner(self, name: str) -> "Options":
        return Options(self.file, self.get(name, dict, {}), f"{name}.")

    def make(self, config: Any, **values: Any) -> Any:
        try:
            return config(**values)
        except ValueError as error:
            # Elsewhere the shapes are flags.
            raise ValueError(f"{self.file}: {str(error).replace('--', '')}") from None


def bert_config(path: str | os.PathLike[str]) -> BertConfig:
    """Shapes of a published BERT.

    Args:
      path: its config.json, or the folder of that.

    Raises:
      ValueError: the file is absent, of another kind of model, lacks a size, or has an option that is not supported.
    """
    options = Options.read(path, "bert")
    options.only("hidden_act", "gelu")
    options.only("position_embedding_type", "absolute")
    options.only("is_decoder", False)
    options.only("add_cross_attention", False)
    options.only("pruned_heads", {})
    norm_eps = options.get("layer_norm_eps", float, 1e-12)
    return options.make(BertConfig, **options.sizes(_BERT_SIZES), norm_eps=norm_eps)


def gpt2_config(path: str | os.PathLike[str]) -> Gpt2Config:
    """Shapes of a published GPT-2; arguments and errors as `bert_config`."""
    options = Options.read(path, "gpt2")
    options.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    options.only("scale_attn_weights", True)
    options.only("scale_attn_by_inverse_layer_idx", False)
    options.only("add_cross_attention", False)
    options.only("tie_word_embeddings", True)
    sizes = options.sizes(_GPT2_SIZES, d_ff=4 * options.get("n_embd", int))
    return options.make(Gpt2Config, **sizes, norm_eps=options.get("layer_norm_epsilon", float, 1e-5))


def llama_config(path: str | os.PathLike[str]) -> TransformerConfig:
    """Shapes of a published Llama; arguments and errors as `bert_config`."""
    options = Options.read(path, "llama")
    options.only("hidden_act", "silu")
    options.only("attention_bias", False)
    options.only("mlp_bias", False)
    # Newer versions of the library write in one place what older ones wrote in two.
    rope = options.inner("rope_parameters")
    theta = rope.get("rope_theta", float, options.get("rope_theta", float, 10_000.0))
    config = options.make(
        TransformerConfig,
        **options.sizes(_LLAMA_SIZES, kv_heads=options.get("num_attention_heads", int)),
        tied=options.get("tie_word_embeddings", bool, False),
        rope_theta=theta,
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        scaled_embedding=False,
        rope_scaling=_rope_scaling(rope if rope.values else options.inner("rope_scaling")),
    )
    options.only("head_dim", config.head_dim)
    return config


def _rope_scaling(options: Options) -> RopeScaling | None:
    name = "type" if "type" in options.values else "rope_type"
    options.only(name, "default", "llama3")
    if options.get(name, str, "default") == "default":
        return None
    kinds = {"positions": int}
    values = {ours: options.get(theirs, kinds.get(ours, float)) for theirs, ours in _ROPE_SCALING.items()}
    return options.make(RopeScaling, **values)


def options_of(model: nnx.Module) -> dict[str, Any]:
    """What config.json says of a Bert, of a model with one, of a Gpt2 or of a Transformer.

    Raises:
      ValueError: a transformer that is no Llama.
    """
    if isinstance(model, Transformer):
        return _llama_options(model.config)
    if isinstance(model, Gpt2):
        sizes = {name: getattr(model.config, ours) for name, ours in _GPT2_SIZES.items()}
        kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
        return {**kind, **sizes, "layer_norm_epsilon": model.config.norm_eps}
    encoder = names.encoder_of(model)[1]
    sizes = {name: getattr(encoder.config, ours) for name, ours in _BERT_SIZES.items()}
    architecture = names.HEADS[type(model)][1] if type(model) in names.HEADS else "BertModel"
    kind = {"model_type": "bert", "architectures": [architecture], "hidden_act": "gelu"}
    return {**kind, **sizes, "layer_norm_eps": encoder.config.norm_eps}


def _llama_options(config: TransformerConfig) -> dict[str, Any]:
    if config.scaled_embedding:
        raise ValueError("A Llama does not scale its embeddings by the root of d_model, as this transformer does.")
    names.check_gated(config)
    scaling = config.rope_scaling
    values = {} if scaling is None else {name: getattr(scaling, ours) for name, ours in _ROPE_SCALING.items()}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        **{name: getattr(config, ours) for name, ours in _LLAMA_SIZES.items()},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **values} if values else None,
    }


def load(model: nnx.Module, path: str | os.PathLike[str], *, new: Collection[str] = ()) -> tuple[str, ...]:
    """Gives a model published weights: `weights.load` by the names that `names.table` knows."""
    return weights.load(model, names.table(model), path, new=new)


def save(model: nnx.Module, folder: str | os.PathLike[str]) -> None:
    """Writes config.json and model.safetensors to a folder, in the form and by the names of published models.

    Raises:
      ValueError: a model that `options_of` refuses, or a folder that cannot be written.
    """
    options = options_of(model)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / CONFIG, options)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from error
    weights.save(model, names.table(model), Path(folder) / FILE)
