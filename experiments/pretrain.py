"""Pretrains a language model: python -m experiments.pretrain --precision=fp8

With nothing else said, a transformer of under a million parameters learns the source of Python's own standard library,
byte by byte, for a few minutes on a laptop, its projections running as FP8 matrix products. --precision=fp32, bf16 or
int8 changes the arithmetic and nothing else: same initialisation, same batches. The run stands in --workdir, and the
same command goes on where it was stopped.
"""

import os
import sys

from absl import app, flags

from experiments import options

options.define()
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    try:
        return _main(argv)
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"pretrain: {error}", file=sys.stderr)
        return 1


def _is_users(error: Exception) -> bool:
    """Whether the user, not the program, is to mend it: such an error is one sentence and needs no traceback."""
    from experiments import runs
    from experiments.training.loop import NotFinite

    return isinstance(error, ValueError | runs.RunError | NotFinite)


def _main(argv: list[str]) -> int:
    from experiments import runs

    if len(argv) > 1:
        raise ValueError(f"Unexpected argument {argv[1]!r}: write flags as --name=value.")
    if FLAGS.config:
        options.apply_config(runs.load_config(FLAGS.config))
    if FLAGS.precision == "list":
        print(precision_table())
        return 0
    chosen = options.from_flags()
    if chosen.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"

    import jax

    from experiments import data
    from experiments.training.loop import Run
    from experiments.training.plan import describe

    jax.config.update("jax_compilation_cache_dir", str(chosen.cache / "xla"))
    dataset = data.load(chosen.data, chosen.tokenizer, chosen.cache)
    run = Run(chosen, dataset)
    if FLAGS.print_plan:
        rows = chosen.batch_size // chosen.accumulate
        print("\n\n".join(describe(run.trainer(phase), rows, chosen.seq_len) for phase in chosen.phases))
        return 0
    print(f"data: {dataset.description}")
    print(f"model: {chosen.model_with(dataset.vocab_size).params:,} parameters; precision: {chosen.label}")
    summary = run.execute()
    if summary is not None:
        print(f"held-out loss {summary['eval_loss']:.4f} nats per token; {chosen.workdir}/summary.json has the rest")
    return 0


def precision_table() -> str:
    """Every preset with its recipe and source."""
    from q8jax.presets import PRECISIONS

    return "\n\n".join(
        f"{name}\n    {row.summary}\n    {row.source}\n    {row.recipe}" for name, row in PRECISIONS.items()
    )


if __name__ == "__main__":
    app.run(main)
