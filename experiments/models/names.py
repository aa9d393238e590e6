"""What published models call their tensors, against the variables here: a table for each kind of model.

The names are those of the Transformers library, under which nearly all weights are published.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from experiments.models.bert import Bert
from experiments.models.bert_heads import PairClassifier, SequenceClassifier, SpanPredictor, TokenClassifier
from experiments.models.config import TransformerConfig
from experiments.models.gpt2 import Gpt2, Gpt2Config
from experiments.models.transformer import Transformer
from experiments.models.weights import PLAIN, TRANSPOSED, Layout, Row, Table

# The published names of each head, and of the architecture that has it; the last is none that is published.
HEADS: Mapping[type, tuple[str, str]] = MappingProxyType(
    {
        SequenceClassifier: ("classifier", "BertForSequenceClassification"),
        TokenClassifier: ("classifier", "BertForTokenClassification"),
        SpanPredictor: ("qa_outputs", "BertForQuestionAnswering"),
        PairClassifier: ("classifier", "BertForEntityPairs"),
    }
)
# What a BERT is pretrained with and is then of no more use: guessing hidden tokens, and whether sentences follow.
_PRETRAINING = (
    "cls.predictions.bias",
    *(
        f"cls.{name}.{end}"
        for name in (
            "predictions.transform.dense",
            "predictions.transform.LayerNorm",
            "predictions.decoder",
            "seq_relationship",
        )
        for end in ("weight", "bias")
    ),
)


def table(model: nnx.Module) -> Table:
    """The published names of a model's tensors, for `weights.load` and `weights.save`.

    Args:
      model: a Bert, a model with one, a Gpt2, or a Transformer.

    Raises:
      ValueError: a transformer that is not gated as a Llama is.
    """
    if isinstance(model, Transformer):
        return _llama_table(model.config)
    return _gpt2_table(model.config) if isinstance(model, Gpt2) else _bert_table(model)


def encoder_of(model: Any) -> tuple[str, Bert]:
    """The encoder of a model, and what its paths begin with."""
    return ("", model) if isinstance(model, Bert) else ("encoder/", model.encoder)


def _linear(variable: str, *names: str, layout: Layout = TRANSPOSED) -> list[Row]:
    """Of a layer that joins as many published ones."""
    biases = dataclasses.replace(layout, transposed=False)
    return [
        Row(f"{variable}/kernel", tuple(f"{name}.weight" for name in names), layout),
        Row(f"{variable}/bias", tuple(f"{name}.bias" for name in names), biases),
    ]


def _norm(variable: str, name: str) -> list[Row]:
    return [Row(f"{variable}/scale", (f"{name}.weight",)), Row(f"{variable}/bias", (f"{name}.bias",))]


def _bert_table(model: Any) -> Table:
    path, encoder = encoder_of(model)
    block, layer = f"{path}blocks/{{i}}", "bert.encoder.layer.{i}"
    attention = f"{layer}.attention"
    embeddings = {"token": "word", "position": "position", "type": "token_type"}
    if encoder.embeddings.casing is not None:
        embeddings["casing"] = "casing"
    rows = [
        *(
            Row(f"{path}embeddings/{ours}/embedding", (f"bert.embeddings.{name}_embeddings.weight",))
            for ours, name in embeddings.items()
        ),
        *_norm(f"{path}embeddings/norm", "bert.embeddings.LayerNorm"),
        *_linear(
            f"{block}/attention/qkv",
            *(f"{attention}.self.{name}" for name in ("query", "key", "value")),
            layout=Layout(transposed=True, shares=(1, 1, 1)),
        ),
        *_linear(f"{block}/attention/out", f"{attention}.output.dense"),
        *_norm(f"{block}/attention_norm", f"{attention}.output.LayerNorm"),
        *_linear(f"{block}/mlp/up", f"{layer}.intermediate.dense"),
        *_linear(f"{block}/mlp/down", f"{layer}.output.dense"),
        *_norm(f"{block}/mlp_norm", f"{layer}.output.LayerNorm"),
    ]
    unread = ["bert.embeddings.position_ids", *_PRETRAINING]
    if encoder.pooler is not None:
        rows += _linear(f"{path}pooler", "bert.pooler.dense")
    else:
        unread += ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    if type(model) in HEADS:
        rows += _linear("head", HEADS[type(model)][0])
    modules = {row.variable.rpartition("/")[0] for row in rows}
    return Table(
        rows=tuple(rows),
        layers=encoder.config.layers,
        prefix="bert.",
        bare=type(model) not in HEADS,
        optional=tuple(m for m in ("head", f"{path}pooler", f"{path}embeddings/casing") if m in modules),
        unread=tuple(unread),
        # As in the first BERTs, which came from TensorFlow.
        endings=((".gamma", ".weight"), (".beta", ".bias")),
    )


def _gpt2_table(config: Gpt2Config) -> Table:
    layer = "transformer.h.{i}"
    rows = [
        Row("embedding/embedding", ("transformer.wte.weight",)),
        Row("position/embedding", ("transformer.wpe.weight",)),
        *_norm("blocks/{i}/attention_norm", f"{layer}.ln_1"),
        # Its layers are convolutions of length 1, whose weights have inputs first, as kernels have.
        *_linear("blocks/{i}/attention/qkv", f"{layer}.attn.c_attn", layout=PLAIN),
        *_linear("blocks/{i}/attention/out", f"{layer}.attn.c_proj", layout=PLAIN),
        *_norm("blocks/{i}/mlp_norm", f"{layer}.ln_2"),
        *_linear("blocks/{i}/mlp/up", f"{layer}.mlp.c_fc", layout=PLAIN),
        *_linear("blocks/{i}/mlp/down", f"{layer}.mlp.c_proj", layout=PLAIN),
        *_norm("norm", "transformer.ln_f"),
    ]
    return Table(
        rows=tuple(rows),
        layers=config.layers,
        prefix="transformer.",
        unread=(f"{layer}.attn.bias", f"{layer}.attn.masked_bias"),
        copies=(("lm_head.weight", "transformer.wte.weight"),),
    )


def check_gated(config: TransformerConfig) -> None:
    if not config.gated:
        raise ValueError(f"A Llama has a gated feed-forward layer, not {config.activation}.")


def _llama_table(config: TransformerConfig) -> Table:
    check_gated(config)
    layer, embedding = "model.layers.{i}", "model.embed_tokens.weight"
    qkv = tuple(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv")
    gate_up = tuple(f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
    queries = config.heads // config.kv_heads
    rows = [
        Row("embedding/embedding", (embedding,)),
        Row("blocks/attention_norm/scale", (f"{layer}.input_layernorm.weight",)),
        Row("blocks/attention/qkv/kernel", qkv, Layout(True, (queries, 1, 1), config.kv_heads)),
        Row("blocks/attention/out/kernel", (f"{layer}.self_attn.o_proj.weight",), TRANSPOSED),
        Row("blocks/mlp_norm/scale", (f"{layer}.post_attention_layernorm.weight",)),
        Row("blocks/mlp/up/kernel", gate_up, Layout(True, (1, 1))),
        Row("blocks/mlp/down/kernel", (f"{layer}.mlp.down_proj.weight",), TRANSPOSED),
        Row("norm/scale", ("model.norm.weight",)),
    ]
    head = "lm_head.weight"
    if not config.tied:
        rows.append(Row("head/kernel", (head,), TRANSPOSED))
    return Table(
        rows=tuple(rows),
        layers=config.layers,
        unread=(f"{layer}.self_attn.rotary_emb.inv_freq",),
        copies=((head, embedding),) if config.tied else (),
    )
