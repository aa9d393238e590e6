"""Compares precisions, seed by seed, with error bars.

    python -m experiments.compare --seeds=8                        # fp32, fp8 and int8 against bf16
    python -m experiments.compare --precisions=fp8-row,mxfp8 --seeds=8 --steps=1000 --jobs=2
    python -m experiments.compare --precisions=fp8 --grid=history=1,16,64 --grid=margin=0,1 --seeds=8:16
    python -m experiments.compare --precisions=fp8,int8 --grid=lr=1e-3,3e-3,1e-2 --halving=2 --seeds=2

Each precision is run once with every seed: same initialisation, same batches, same schedule. Two controls that must
fail and the baseline with its initialisation perturbed are run along, to know what the comparison can see. All flags
of pretrain but --precision, --seed and --workdir hold for every run.

The study stands in --out. The same command goes on where it was stopped: runs that are finished or have diverged are
left alone, interrupted ones resumed, failed ones tried again; a run that another process has is waited for. More seeds
and precisions may be asked for later; verdicts on seeds that were added after a look say so. A recipe that was changed
after its results were seen needs fresh seeds.

    --precisions=A,B    what to compare; a policy or a schedule is given in a flag of its own, --precisions=POLICY; this
                        flag, --grid and --zip may be repeated (default: fp32,bf16,fp8,int8)
    --baseline=A        what they are compared with (default: bf16)
    --controls=A,B      precisions that must fail; empty for none (default: fp8-unscaled,int8-tensor)
    --[no]noise         run the baseline with its initialisation perturbed by 1e-5 too (default: yes)
    --seeds=N           how many, from 0 on; or a range, 8:16, which ends before 16; or a list, 0,3,5 (default: 8)
    --metric=NAME       entry of summary.json to compare, eval_loss or eval_loss_average (default: eval_loss)
    --grid=NAME=V,V     sweep a flag of pretrain, or a field of the recipes of what is quantized: fwd, dlhs, drhs,
                        compute, history, amax, margin, scales, accumulation. Several are combined. Values that have
                        commas are separated by |. What is no matter of precision is swept for the baseline as well
    --zip=NAME=V,V      the same, but all these go through their values together
    --halving=N         at 1/N² and 1/N of the steps, let the best one in N of the candidates go on (default: all do)
    --jobs=N            runs at once, each on a share of the processors or a GPU; no timing counts then (default: 1)
    --out=DIR           the study's directory (default: runs/study-MODEL)
    --archive=DIR       copy there what is to be kept of the study, whenever a run has ended: no checkpoints
    --print_commands    print the command of every run instead, for a cluster; then the study only evaluates

Exit code: 0, or 1 if a run failed or something has to be changed, 130 or 143 if a signal stopped it.
"""

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import options
from experiments.bucket import is_url
from experiments.comparing import halving, ondisk, plan, record, results, sweeps
from experiments.comparing.archive import archive, size
from experiments.comparing.arms import CANDIDATE, DECIDED, REFUSED, Protocol
from experiments.comparing.display import Display
from experiments.comparing.queue import Queue
from experiments.comparing.slots import slots
from experiments.comparing.tasks import FAILED, Task
from experiments.runs import RunError, StopSignal
from experiments.runs.environment import revision_text

FLAGS = flags.FLAGS
PROGRAM = (sys.executable, "-m", "experiments.pretrain")
METRICS = ("eval_loss", "eval_loss_average")
_NAMES = (
    *("precisions", "baseline", "controls", "noise", "seeds", "metric", "grid", "zip", "halving"),
    *("jobs", "out", "archive", "print_commands"),
)


