"""One fine-tuning run: from checked options to a model in a folder and its scores."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import data, runs
from experiments.downstream import reporting
from experiments.downstream.evaluation import evaluate
from experiments.downstream.heads import Batch, Report, head_of
from experiments.downstream.options import MAY_CHANGE, Options
from experiments.downstream.setup import Setup
from experiments.downstream.step import Distillation, Trainer
from experiments.encoding import Subwords
from experiments.models import folder
from experiments.models.kinds import compute_of
from experiments.runs.progress import Progress
from experiments.training.errors import DivergedError
from experiments.training.step import State

BEST = "best"


@dataclasses.dataclass
class _Progress:
    """What a run knows of its epochs; it is saved with each checkpoint.

    Attributes:
      best: the best score on the validation split, or None.
      epoch: after which it was.
    """

    best: float | None = None
    epoch: int = 0

    def is_over(self, epochs: int, patience: int | None, total: int) -> bool:
        """Whether nothing is to be trained after so many epochs."""
        return epochs >= total or (patience is not None and epochs - self.epoch >= patience)


class Run:
    """A run that is checked but not started: nothing is on disk and nothing compiled.

    Args:
      options: the checked flags.
      setup: task and model.

    Attributes:
      interrupted: whether a signal stopped it, and it has been saved.

    Raises:
      ValueError: weights or a policy that do not fit the model, or a teacher that is for another task.
    """

    def __init__(self, options: Options, setup: Setup):
        self.options, self._setup = options, setup
        self._train = setup.batches["train"]
        self._steps = options.epochs * self._train.per_epoch
        self.optimizer = options.optimizer(self._steps)
        model, self.new = setup.model(options)
        teacher = _teacher(options, setup) if options.distill else None
        self.trainer = Trainer(model, setup.head, self.optimizer, compute_of(setup.policy), teacher)
        self.interrupted = False

    @property
    def config(self) -> dict[str, Any]:
        """What config.json of the run holds."""
        given = {name: value for name, value in self.options.flags.items() if value is not None}
        resolved = {"warmup": self.optimizer.warmup, "policy": str(self._setup.policy)}
        return {**given, **resolved, "data_sha256": self._setup.task.sha256}

    def description(self) -> list[str]:
        """Lines for a person: task, model, precision, steps."""
        setup, options = self._setup, self.options
        parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.trainer.init)["params"]))
        cut = {name: batches.rows.cut for name, batches in setup.batches.items() if batches.rows.cut}
        lines = [
            f"task: {setup.task.description}",
            f"model: {options.model}, {parameters:,} parameters; precision: {options.precision}; on "
            f"{jax.devices()[0].device_kind}",
            f"steps: {self._steps} of {options.batch_size} rows{self._lengths()}",
        ]
        if cut:
            lines.append(f"longer than --length={options.length}, and cut: {cut}")
        if self.new:
            lines.append(f"new in the model: {', '.join(self.new)}")
        return lines

    def execute(self) -> dict[str, Any] | None:
        """Trains, or goes on training, and tests the best model.

        Returns:
          The summary, or None if the run was stopped before its end.

        Raises:
          runs.RunError: the run directory is in use, another run's, or damaged.
          DivergedError: the loss or the gradient is not finite; the run directory says so too.
        """
        options = self.options
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(runs.RunDir.open(options.workdir, self.config, may_change=MAY_CHANGE))
            finished = directory.summary()
            if finished is not None:
                print(f"{options.workdir} is finished already: give another --workdir to train again", flush=True)
                return finished
            stop = stack.enter_context(runs.StopSignal())
            checkpoints = stack.enter_context(runs.Checkpoints(directory.checkpoints, keep=options.keep_checkpoints))
            restored = checkpoints.latest_good(jax.eval_shape(self.trainer.init))
            start = 0 if restored is None else restored.step
            metrics = stack.enter_context(runs.MetricsWriter(directory.path, None if restored is None else start))
            unit = "img" if self._train.lengths == (0,) else "tok"
            show = stack.enter_context(Progress(self._steps, start, _positions(self._train), unit=unit))
            directory.record_session(runs.environment())
            if restored is None:
                state, known = self._begin(), _Progress()
            else:
                state, known = restored.tree, _Progress(**restored.metadata)
                show.note(f"{options.workdir}: going on after step {start} of {self._steps}")
            loop = _Loop(self, checkpoints, metrics, show, stop, directory)
            try:
                ended = loop.train(state, start, known)
            except DivergedError as error:
                directory.write_divergence(error.step, str(error))
                raise
            checkpoints.wait()
            if not ended:
                self.interrupted = True
                show.note(f"{stop.requested}: saved; the same command goes on")
                return None
            summary = self._test(directory, known)
            directory.write_summary(summary)
            return summary

    def batch(self, step: int) -> Batch:
        """Of the step that takes the run from `step` to `step + 1`."""
        epoch, within = divmod(step, self._train.per_epoch)
        return self._setup.head.of(self._train.train(seed=self.options.seed, epoch=epoch, step=within))

    def validate(self, state: State) -> Report:
        """Scores on the validation split."""
        task, batches = self._setup.task, self._setup.batches
        return evaluate(self._setup.head, self.trainer.model(state), task.valid, batches["valid"])

    def keep(self, state: State, directory: runs.RunDir) -> None:
        """Writes the model to the run's directory, in place of the best one before."""
        setup = self._setup
        folder.save(directory.path / BEST, self.trainer.model(state), setup.purpose, tokenizer=setup.tokenizer)

    def _lengths(self) -> str:
        lengths = ", ".join(str(length) for length in self._train.lengths if length)
        return f", padded to {lengths}" if lengths else ""

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def per_epoch(self) -> int:
        return self._train.per_epoch

    def _begin(self) -> State:
        state = jax.jit(self.trainer.init)()
        if self.trainer.keeps_scales:
            dots = jax.jit(self.trainer.calibrate)(state, self.trainer.teacher, self.batch(0))
            state = {**state, "dots": dots}
        return state

    def _test(self, directory: runs.RunDir, known: _Progress) -> dict[str, Any]:
        """Tests the best model, from the folder that it is in."""
        setup, options = self._setup, self.options
        model, stored = folder.load(str(directory.path / BEST))
        subwords = Subwords.load(stored.tokenizer) if stored.tokenizer else None
        head = head_of(stored.purpose, subwords)
        report = evaluate(head, model, setup.task.test, setup.batches["test"])
        written = reporting.write(directory.path, report, arm=options.precision, run=directory.path.name)
        print(f"{report.text}\n{directory.place}: {', '.join(written)}; the model is in {BEST}", flush=True)
        return {
            "precision": options.precision,
            "policy": str(setup.policy),
            "metric": report.metric,
            "test": report.value,
            "valid": known.best,
            "best_epoch": known.epoch,
            "scores": report.scores,
            "peak_memory_bytes": runs.peak_memory_bytes(),
        }


