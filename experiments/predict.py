"""Runs a model over inputs: python -m experiments.predict --model=runs/spam/best --input=mails.txt --output=labels.jsonl

The model is a folder of finetune or quantize, or pretrained weights. Inputs are lines of text; JSON lines, with "text",
"words", or "question" and "context"; or images in a .npy file. What comes out is a JSON line for each: a label with its
probability, tags of words and the entities that they mark, an answer, or an embedding. At the end standard error has
the latency of batches.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags

from experiments import commandline
from experiments.commandline import TEXT, WHOLE

VALUES = flags.FlagValues()
GROUPS: commandline.Groups = {
    "Model": [
        (TEXT, "model", "", "A folder with a model, or package:NAME of an installed one."),
        (TEXT, "precision", "", "In which to run it, as of pretrain; the model's own."),
    ],
    "Data": [
        (TEXT, "input", "-", "A file of lines, of JSON lines (.jsonl) or of images (.npy); - for standard input."),
        (TEXT, "output", "-", "Where to write; - for standard output."),
        (TEXT, "format", "auto", "text, jsonl or npy; auto goes by the name of the file."),
        (WHOLE, "batch_size", 32, "Inputs of a batch."),
    ],
    "Run": [(TEXT, "cache_dir", "~/.cache/q8jax", "For compiled programs.")],
}
commandline.define(VALUES, GROUPS)
FORMATS = ("auto", "text", "jsonl", "npy")


def main(argv: list[str]) -> int:
    """Runs the parsed flags; returns the exit code: 0, or 1 with a sentence on standard error."""
    del argv
    try:
        _run()
    except ValueError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # a reader that has seen enough, as head
    return 0


def _run() -> None:
    from q8jax import choices

    choices.check("--format", VALUES.format, FORMATS)
    if not VALUES.model:
        raise ValueError("--model is not given: name the folder of a model.")
    if VALUES.batch_size < 1:
        raise ValueError(f"--batch_size={VALUES.batch_size} must be at least 1.")
    if VALUES.input != "-" and not Path(VALUES.input).is_file():
        raise ValueError(f"--input={VALUES.input} does not exist: check the path.")

    import jax
    import numpy as np

    from experiments.downstream.predicting import Predictor
    from experiments.models import folder
    from experiments.models.kinds import policy_of
    from experiments.runs.environment import usable_cores
    from experiments.training.precision import naming

    cache = Path(VALUES.cache_dir).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / f"xla-{usable_cores()}"))
    policy = None
    if VALUES.precision:
        kind = folder.read(VALUES.model).kind
        with naming(f"--precision={VALUES.precision}"):
            policy = policy_of(kind, VALUES.precision)
            if any(recipe.keeps_state for _, recipe in policy.rules):
                raise ValueError("it keeps scales, which are not calibrated: give one with current scaling, or none.")
    with naming(f"--model={VALUES.model}"):
        model, stored = folder.load(VALUES.model, policy=policy)
        predictor = Predictor(model, stored, VALUES.batch_size)
    done = 0
    with _output() as output:
        for line in predictor(_inputs()):
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            done += 1
    if not done:
        raise ValueError(f"--input={VALUES.input} has no inputs: give some.")
    p50, p99 = np.percentile(predictor.latencies, (50, 99)) * 1e3
    each = done / sum(predictor.latencies)
    print(
        f"{done:,} inputs in {len(predictor.latencies):,} batches of {VALUES.batch_size}: latency p50 {p50:.1f} ms, p99 "
        f"{p99:.1f} ms; {each:,.1f} inputs/s",
        file=sys.stderr,
    )


def _inputs() -> Iterator[Any]:
    from experiments.downstream.predicting import read_images, read_lines

    suffix = Path(VALUES.input).suffix
    kind = {".npy": "npy", ".jsonl": "jsonl"}.get(suffix, "text") if VALUES.format == "auto" else VALUES.format
    if kind == "npy":
        yield from read_images(VALUES.input)
    elif VALUES.input == "-":
        yield from read_lines(sys.stdin, "standard input", kind == "jsonl")
    else:
        with open(VALUES.input, encoding="utf-8", errors="replace") as file:
            yield from read_lines(file, VALUES.input, kind == "jsonl")


@contextlib.contextmanager
def _output() -> Iterator[TextIO]:
    if VALUES.output == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with open(VALUES.output, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ValueError(f"--output={VALUES.output} cannot be written ({error.strerror}): give another.") from error


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: commandline.parse(VALUES, GROUPS, argv, __doc__ or ""))