def define_flags() -> None:
    """Defines this program's flags beside those of pretrain."""
    flags.DEFINE_multi_string("precisions", ["fp32,bf16,fp8,int8"], "What to compare.")
    flags.DEFINE_string("baseline", "bf16", "What it is compared with.")
    flags.DEFINE_multi_string("controls", ["fp8-unscaled,int8-tensor"], "What must fail.")
    flags.DEFINE_bool("noise", True, "Run the baseline perturbed too.")
    flags.DEFINE_string("seeds", "8", "Which seeds.")
    flags.DEFINE_enum("metric", METRICS[0], METRICS, "What is compared.")
    flags.DEFINE_multi_string("grid", [], "Sweeps that are combined.")
    flags.DEFINE_multi_string("zip", [], "Sweeps that go together.")
    flags.DEFINE_integer("halving", 0, "One candidate in so many goes on.")
    flags.DEFINE_integer("jobs", 1, "Runs at once.")
    flags.DEFINE_string("out", "", "The study's directory.")
    flags.DEFINE_string("archive", "", "Where to copy what is kept.")
    flags.DEFINE_bool("print_commands", False, "Print the commands of the runs.")


def parse(argv: list[str]) -> list[str]:
    """Parses a command line anew, as `options.parse` does."""
    for name in _NAMES:
        FLAGS[name].unparse()
    return options.parse(argv, __doc__ or "")


