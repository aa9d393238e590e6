"""Writes text with a trained model: python -m experiments.generate --model=runs/tiny-bf16-seed0 --prompt='def '

Prompts of any lengths are read together, their keys and values kept in 16 or 8 bits, and the texts stream to standard
output, one as it comes, several line by line with the numbers of their prompts. Tokens/s and memory follow on standard
error. A text depends on the seed and on the number of its prompt, not on the prompts beside it, unless the precision
scales whole tensors by themselves, as fp8-current does: then rows share a scale.

    --model=PLACE         the directory of a run of pretrain, a folder with a published, fine-tuned or quantized Llama
                          or GPT-2, or package:NAME
    --prompt=TEXT         a prompt; may be repeated
    --prompts=FILE        prompts, one a line; of FILE.jsonl, under "prompt" in each object. Without either, standard
                          input is the prompt
    --tokenizer=NAME      bytes, or the path of a tokenizer.json (default: the model's own)
    --precision=NAME      of the products with weights (default: that in which the model is stored). One that keeps
                          scales which the model does not have is calibrated on the prompts
    --kv_cache=FORMAT     of keys and values: fp32, bf16, fp8, fp8-e3m4 or int8 (default: bf16)
    --cache_tokens=N      room of a row, prompt and new tokens (default: what is needed)
    --new_tokens=N        how many to write at most (default: 128); the tokenizer's separator ends a text
    --batch_size=N        prompts that are decoded at once (default: 8)
    --temperature=T       0 takes the most likely token (default: 1)
    --top_k=N             choose among the N most likely (default: 0, all)
    --top_p=P             and of these among the fewest whose probabilities add up to P (default: 1, all)
    --seed=N              of the draws (default: 0)
    --out=FILE            write prompts and texts as JSON lines too
    --compare=WIDE        instead of writing, compare with the model and cache in fp32 or bf16: the perplexity of a text
                          that is read through the cache, and where the greedy texts of the prompts part
    --text=FILE           that text (default: what the run held out; prompts, where none are given, are pieces of it)
    --text_tokens=N       how much of it (default: 65536)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import app, flags, logging

from q8jax import choices

if TYPE_CHECKING:
    import numpy as np

    from experiments.generating.decoding import Decoder, Speed
    from experiments.generating.sources import Source

_WIDE = ("fp32", "bf16")
# Of a text that prompts are taken from.
_PROMPTS, _PROMPT_TOKENS = 8, 32
# Of a window, where the model does not say what it was trained on.
_WINDOW = 256


def define_flags(chosen: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("model", "", "A run, a folder with a model, or package:NAME.", chosen)
    flags.DEFINE_multi_string("prompt", [], "A prompt.", chosen)
    text("prompts", "", "A file with prompts.", chosen)
    text("tokenizer", "", "bytes, or the path of a tokenizer.json.", chosen)
    text("precision", None, "Of the products with weights.", chosen)
    text("kv_cache", "bf16", "Format of keys and values.", chosen)
    whole("cache_tokens", None, "Room of a row.", lower_bound=1, flag_values=chosen)
    whole("new_tokens", 128, "How many to write.", lower_bound=1, flag_values=chosen)
    whole("batch_size", 8, "Prompts that are decoded at once.", lower_bound=1, flag_values=chosen)
    real("temperature", 1.0, "Divisor of logits.", flag_values=chosen)
    whole("top_k", 0, "Choose among so many.", flag_values=chosen)
    real("top_p", 1.0, "Choose among those whose probabilities add up to it.", flag_values=chosen)
    whole("seed", 0, "Of the draws.", lower_bound=0, upper_bound=2**32 - 1, flag_values=chosen)
    text("out", "", "Write JSON lines too.", chosen)
    text("compare", "", "Compare with fp32 or bf16.", chosen)
    text("text", "", "A text to compare on.", chosen)
    whole("text_tokens", 2**16, "How much of it.", lower_bound=1, flag_values=chosen)


def main(argv: list[str], chosen: flags.FlagValues = flags.FLAGS, standard_input: TextIO | None = None) -> int:
    """Writes what the flags say; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}, where a flag is written --name=value.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    if standard_input is None and not sys.stdin.isatty():
        standard_input = sys.stdin
    from experiments import runs

    try:
        if chosen.compare:
            _compare(chosen)
        else:
            _generate(chosen, standard_input)
    except (ValueError, runs.RunError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(chosen: flags.FlagValues, standard_input: TextIO | None) -> None:
    from experiments.generating import prompts, sources
    from experiments.generating.decoding import Decoder, frozen
    from experiments.generating.sampling import Sampling
    from experiments.generating.terminal import Stream, Text

    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p)
    _check(chosen)
    texts = prompts.gather(chosen.prompt, chosen.prompts, standard_input)
    source = sources.load(chosen.model, chosen.precision, chosen.tokenizer)
    encoded = prompts.encode(texts, source.subwords)
    slots = prompts.slots_for([*map(len, encoded)], chosen.new_tokens, chosen.cache_tokens, source.positions)
    out = _opened(chosen.out)
    source = _calibrated(source, encoded)
    subwords = source.subwords
    decoder = Decoder(
        frozen(source.model), chosen.kv_cache, sampling, vocab=subwords.vocab_size, end=subwords.separator
    )
    for batch in _batches(len(texts), chosen.batch_size):
        written = [Text(encoded[number], subwords) for number in batch]
        stream = Stream(sys.stdout, [number + 1 for number in batch], plain=len(texts) == 1)
        given = [encoded[number] for number in batch]
        for parts in decoder.generate(given, batch, slots=slots, new=chosen.new_tokens, seed=chosen.seed):
            for row, part in enumerate(parts):
                stream.add(row, written[row].add(part))
        for row, text in enumerate(written):
            stream.add(row, text.add(encoded[0][:0], last=True))
        stream.finish()
        if out is not None:
            _write(out, [{"prompt": texts[n], "text": text.whole} for n, text in zip(batch, written, strict=True)])
    if out is not None:
        out.close()
    print(_report(decoder, chosen.kv_cache, source.precision), file=sys.stderr, flush=True)


