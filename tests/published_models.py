"""Tiny published models: random tensors by their published names, and what they compute, in NumPy and float64."""

import json

import numpy as np
import safetensors.numpy
import scipy.special

BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 24,
    "n_head": 3,
    "vocab_size": 50,
    "n_positions": 12,
    "layer_norm_epsilon": 1e-3,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}


def draw(shapes, seed=0):
    """float32 tensors, of a size that lets every one of them matter."""
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def bert_tensors(options=BERT, *, pooler=False, prefix="", **heads):
    """Tensors of a BERT, and of heads: rows of their weights, and inputs, by name."""
    d, f = options["hidden_size"], options["intermediate_size"]
    shapes = {f"embeddings.{n}_embeddings.weight": (options[size], d) for n, size in _EMBEDDED.items()}
    linears = {"attention.self.query": (d, d), "attention.self.key": (d, d), "attention.self.value": (d, d)}
    linears |= {"attention.output.dense": (d, d), "intermediate.dense": (f, d), "output.dense": (d, f)}
    norms = ["embeddings.LayerNorm"]
    for i in range(options["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        norms += [f"encoder.layer.{i}.{name}.LayerNorm" for name in ("attention.output", "output")]
    shapes |= {f"{norm}.{end}": (d,) for norm in norms for end in ("weight", "bias")}
    if pooler:
        shapes |= {"pooler.dense.weight": (d, d), "pooler.dense.bias": (d,)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    for name, shape in heads.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return draw(shapes)


_EMBEDDED = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}


def gpt2_tensors(options=GPT2, prefix=""):
    d = options["n_embd"]
    shapes = {"wte.weight": (options["vocab_size"], d), "wpe.weight": (options["n_positions"], d)}
    linears = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    norms = ["ln_f"]
    for i in range(options["n_layer"]):
        for name, shape in linears.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
    shapes |= {f"{norm}.{end}": (d,) for norm in norms for end in ("weight", "bias")}
    return draw({prefix + name: shape for name, shape in shapes.items()})


def llama_tensors(options=LLAMA):
    d, f, size = options["hidden_size"], options["intermediate_size"], head_size(options)
    queries, keys = (options[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (options["vocab_size"], d), "model.norm.weight": (d,)}
    linears = {"self_attn.q_proj": (queries, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d)}
    linears |= {"self_attn.o_proj": (d, queries)}
    linears |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    linears |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for i in range(options["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
    if not options["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (options["vocab_size"], d)
    return draw(shapes)


def head_size(options):
    return options["hidden_size"] // options["num_attention_heads"]


def publish(folder, options, tensors):
    """Writes a folder as models are published in."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def normed(x, p, name, eps):
    """Layer normalization."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def attend(q, k, v, heads, visible):
    """Attention of one row, [T, D] each, head after head; visible [T, T]."""
    mixed = []
    for query, key, value in zip(*(np.split(x, heads, -1) for x in (q, k, v)), strict=True):
        weights = np.exp(np.where(visible, query @ key.T / np.sqrt(query.shape[-1]), -np.inf))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value)
    return np.concatenate(mixed, -1)


def wide(tensors, prefix=""):
    return {name.removeprefix(prefix): np.float64(value) for name, value in tensors.items()}


def bert(tensors, options, tokens, types=None, extra=0.0):
    """The last hidden states of one row without padding, [T, D]; `extra` is added to its embeddings."""
    p, eps, heads = wide(tensors, "bert."), options["layer_norm_eps"], options["num_attention_heads"]
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    x = p["embeddings.word_embeddings.weight"][tokens] + p["embeddings.position_embeddings.weight"][: len(tokens)]
    x = x + p["embeddings.token_type_embeddings.weight"][np.zeros_like(tokens) if types is None else types] + extra
    x = normed(x, p, "embeddings.LayerNorm", eps)
    for i in range(options["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        mixed = linear(attend(q, k, v, heads, True), f"{layer}.attention.output.dense")
        x = normed(x + mixed, p, f"{layer}.attention.output.LayerNorm", eps)
        hidden = linear(x, f"{layer}.intermediate.dense")
        hidden = hidden * scipy.special.ndtr(hidden)
        x = normed(x + linear(hidden, f"{layer}.output.dense"), p, f"{layer}.output.LayerNorm", eps)
    return x


def gpt2(tensors, options, tokens):
    """Logits of one row, [T, V]."""
    p, eps, heads = wide(tensors, "transformer."), options["layer_norm_epsilon"], options["n_head"]
    linear = lambda x, name: x @ p[f"{name}.weight"] + p[f"{name}.bias"]
    x = p["wte.weight"][tokens] + p["wpe.weight"][: len(tokens)]
    for i in range(options["n_layer"]):
        q, k, v = np.split(linear(normed(x, p, f"h.{i}.ln_1", eps), f"h.{i}.attn.c_attn"), 3, -1)
        x = x + linear(attend(q, k, v, heads, np.tri(len(tokens)) > 0), f"h.{i}.attn.c_proj")
        hidden = linear(normed(x, p, f"h.{i}.ln_2", eps), f"h.{i}.mlp.c_fc")
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return normed(x, p, "ln_f", eps) @ p["wte.weight"].T


def llama(tensors, options, tokens, frequencies=None):
    """Logits of one row, [T, V]; `frequencies` are those of the pairs, where they are not the usual ones."""
    p, size = wide(tensors), head_size(options)
    heads, groups = options["num_attention_heads"], options["num_key_value_heads"]
    if frequencies is None:
        frequencies = options["rope_theta"] ** (-2 * np.arange(size // 2) / size)
    turns = np.exp(1j * np.arange(len(tokens))[:, None] * frequencies)

    def rotated(x):
        first, second = np.split(x.reshape(len(x), -1, size), 2, -1)
        pairs = (first + 1j * second) * turns[:, None]
        return np.concatenate([pairs.real, pairs.imag], -1)

    def rms(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + options["rms_norm_eps"]) * p[f"{name}.weight"]

    x = p["model.embed_tokens.weight"][tokens]
    for i in range(options["num_hidden_layers"]):
        linear = lambda x, name, i=i: x @ p[f"model.layers.{i}.{name}.weight"].T
        entering = rms(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(entering, f"self_attn.{name}_proj") for name in "qkv")
        # Every key-value head is that of so many query heads in a row.
        q, k = rotated(q), rotated(k).repeat(heads // groups, 1)
        v = v.reshape(len(v), groups, size).repeat(heads // groups, 1)
        flat = (array.reshape(len(array), -1) for array in (q, k, v))
        x = x + linear(attend(*flat, heads, np.tri(len(tokens)) > 0), "self_attn.o_proj")
        entering = rms(x, f"model.layers.{i}.post_attention_layernorm")
        gate = linear(entering, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(entering, "mlp.up_proj"), "mlp.down_proj")
    head = p["model.embed_tokens.weight" if options["tie_word_embeddings"] else "lm_head.weight"]
    return rms(x, "model.norm") @ head.T