def main(argv: list[str]) -> int:
    """Carries out the study that the parsed flags describe; returns the exit code."""
    del argv
    try:
        return _Program().run()
    except (ValueError, RunError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Program:
    """A study that is checked but not started.

    Raises:
      ValueError, RunError: one sentence that names the flag and the fix.
    """

    def __init__(self) -> None:
        if is_url(FLAGS.out):
            raise ValueError(f"--out={FLAGS.out} is in a bucket, where no queue can stand: give a directory.")
        self._out = Path(FLAGS.out or f"runs/study-{FLAGS.model}").expanduser()
        self._archive = Path(FLAGS.archive).expanduser() if FLAGS.archive else None
        self._why_not = ""
        self._foreign: list[str] = []
        self._slots = slots(FLAGS.jobs)
        self._study = _study()
        self._rungs = halving.rungs(FLAGS.halving, self._study.arms)
        stored = plan.Study.load(self._out)
        self._study.joined(stored, self._out)  # refuses another study
        self._runs = self._study.runs(self._out)
        _refuse_changed(self._out, self._study, stored, self._runs)

    def run(self) -> int:
        """Does it, or prints how; returns the exit code."""
        if FLAGS.print_commands:
            try:
                print("\n".join(self._commands()), flush=True)
            except BrokenPipeError:  # the reader stopped reading, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 0
        with ondisk.claimed(self._out), StopSignal() as stop:
            # Once more, for another study may have had the directory until now.
            self._study.joined(plan.Study.load(self._out), self._out).save(self._out)
            failed = self._work(stop)
            comparison = self._evaluate()
        print(f"Nothing is compared: {self._why_not}" if comparison is None else results.table(comparison))
        if self._archive is not None:
            print(f"{size(self._archive) / 1e6:.2g} MB are in {self._archive}")
            if self._foreign:
                print(f"It names paths of this machine, which flags had: {', '.join(self._foreign)}")
        if stop.requested:
            print(f"compare: {stop.requested}: all is saved; the same command goes on", file=sys.stderr)
            return 128 + signal.Signals[stop.requested]
        if failed:
            listed = "; ".join(f"{task.run.name} ({task.reason.rstrip('.')})" for task in failed)
            print(
                f"compare: {len(failed)} of the runs failed: {listed}. {self._out}/logs has what they said; the same "
                "command tries them again.",
                file=sys.stderr,
            )
        return 1 if failed or comparison is None else 0

    def _stages(self) -> Iterator[tuple[halving.Rung | None, list[plan.PlannedRun]]]:
        """What to train to which rung, None being the end; each depends on what the one before has left on disk."""
        arms, runs = list(self._study.arms), self._runs
        for rung in self._rungs:
            yield rung, runs
            arms = rung.kept(arms, rung.losses(runs))
            runs = [run for run in runs if run.arm in {arm.name for arm in arms}]
        yield None, runs

    def _commands(self) -> list[str]:
        """The commands of the runs; under --halving of those that come next."""
        rung, runs = next(
            (rung, runs) for rung, runs in self._stages() if rung is None or not all(rung.has(run) for run in runs)
        )
        stop = lambda run: [f"--stop_after={rung.step(run)}"] if rung else []
        return [shlex.join([_relative(PROGRAM[0]), *PROGRAM[1:], *run.arguments, *stop(run)]) for run in runs]

    def _work(self, stop: StopSignal) -> list[Task]:
        """Runs what is left; returns what failed."""
        revision = revision_text(Path(options.__file__).resolve())
        failed: dict[str, Task] = {}
        with Display(str(self._out), FLAGS.jobs, self._study.metric) as display:
            queue = Queue(self._out, self._slots, PROGRAM, revision, stop, display, self._evaluate)
            rung = None
            for next_rung, runs in self._stages():
                if rung is not None:
                    names = dict.fromkeys(run.arm for run in runs)
                    display.note(f"After {rung}, these go on: {', '.join(names)}")
                rung = next_rung
                left = [run for run in runs if run.name not in failed]
                display.title = f"{self._out}, {rung}" if rung else str(self._out)
                tasks = queue.work({run.name: rung.step(run) if rung else run.steps for run in left}, left)
                failed |= {task.run.name: task for task in tasks if task.state == FAILED}
                if stop.requested:
                    break
        return list(failed.values())

    def _evaluate(self) -> dict[str, Any] | None:
        """Brings results and archive up to date; returns the results, None as long as there are none."""
        try:
            comparison = results.write(self._out)
        except ValueError as error:
            comparison, self._why_not = None, str(error)
        if self._archive is not None:
            self._foreign = archive(self._out, self._archive)
        return comparison


def _study() -> plan.Study:
    """The study that the flags describe, whatever else stands in its directory."""
    given = {name: FLAGS[name].value for name in sorted(options.given_flags())}
    for name in given:
        if name in DECIDED:
            raise ValueError(f"--{name} is what a study decides: give --{DECIDED[name]} instead.")
        if name in REFUSED:
            raise ValueError(f"--{name} has no place in a study: leave it out.")
    if FLAGS.metric == "eval_loss_average" and "average" not in given:
        raise ValueError("--metric=eval_loss_average needs averaged parameters: give --average as well.")
    protocol = Protocol(
        sweeps.precisions(FLAGS.precisions), FLAGS.baseline, sweeps.precisions(FLAGS.controls), FLAGS.noise
    )
    arms = protocol.arms(sweeps.points(FLAGS.grid, FLAGS.zip))
    if FLAGS.halving:
        arms = [dataclasses.replace(arm, swept=arm.role == CANDIDATE) for arm in arms]
    return plan.of_arms(arms, sweeps.seeds(FLAGS.seeds), given, FLAGS.metric)


def _refuse_changed(out: Path, study: plan.Study, stored: plan.Study | None, runs: Sequence[plan.PlannedRun]) -> None:
    """Raises ValueError if what a run was made of is not what it would be made of now, or was not planned in time."""
    policies = {run.arm: record.recipe(run.config) for run in runs}
    before = [arm for arm in stored.arms if arm.role == CANDIDATE] if stored else []
    for arm in study.arms:
        is_new = arm.role == CANDIDATE and arm.name not in {other.name for other in before}
        variants = [other.name for other in before if is_new and other.preset and other.preset == arm.preset]
        if sentence := results.refused(out, arm.name, policies[arm.name], study.seeds, variants):
            raise ValueError(sentence)
    for run in runs:
        for name, (then, now) in run.differences().items():
            if name == "recipes":
                raise ValueError(
                    f"{run.path} was run with another recipe than {run.arm} has now: give it fresh seeds, as in "
                    f"--seeds={max(study.seeds) + 1}:{max(study.seeds) + 1 + len(study.seeds)}."
                )
            raise ValueError(f"{run.path} was run with --{name}={then} (here {now}): give another --out.")


def _relative(program: str) -> str:
    """A path as it is written in the current directory."""
    try:
        return str(Path(program).relative_to(Path.cwd()))
    except ValueError:
        return program


if __name__ == "__main__":
    options.define()
    define_flags()
    app.run(main, flags_parser=parse)