def _check(chosen: flags.FlagValues) -> None:
    from experiments.models.kv_cache import FORMATS

    choices.check("--kv_cache", chosen.kv_cache, FORMATS)
    if chosen.compare:
        choices.check("--compare", chosen.compare, _WIDE)
    elif chosen.text:
        raise ValueError("--text= is what --compare= measures: add that, or leave it out.")


def _calibrated(source: Source, prompts: list[np.ndarray]) -> Source:
    if not source.is_calibrated:
        note = f"--precision={source.precision} keeps scales, which are calibrated on the prompts"
        print(note, file=sys.stderr, flush=True)
    return source.calibrated(prompts)


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _opened(path: str) -> TextIO | None:
    if not path:
        return None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out={path} cannot be written ({error.strerror}): give another.") from error


def _write(out: TextIO, rows: list[dict[str, Any]]) -> None:
    import json

    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
    out.flush()


def _report(decoder: Decoder, kv_cache: str, precision: str) -> str:
    from experiments.runs import peak_memory_bytes

    speed: Speed = decoder.speed
    rate = lambda tokens, seconds: f"{tokens / seconds:,.0f} tokens/s" if seconds else "none"
    size = lambda count: f"{count / 1e6:,.2f} MB"
    return "\n".join(
        [
            f"prefill   {speed.read:,} tokens, {rate(speed.read, speed.prefill_seconds)}",
            f"decode    {speed.made:,} tokens, {rate(speed.made, speed.decode_seconds)}; compiled in "
            f"{speed.compile_seconds:.1f} s",
            f"memory    weights {size(decoder.weight_bytes)} ({precision}), cache {size(speed.cache_bytes)} "
            f"({kv_cache}), most at once {size(peak_memory_bytes())}",
        ]
    )


def _compare(chosen: flags.FlagValues) -> None:
    from experiments.generating import drift, prompts, sources
    from experiments.generating.decoding import Decoder, frozen
    from experiments.generating.sampling import Sampling

    _check(chosen)
    texts = prompts.gather(chosen.prompt, chosen.prompts, None) if chosen.prompt or chosen.prompts else []
    source = sources.load(chosen.model, chosen.precision, chosen.tokenizer)
    windows = drift.windows(_text(chosen, source), source.length or _WINDOW, chosen.text_tokens)
    encoded = prompts.encode(texts, source.subwords) or [
        window[:_PROMPT_TOKENS] for window in windows[:: max(1, len(windows) // _PROMPTS)][:_PROMPTS]
    ]
    slots = prompts.slots_for([*map(len, encoded)], chosen.new_tokens, chosen.cache_tokens, source.positions)
    out = _opened(chosen.out)
    wide = sources.load(chosen.model, chosen.compare, chosen.tokenizer)
    source = _calibrated(source, encoded)
    reference, measured = (
        Decoder(
            frozen(one.model),
            kv_cache,
            Sampling(temperature=0),
            vocab=one.subwords.vocab_size,
            end=one.subwords.separator,
        )
        for one, kv_cache in ((wide, chosen.compare), (source, chosen.kv_cache))
    )
    found = drift.compare(reference, measured, windows, encoded, slots=slots, new=chosen.new_tokens)
    if out is not None:
        _write(out, [found.as_dict()])
        out.close()
    names = [f"{p}, cache {c}" for p, c in ((chosen.compare, chosen.compare), (source.precision, chosen.kv_cache))]
    print(found.text(*names), flush=True)


def _text(chosen: flags.FlagValues, source: Source) -> Any:
    from experiments.tasks.lines import read_text

    if chosen.text:
        path = Path(chosen.text).expanduser()
        if not path.is_file():
            raise ValueError(f"--text={chosen.text} is no file: check the path.")
        return source.subwords.split([read_text(str(path))])[0].ids
    if source.run is None:
        raise ValueError(f"--model={chosen.model} does not come with a text to compare on: give --text=FILE.")
    return source.run.dataset().validation


if __name__ == "__main__":
    define_flags()
    app.run(main)
