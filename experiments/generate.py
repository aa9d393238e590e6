"""Writes text with a trained model: python -m experiments.generate --model=runs/tiny-bf16-seed0 --prompt='def '

Prompts of any lengths are read together, their keys and values kept in 16 or 8 bits, and the texts stream to standard
output, one as it comes, several line by line with the numbers of their prompts. Tokens/s and memory follow on standard
error. A text depends on the seed and on the number of its prompt, not on the prompts beside it, unless the precision
scales whole tensors by themselves, as fp8-current does: then rows share a scale.

With --compare nothing is written. A text is read through the cache, by the model and cache in that wide format and by
those of the flags, and the two perplexities stand side by side, with how many greedy texts of the prompts are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import app, flags

from experiments import commandline
from experiments.commandline import REAL, TEXT, WHOLE
from q8jax import choices

if TYPE_CHECKING:
    import numpy as np

    from experiments.generating.decoding import Decoder, Speed
    from experiments.generating.sources import Source

VALUES = flags.FlagValues()
GROUPS: commandline.Groups = {
    "Model": [
        (TEXT, "model", "", "The directory of a run, a folder with a Llama or GPT-2, or package:NAME."),
        (TEXT, "tokenizer", "", "bytes, or the path of a tokenizer.json; the model's own."),
        (TEXT, "precision", "", "Of products with weights, as of pretrain; the model's own."),
        (TEXT, "kv_cache", "bf16", "Of keys and values: fp32, bf16, fp8, fp8-e3m4 or int8."),
        (WHOLE, "cache_tokens", None, "Room of a row, for prompt and new tokens; what is needed."),
    ],
    "Text": [
        (flags.DEFINE_multi_string, "prompt", [], "A prompt; may be repeated. Without any, standard input is one."),
        (TEXT, "prompts", "", "A file of prompts, one a line; of a .jsonl file under 'prompt' in each object."),
        (WHOLE, "new_tokens", 128, "To write at most; the tokenizer's separator ends a text."),
        (WHOLE, "batch_size", 8, "Prompts that are decoded at once."),
        (REAL, "temperature", 1.0, "Divisor of the logits; 0 takes the most likely token."),
        (WHOLE, "top_k", 0, "Choose among so many of the most likely tokens; 0 for all."),
        (REAL, "top_p", 1.0, "And of these among the fewest whose probabilities add up to it."),
        (WHOLE, "seed", 0, "Of the draws."),
        (TEXT, "out", "", "A file to write prompts and texts to as well, as JSON lines."),
    ],
    "Comparison": [
        (TEXT, "compare", "", "fp32 or bf16: compare with model and cache in this."),
        (TEXT, "text", "", "A text to compare on; what the run held out. Prompts, if not given, are pieces of it."),
        (WHOLE, "text_tokens", 2**16, "How much of it."),
    ],
    "Run": [(TEXT, "cache_dir", "~/.cache/q8jax", "For compiled programs.")],
}
commandline.define(VALUES, GROUPS)
_WIDE = ("fp32", "bf16")
# Of a text that prompts are taken from.
_PROMPTS, _PROMPT_TOKENS = 8, 32
# Of a window, where the model does not say what it was trained on.
_WINDOW = 256


def main(argv: list[str]) -> int:
    """Writes what the parsed flags say; returns the exit code: 0, or 1 with a sentence on standard error."""
    del argv
    from experiments import runs

    try:
        _check()
        _compare() if VALUES.compare else _generate()
    except (ValueError, runs.RunError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # a reader that has seen enough, as head
    return 0


def _generate() -> None:
    from experiments.generating import prompts
    from experiments.generating.decoding import Decoder, frozen
    from experiments.generating.sampling import Sampling
    from experiments.generating.terminal import Stream, Text

    sampling = Sampling(VALUES.temperature, VALUES.top_k, VALUES.top_p)
    texts = prompts.gather(VALUES.prompt, VALUES.prompts, None if sys.stdin.isatty() else sys.stdin)
    source = _load(VALUES.precision)
    encoded = prompts.encode(texts, source.subwords)
    slots = prompts.slots_for([*map(len, encoded)], VALUES.new_tokens, VALUES.cache_tokens, source.positions)
    out = _opened(VALUES.out)
    source = _calibrated(source, encoded)
    subwords = source.subwords
    decoder = Decoder(
        frozen(source.model), VALUES.kv_cache, sampling, vocab=subwords.vocab_size, end=subwords.separator
    )
    for batch in _batches(len(texts), VALUES.batch_size):
        written = [Text(encoded[number], subwords) for number in batch]
        stream = Stream(sys.stdout, [number + 1 for number in batch], plain=len(texts) == 1)
        given = [encoded[number] for number in batch]
        for parts in decoder.generate(given, batch, slots=slots, new=VALUES.new_tokens, seed=VALUES.seed):
            for row, part in enumerate(parts):
                stream.add(row, written[row].add(part))
        for row, text in enumerate(written):
            stream.add(row, text.add(encoded[0][:0], last=True))
        stream.finish()
        if out is not None:
            _write(out, [{"prompt": texts[n], "text": text.whole} for n, text in zip(batch, written, strict=True)])
    if out is not None:
        out.close()
    print(_report(decoder, VALUES.kv_cache, source.precision), file=sys.stderr, flush=True)


def _check() -> None:
    from experiments.models.kv_cache import FORMATS

    choices.check("--kv_cache", VALUES.kv_cache, FORMATS)
    for name in ("cache_tokens", "new_tokens", "batch_size", "text_tokens"):
        if VALUES[name].value is not None and VALUES[name].value < 1:
            raise ValueError(f"--{name}={VALUES[name].value} must be at least 1.")
    if not 0 <= VALUES.seed < 2**32:
        raise ValueError(f"--seed={VALUES.seed} must be from 0 to {2**32 - 1}.")
    if VALUES.compare:
        choices.check("--compare", VALUES.compare, _WIDE)
    elif VALUES.text:
        raise ValueError("--text= is what --compare= measures: add that, or leave it out.")


def _load(precision: str) -> Source:
    import jax

    from experiments.generating import sources
    from experiments.runs.environment import usable_cores

    cache = Path(VALUES.cache_dir).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / f"xla-{usable_cores()}"))
    return sources.load(VALUES.model, precision or None, VALUES.tokenizer)


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


def _compare() -> None:
    from experiments.generating import drift, prompts
    from experiments.generating.decoding import Decoder, frozen
    from experiments.generating.sampling import Sampling

    texts = prompts.gather(VALUES.prompt, VALUES.prompts, None) if VALUES.prompt or VALUES.prompts else []
    source = _load(VALUES.precision)
    windows = drift.windows(_text(source), source.length or _WINDOW, VALUES.text_tokens)
    encoded = prompts.encode(texts, source.subwords) or [
        window[:_PROMPT_TOKENS] for window in windows[:: max(1, len(windows) // _PROMPTS)][:_PROMPTS]
    ]
    slots = prompts.slots_for([*map(len, encoded)], VALUES.new_tokens, VALUES.cache_tokens, source.positions)
    out = _opened(VALUES.out)
    wide = _load(VALUES.compare)
    source = _calibrated(source, encoded)
    reference, measured = (
        Decoder(
            frozen(one.model),
            kv_cache,
            Sampling(temperature=0),
            vocab=one.subwords.vocab_size,
            end=one.subwords.separator,
        )
        for one, kv_cache in ((wide, VALUES.compare), (source, VALUES.kv_cache))
    )
    found = drift.compare(reference, measured, windows, encoded, slots=slots, new=VALUES.new_tokens)
    if out is not None:
        _write(out, [found.as_dict()])
        out.close()
    names = [f"{p}, cache {c}" for p, c in ((VALUES.compare, VALUES.compare), (source.precision, VALUES.kv_cache))]
    print(found.text(*names), flush=True)


def _text(source: Source) -> Any:
    from experiments.tasks.lines import read_text

    if VALUES.text:
        path = Path(VALUES.text).expanduser()
        if not path.is_file():
            raise ValueError(f"--text={VALUES.text} is no file: check the path.")
        return source.subwords.split([read_text(str(path))])[0].ids
    if source.run is None:
        raise ValueError(f"--model={VALUES.model} does not come with a text to compare on: give --text=FILE.")
    return source.run.dataset().validation


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: commandline.parse(VALUES, GROUPS, argv, __doc__ or ""))