class _Loop:
    """The loop over the steps; see `Run.execute`."""

    def __init__(self, run: Run, checkpoints: Any, metrics: Any, show: Progress, stop: Any, directory: runs.RunDir):
        self._run, self._checkpoints, self._metrics = run, checkpoints, metrics
        self._show, self._stop, self._directory = show, stop, directory
        self._step: Callable = jax.jit(run.trainer.step, donate_argnums=0)

    def train(self, state: State, start: int, known: _Progress) -> bool:
        """Trains to the last step, or until told to stop: returns whether it is at the end."""
        run, options = self._run, self._run.options
        if known.is_over(start // run.per_epoch, options.patience, options.epochs):
            return True
        unchecked: dict[str, jax.Array] | None = None
        began, positions = time.perf_counter(), 0
        with contextlib.closing(data.prefetch(run.batch, start, run.steps)) as batches:
            for done, batch in enumerate(batches, start + 1):
                state, values = self._step(state, run.trainer.teacher, batch)
                positions += _size(batch)
                # One step behind, so that the device is never waited for.
                if unchecked is not None:
                    _check(done - 1, unchecked)
                unchecked = values
                ends = done % run.per_epoch == 0
                stopped = self._stop.reached(done)
                saves = ends or stopped or (options.checkpoint_every and done % options.checkpoint_every == 0)
                if saves or done % options.log_every == 0:
                    _check(done, values)
                    line = {name: value.item() for name, value in jax.device_get(values).items() if name != "sound"}
                    speed = positions / (time.perf_counter() - began)
                    line |= {"epoch": done / run.per_epoch, "positions_per_second": speed}
                    if ends:
                        line |= self._validate(state, done, known)
                    self._metrics.write(done, line)
                    self._show.log(done, speed, **{n: line[n] for n in ("loss", "valid") if n in line})
                    began, positions = time.perf_counter(), 0
                if saves:
                    self._metrics.sync()
                    self._checkpoints.save(done, state, dataclasses.asdict(known))
                self._show.advance(done)
                if ends and known.is_over(done // run.per_epoch, options.patience, options.epochs):
                    return True
                if stopped:
                    return False
        return True

    def _validate(self, state: State, done: int, known: _Progress) -> dict[str, Any]:
        report, epoch = self._run.validate(state), done // self._run.per_epoch
        if known.best is None or report.value > known.best:
            known.best, known.epoch = report.value, epoch
            self._run.keep(state, self._directory)
        self._show.note(f"epoch {epoch}: {report.metric} {report.value:.4f}, best {known.best:.4f} in {known.epoch}")
        return {"valid": report.value}


def _check(step: int, values: dict[str, jax.Array]) -> None:
    if not values["sound"]:
        loss, norm = float(values["loss"]), float(values["gradient_norm"])
        raise DivergedError(
            f"step {step} is not finite (loss {loss}, gradient norm {norm}); the parameters are as before: lower --lr, "
            "or choose another --precision",
            step,
        )


def _size(batch: Batch) -> int:
    """Positions of a batch, padding included; of images their number."""
    first = next(iter(batch.values()))
    return first.size if "ids" in batch else len(first)


def _positions(batches: Any) -> int:
    """Of a batch, on average."""
    lengths = np.array(batches.lengths)
    own = lengths[np.searchsorted(lengths, batches.rows.lengths)]
    return round(batches.batch_size * max(1.0, float(own.mean())))


def _teacher(options: Options, setup: Setup) -> Distillation:
    model, stored = folder.load(options.distill)
    ours, theirs = setup.purpose, stored.purpose
    for name in ("task", "classes", "casings", "size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"--distill={options.distill} has {name} {getattr(theirs, name)!r}, where the model has "
                f"{getattr(ours, name)!r}: give a model of the same task."
            )
    same = _tokenizer(stored.tokenizer) == _tokenizer(setup.tokenizer)
    if not same:
        raise ValueError(f"--distill={options.distill} reads other pieces than the model: give one with its tokenizer.")
    return Distillation(model, options.temperature, options.distill_weight)


def _tokenizer(place: str) -> str | bytes:
    if not place.endswith(".json"):
        return place
    with open(place, "rb") as file:
        return file.read()
