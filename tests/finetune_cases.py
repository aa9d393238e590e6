"""Tiny models and tasks on disk, and runs of fine-tuning in a test's own process."""

import json

import jax
import numpy as np
import pytest
from published_models import BERT, GPT2, bert_tensors, gpt2_tensors, publish
from wordpiece import VOCABULARY, made

from experiments.downstream import options
from experiments.downstream.run import Run
from experiments.downstream.setup import prepare

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 96}


def bert(folder):
    """A tiny BERT as it is published, with its tokenizer."""
    publish(folder, BERT | TINY, bert_tensors(BERT | TINY, pooler=True))
    made(folder / "tokenizer.json")
    return str(folder)


def gpt2(folder):
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": len(VOCABULARY), "n_positions": 16}
    publish(folder, GPT2 | sizes, gpt2_tensors(GPT2 | sizes))
    made(folder / "tokenizer.json")
    return str(folder)


def texts(folder, count=48):
    """Of four words, a class by whether there are more of 'hello' than of 'a'."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("valid", 16), ("test", 16)):
        rows = ["text,label"]
        for i in range(size):
            many, few = ("hello", "a") if i % 2 else ("a", "hello")
            words = rng.permutation([many, many, few, ["us", "b"][rng.integers(2)]])
            rows.append(f"{' '.join(words)},{'no' if i % 2 else 'yes'}")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return f"csv:{folder},text=text,label=label"


def tags(folder, count=32):
    """A place is what is written with a capital, which the pieces do not tell."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("valid", 8), ("test", 8)):
        sentences = []
        for _ in range(size):
            words = rng.permutation(["Hello", "hello", "A", "us"])
            sentences.append("\n".join(f"{w} {'B-LOC' if w[0].isupper() else 'O'}" for w in words))
        (folder / f"{split}.txt").write_text("\n\n".join(sentences) + "\n")
    return f"conll:{folder}"


def questions(folder):
    folder.mkdir(exist_ok=True)
    for split, size in (("train", 8), ("valid", 4), ("test", 4)):
        paragraphs = []
        for i in range(size):
            context = "us hello b" if i % 2 else "b a us hello"
            answer = {"text": "hello", "answer_start": context.index("hello")}
            qas = [{"id": f"{split}{i}", "question": "a ?", "answers": [answer]}]
            paragraphs.append({"context": context + " " * i, "qas": qas})
        data = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(data))
    return f"squad:{folder}"


def prompts(folder):
    folder.mkdir(exist_ok=True)
    for split, size in (("train", 16), ("valid", 4), ("test", 4)):
        rows = [{"prompt": f"{'a b ' * (1 + i % 2)}", "target": "hello us"} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"prompts:{folder}"


@pytest.fixture(autouse=True)
def former_cache():
    """Programs keep compiled ones in a folder that they are told; a test's process does not go on with it."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def parsed(*flags):
    options.parse(["finetune", *flags])
    return options.from_flags()


def run_of(*flags):
    chosen = parsed(*flags)
    return Run(chosen, prepare(chosen))
