"""The steps of a run; between steps it writes metrics, evaluates and saves."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from experiments import data, runs
from experiments.training import fallback, telemetry
from experiments.training.clock import Clock, Window
from experiments.training.errors import DivergedError
from experiments.training.nonfinite import first_nonfinite
from experiments.training.precision import Phase
from experiments.training.profile import Trace
from experiments.training.step import State, Trainer

if TYPE_CHECKING:
    from experiments.training.run import Run

Scalars = dict[str, jax.Array]
_REMEDY = "lower --lr, or choose another --precision"


class Loop:
    """The loop over the steps, of which each phase brings functions of its own.

    Args:
      run: compiles, and gives the batches.
      metrics, telemetry, checkpoints, progress: where results go; telemetry where it is asked for.
      stop: says when to leave.
      directory: of the run.

    Attributes:
      clock: where the time went.
    """

    def __init__(
        self,
        run: Run,
        metrics: runs.MetricsWriter,
        telemetry: runs.MetricsWriter | None,
        checkpoints: runs.Checkpoints,
        progress: runs.Progress,
        stop: runs.StopSignal,
        directory: runs.RunDir,
    ):
        self._run = run
        self._options = run.options
        self._metrics = metrics
        self._telemetry = telemetry
        self._checkpoints = checkpoints
        self._progress = progress
        self._stop = stop
        self.clock = Clock(lambda: checkpoints.writing)
        tell = functools.partial(progress.note, f"profile in {directory.place}/profile")
        self._trace = Trace(run.options.profile, directory.path / "profile", tell)
        self._held_out = run.held_out(run.options.eval_batches)
        self._stopped = False
        self._fell = False

    def train(self, state: State, start: int) -> State:
        """Takes the steps after `start`, to the last one or until told to stop.

        Returns:
          The state after the last step taken, which has been saved.

        Raises:
          DivergedError: the loss or the gradient is not finite.
        """
        options, run = self._options, self._run
        ends = [phase.start for phase in options.phases[1:]] + [options.steps]
        batch = lambda step: run.place(run.batch(step))
        with contextlib.closing(data.prefetch(batch, start, options.steps)) as batches, self._trace:
            for phase, end in zip(options.phases, ends, strict=True):
                if start < end and not self._stopped:
                    state = self._train(phase, state, start, itertools.islice(batches, end - start))
                    start = end
        return state

    def _train(self, phase: Phase, state: State, start: int, batches: Iterator[jax.Array]) -> State:
        """Takes the steps of one phase, or those of them that a resumed run has left."""
        options, run = self._options, self._run
        trainer = run.trainer_after(phase, start)
        functions: tuple[Callable, Callable, Callable | None] | None = None
        unchecked: tuple[int, Scalars, jax.Array] | None = None
        for done, tokens in enumerate(self.clock.batches(batches), start + 1):
            if functions is None:
                if done == phase.start + 1:
                    state = self._enter(trainer, state, tokens)
                train_step = run.compile_step(trainer, state, tokens, self._progress.note)
                evaluate = run.compile(trainer.evaluate, state, self._held_out)
                functions = train_step, evaluate, self._compile_telemetry(trainer, state, tokens)
                self.clock.begin(done - 1)
            train_step, evaluate, observe = functions
            observed = observe(state, tokens) if observe and self._observes(done) else None
            self._trace.before(done)
            state, values = train_step(state, tokens)
            self._trace.after(done, values)
            # One step behind, so that the device is never waited for.
            if unchecked is not None:
                self._check(trainer, state, *unchecked)
            unchecked = done, values, tokens
            self._stopped = self._stop.reached(done) or done == options.stop_after
            evaluates = done % options.eval_every == 0 or done in (options.steps, options.stop_after)
            logs = done % options.log_every == 0 or evaluates or observed is not None
            saves = done % options.checkpoint_every == 0 or done == options.steps or self._stopped
            if logs or saves:
                self._check(trainer, state, *unchecked)
                unchecked = None
                window = self.clock.end(done, looked=observed is not None)
                if logs:
                    line = self._line(window, values)
                    if observed is not None:
                        line |= self._tell(trainer, done, observed)
                    if evaluates:
                        line["eval_loss"] = self._evaluate(trainer, evaluate, state, done)
                    self._log(done, line)
                    state = {**state, "nonfinite": run.zero()}
                    if self._fell:
                        trainer, self._fell = run.trainer_after(phase, done), False
                        state, functions = fallback.carried(trainer, state), None
                if saves:
                    with self.clock.standing():
                        self._save(done, state)
                self.clock.begin(done)
            self._progress.advance(done)
            if self._stopped:
                break
        if unchecked is not None:
            self._check(trainer, state, *unchecked)
        return state

    def _enter(self, trainer: Trainer, state: State, tokens: jax.Array) -> State:
        """Begins a phase: its own scaling state, warm from its first global batch."""
        if trainer.phase.start > 0:
            state = trainer.enter(state, self._run.compile(trainer.phase_state)())
        if trainer.keeps_scales:
            state = {**state, "dots": self._run.compile(trainer.calibrate, state, tokens)(state, tokens)}
        return state

    def _compile_telemetry(self, trainer: Trainer, state: State, tokens: jax.Array) -> Callable | None:
        if self._telemetry is None:
            return None
        kinds = tuple(self._options.telemetry)
        return self._run.compile(functools.partial(telemetry.observe, trainer, kinds), state, tokens)

    def _observes(self, done: int) -> bool:
        return done == 1 or done % self._options.telemetry_every == 0

    def _tell(self, trainer: Trainer, done: int, observed: Any) -> dict[str, Any]:
        """Writes what was seen before a step; returns what belongs into its line of metrics."""
        observed = jax.device_get(observed)
        assert self._telemetry is not None
        if set(self._options.telemetry) != {"model"}:
            line = telemetry.line(trainer, observed["dots"])
            self._telemetry.write(done, line)
            # What falls after the last step would have no step to fall back in.
            if self._run.fallback is not None and done < self._options.steps:
                for reason in self._run.fallback.judge(done, line["dots"], line["formats"]):
                    self._progress.note(reason)
                    self._fell = True
        return observed.get("model", {})

    def _line(self, window: Window, values: Scalars) -> dict[str, Any]:
        line: dict[str, Any] = {name: value.item() for name, value in jax.device_get(values).items() if name != "sound"}
        tokens = window.steps * self._options.batch_size * self._options.seq_len
        return {
            **line,
            "tokens_per_second": tokens / window.seconds,
            "input_wait": window.waited / window.seconds,
        }

    def _save(self, done: int, state: State) -> None:
        self._metrics.sync()
        if self._telemetry is not None:
            self._telemetry.sync()
        self._checkpoints.save(done, state)

    def _evaluate(self, trainer: Trainer, evaluate: Any, state: State, done: int) -> float:
        loss = float(evaluate(state, self._held_out))
        if not math.isfinite(loss):
            where = _first(trainer, state, self._held_out)
            raise DivergedError(f"the held-out loss after step {done} is {loss}{where}: {_REMEDY}", done)
        return loss

    def _log(self, done: int, line: dict[str, Any]) -> None:
        self._metrics.write(done, line)
        shown = {name: line[name] for name in ("loss", "eval_loss") if name in line}
        self._progress.log(done, line["tokens_per_second"], **shown)

    def _check(self, trainer: Trainer, state: State, step: int, values: Scalars, tokens: jax.Array) -> None:
        if not values["sound"]:
            loss, norm = float(values["loss"]), float(values["gradient_norm"])
            raise DivergedError(
                f"step {step} is not finite (loss {loss}, gradient norm {norm}){_first(trainer, state, tokens)}; the "
                f"parameters are as before: {_REMEDY}",
                step,
            )


def _first(trainer: Trainer, state: State, tokens_AxBxT1: jax.Array) -> str:
    name = first_nonfinite(trainer, state, tokens_AxBxT1)
    return f", first in {name}" if name else ""
