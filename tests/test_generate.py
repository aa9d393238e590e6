"""Texts that a model writes, from flags to the terminal."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import GPT2, LLAMA, gpt2, gpt2_tensors, llama, llama_tensors, publish

import q8jax.nnx
from experiments import commandline, generate
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoding import Subwords
from experiments.generating import drift, prompts, sources
from experiments.generating.decoding import Decoder, frozen
from experiments.generating.sampling import Sampling
from experiments.generating.terminal import Text

SHORT = {"vocab_size": 256, "num_hidden_layers": 1}
NEW, DRAWN = 7, Sampling()
PROMPTS = [np.array([5, 17, 3], np.int32), np.array([9, 200, 31, 7, 7, 40], np.int32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = LLAMA | SHORT
    return publish(tmp_path_factory.mktemp("generate") / "llama", options, llama_tensors(options))


@pytest.fixture(scope="module")
def decode(folder):
    """Texts of a decoder of the folder, made once for each way of sampling."""
    source = sources.load(str(folder), None, "bytes")
    made = {}

    def texts(given, requests, *, sampling=DRAWN, kv_cache="fp32", end=256, steps=4, seed=0):
        key = sampling, kv_cache, end, steps
        if key not in made:
            options = {"vocab": 256, "end": end, "steps_at_once": steps}
            made[key] = Decoder(frozen(source.model), kv_cache, sampling, **options)
        parts = made[key].generate(given, requests, slots=12, new=NEW, seed=seed)
        return [np.concatenate(row).tolist() for row in zip(*parts, strict=True)]

    return texts


def run(*arguments):
    """The exit code of a command, its compiled programs left where others are."""
    before = jax.config.jax_compilation_cache_dir
    commandline.parse(generate.VALUES, generate.GROUPS, ["generate", *map(str, arguments)])
    try:
        return generate.main([])
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def greedy(oracle, prompt, end=256):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NEW and end not in tokens[len(prompt) :]:
        tokens.append(int(np.argmax(oracle(np.array(tokens))[-1])))
    return tokens[len(prompt) :]


def test_prompts_of_different_lengths_go_on_as_the_full_forward_pass_says(decode):
    options = LLAMA | SHORT
    tensors = llama_tensors(options)
    expected = [greedy(lambda tokens: llama(tensors, options, tokens), prompt) for prompt in PROMPTS]
    assert decode(PROMPTS, (0, 1), sampling=Sampling(temperature=0)) == expected
    # A row that has ended stays so, whether alone or not.
    end = expected[0][2]
    expected = [greedy(lambda tokens: llama(tensors, options, tokens), prompt, end) for prompt in PROMPTS]
    assert len(expected[0]) == 3
    assert decode(PROMPTS, (0, 1), sampling=Sampling(temperature=0), end=end) == expected


def test_gpt2_goes_on_as_the_full_forward_pass_says(tmp_path):
    options = GPT2 | {"n_layer": 1}
    tensors = gpt2_tensors(options)
    publish(tmp_path, options, tensors)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    source = sources.load(str(tmp_path), None, "")
    assert (source.precision, source.positions, source.subwords.separator) == ("fp32", 12, 3)
    decoder = Decoder(frozen(source.model), "fp32", Sampling(temperature=0), vocab=50, end=50, steps_at_once=4)
    given = [np.array([5, 17, 3], np.int32), np.array([9, 40], np.int32)]
    parts = decoder.generate(given, (0, 1), slots=9, new=NEW, seed=0)
    expected = [greedy(lambda tokens: gpt2(tensors, options, tokens), prompt) for prompt in given]
    assert [np.concatenate(row).tolist() for row in zip(*parts, strict=True)] == expected


def test_a_text_depends_on_the_seed_and_its_number_alone(decode):
    first = decode(PROMPTS, (0, 1))
    assert decode(PROMPTS, (0, 1)) == first
    assert decode([PROMPTS[0], PROMPTS[1][::-1]], (0, 5))[0] == first[0]
    assert decode(PROMPTS[::-1], (1, 0)) == first[::-1]
    assert decode(PROMPTS, (0, 1), seed=1)[0] != first[0] != decode(PROMPTS, (2, 1))[0]


def test_the_flags_write_texts_and_say_what_it_took(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("ab", "long prompt", "é")))
    common = [f"--model={folder}", "--tokenizer=bytes", f"--new_tokens={NEW}", "--kv_cache=fp8", "--batch_size=2"]
    common += [f"--cache_dir={folder}/cache"]
    assert run(*common, f"--prompts={file}", f"--out={tmp_path}/new/texts.jsonl") == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "new/texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["ab", "long prompt", "é"]
    lines = [f"{number}| {line}" for number, row in enumerate(rows, 1) for line in row["text"].split("\n") if line]
    assert sorted(shown.out.split("\n")[:-1]) == sorted(lines)
    read, made, memory = shown.err.splitlines()
    assert read.startswith("prefill   15 tokens, ") and made.startswith(f"decode    {3 * (NEW - 1)} tokens, ")
    # Keys and values of two rows: 8 codes and a scale for each of two heads and each slot.
    slots = len("long prompt") + NEW - 1
    assert f"cache {2 * 2 * 2 * slots * (8 + 4) / 1e6:.2f} MB (fp8), most at once" in memory


def test_one_text_comes_as_it_is(folder, capsys, monkeypatch):
    arguments = f"--model={folder}", "--tokenizer=bytes", "--new_tokens=5", f"--cache_dir={folder}/cache"
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert run(*arguments) == 0
    first = capsys.readouterr().out
    assert run(*arguments, "--prompt=ab") == 0
    assert capsys.readouterr().out == first and 2 <= len(first) <= 6


def test_characters_come_once_all_their_bytes_are_there():
    subwords = Subwords(ByteTokenizer())
    text = Text(np.frombuffer("ü".encode()[:1], np.uint8), subwords)
    added = [text.add(np.frombuffer(part, np.uint8)) for part in (b"\xbcx", b"\xe2\x82", b"\xac!\xe2")]
    assert [*added, text.add(np.zeros(0, np.uint8), last=True)] == ["x", "", "€!", "�"] or added[1:] == ["", "€!"]
    assert text.whole.endswith("€!�")


def test_drift_is_seen_and_is_none_between_the_same(folder, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what is read through the cache, " * 40)
    common = [f"--model={folder}", "--tokenizer=bytes", f"--text={text}", "--text_tokens=512", "--new_tokens=4"]
    common += [f"--cache_dir={folder}/cache"]
    out = tmp_path / "drift.jsonl"
    assert run(*common, "--compare=fp32", "--kv_cache=fp8", f"--out={out}") == 0
    found = json.loads(out.read_text())
    assert found["tokens"] == 512 and found["length"] == 4 and len(found["parted"]) == 2
    assert 1e-6 < abs(found["change"]["value"]) < 0.02
    assert found["change"]["low"] < found["change"]["value"] < found["change"]["high"]
    shown = capsys.readouterr().out
    assert "perplexity of 512 tokens" in shown and "fp32, cache fp8" in shown
    assert "greedy texts of 4 tokens are the same" in shown


def test_losses_through_a_cache_are_those_of_the_model(folder):
    source = sources.load(str(folder), None, "bytes")
    decoder = Decoder(frozen(source.model), "fp32", Sampling(temperature=0), vocab=256, end=0)
    texts = np.random.default_rng(0).integers(0, 256, (2, 11)).astype(np.int32)
    options = LLAMA | SHORT
    tensors = llama_tensors(options)
    expected = []
    for row in texts:
        logits = llama(tensors, options, row[:-1])
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected.append(-np.log(shares[np.arange(10), row[1:]]).sum())
    np.testing.assert_allclose(decoder.losses(texts), expected, rtol=1e-5)


def test_texts_that_part_do_so_at_the_first_token_that_differs():
    one = np.array([1, 2, 3])
    assert drift._parted(one, one) is None
    assert drift._parted(one, np.array([1, 9, 3])) == 2
    assert drift._parted(one, one[:2]) == 3


def test_windows_predict_each_token_once():
    stream = np.arange(101)
    found = drift.windows(stream, 10, 1000)
    assert found.shape == (10, 11) and (found[1:, 0] == found[:-1, -1]).all()
    assert drift.windows(stream, 10, 30).shape == (3, 11)
    assert drift.windows(np.arange(1001), 10, 10**6).shape == (96, 11)
    with pytest.raises(ValueError, match="The text has 10 tokens, where a window has 11"):
        drift.windows(stream[:10], 10, 100)


def test_a_frozen_model_computes_the_same_and_holds_less(folder):
    source = sources.load(str(folder), "fp8-row", "bytes")
    tokens = jnp.asarray(PROMPTS[1])[None]
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(tokens), static_argnums=0)
    twin = frozen(source.model)
    np.testing.assert_array_equal(run(*nnx.split(twin)), run(*nnx.split(source.model)))
    size = lambda model: sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert size(twin) < 0.52 * size(source.model)
    assert source.model.embedding.embedding[...].dtype == jnp.float32


def test_scales_that_a_precision_keeps_come_from_the_prompts(folder):
    source = sources.load(str(folder), "fp8", "bytes")
    assert not source.is_calibrated
    scales = lambda: {path: np.asarray(s.scale) for path, s in q8jax.nnx.scaling_states(source.model).items()}
    before = scales()
    calibrated = source.calibrated(PROMPTS)
    assert calibrated.is_calibrated and calibrated.calibrated(PROMPTS) is calibrated
    assert all((before[path] != after).any() for path, after in scales().items()) and len(before) >= 4
    assert sources.load(str(folder), "fp8-row", "bytes").is_calibrated


def test_prompts_come_from_flags_lines_or_standard_input(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo \n")
    assert prompts.gather(["a", "b"], "", None) == ["a", "b"]
    assert prompts.gather([], str(file), None) == ["one", "two "]
    assert prompts.gather([], "", io.StringIO("x\ny\n")) == ["x\ny"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model="], "--model= is needed"),
        (["--model={folder}/nowhere"], "nowhere is no directory: give that of a run, or a folder with a model."),
        (["--model={folder}/.."], "is no folder with a config.json"),
        (["--tokenizer="], "it holds no tokenizer.json: give --tokenizer="),
        (["--prompt="], "Prompt 1 is empty: give it some text."),
        (["--prompt=ok", "--prompt="], "Prompt 2 is empty: give it some text."),
        (["--prompt=a", "--prompts={folder}/x"], "--prompt and --prompts both give prompts"),
        (["--prompts={folder}/x"], "x is no file: check the path."),
        ([], "There is no prompt: give --prompt=, --prompts=FILE, or text on standard input."),
        (["--prompt=a", "--kv_cache=fp9"], "Unknown --kv_cache 'fp9' (did you mean 'fp8'?)"),
        (["--prompt=a", "--precision=fp9"], "--precision=fp9: Unknown precision 'fp9'"),
        (["--prompt=a", "--top_p=1.5"], "--top_p=1.5 must be above 0 and at most 1."),
        (["--prompt=a", "--temperature=-1"], "--temperature=-1.0 must be finite and at least 0."),
        (
            ["--prompt=a", "--prompt=abcdefgh", "--cache_tokens=8"],
            "Prompt 2 has 8 tokens, which with --new_tokens=2 is",
        ),
        (["--prompt=a", "--batch_size=0"], "--batch_size=0 must be at least 1."),
        (["--prompt=a", "--seed=-1"], "--seed=-1 must be from 0 to 4294967295."),
        (["--prompt=a", "--text=x"], "--text= is what --compare= measures"),
        (["--prompt=a", "--out={folder}/config.json/x"], "cannot be written"),
        (["--compare=fp8"], "Unknown --compare 'fp8': choose one of fp32, bf16."),
        (["--compare=bf16"], "does not come with a text to compare on: give --text=FILE."),
        (["--compare=bf16", "--text={folder}/x"], "x is no file: check the path."),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_is_compiled(folder, capsys, arguments, sentence, monkeypatch):
    monkeypatch.setattr(Decoder, "_compiled", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr("sys.stdin", _Terminal())
    defaults = [f"--model={folder}", "--tokenizer=bytes", "--new_tokens=2", f"--cache_dir={folder}/cache"]
    assert run(*defaults, *(argument.format(folder=folder) for argument in arguments)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("generate: ") and sentence in shown and shown.count("\n") == 1


def test_a_line_that_holds_no_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="prompts.jsonl:2: there is no 'prompt' among text"):
        prompts.gather([], str(file), None)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts.gather([], str(file), None)


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="--model="):
        sources.load(str(tmp_path), None, "bytes")


def test_what_a_prompt_needs_is_checked_against_the_positions():
    assert prompts.slots_for([3, 5], 4, None, 8) == 8
    assert prompts.slots_for([3, 5], 4, 20, None) == 20
    with pytest.raises(
        ValueError, match="Prompt 2 has 5 tokens, which with --new_tokens=5 is more than the model's 8:"
    ):
        prompts.slots_for([3, 5], 5, None, 8)


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 3,
                "content": "<|endoftext|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "<|endoftext|>": 3}, "unk_token": "a"},
    }
)
