"""The training loop: from checked options to a finished run on disk."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import data, runs
from experiments.hardware import peak_flops
from experiments.options import MAY_CHANGE, Options
from experiments.training.mesh import Placement, parse_mesh
from experiments.training.precision import Phase, phase_at, resolve
from experiments.training.step import State, Trainer


class NotFinite(Exception):
    """The loss or the gradient is not finite; the message names the step and the first such tensor."""


class Run:
    """One pretraining run, checked but not started.

    Args:
      options: the checked flags.
      dataset: the loaded data.

    Raises:
      ValueError: the data is too short for the sequences, or the mesh divides neither the devices nor the batch.
    """

    def __init__(self, options: Options, dataset: data.Dataset):
        self._options = options
        self._dataset = dataset
        self._shapes = options.model_with(dataset.vocab_size)
        self._batch_shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
        data.check_batch(dataset, **self._batch_shape)
        devices = parse_mesh(options.mesh, jax.device_count(), options.batch_size // options.accumulate)
        self._placement = Placement(devices)
        self._compile_seconds = 0.0

    def trainer(self, phase: Phase) -> Trainer:
        """The functions of a phase."""
        options = self._options
        return Trainer(self._shapes, phase, options.optimizer, options.accumulate, options.seed)

    def execute(self) -> dict[str, Any] | None:
        """Trains to the last step, or until told to stop.

        Returns:
          The summary, or None if the run was stopped before its last step.

        Raises:
          runs.RunError: the run directory is in use, another run's, or damaged.
          NotFinite: the loss or the gradient is not finite.
        """
        options = self._options
        config = options.config(vocab=self._shapes.vocab, data_sha256=self._dataset.sha256)
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(runs.RunDir.open(options.workdir, config, may_change=MAY_CHANGE))
            directory.record_session({**runs.environment(), "data": self._dataset.description})
            stop = stack.enter_context(runs.StopSignal())
            checkpoints = stack.enter_context(runs.Checkpoints(directory.checkpoints, keep=options.keep_checkpoints))
            restored = checkpoints.latest_good(self._target(checkpoints.steps()), self._placement.replicated)
            start = 0 if restored is None else restored.step
            metrics = stack.enter_context(runs.MetricsWriter(directory.path, None if restored is None else start))
            tokens = options.batch_size * options.seq_len
            progress = stack.enter_context(runs.Progress(options.steps, start, tokens))
            if restored is not None:
                progress.note(f"{options.workdir}: going on after step {start} of {options.steps}")
            if restored is None:
                trainer = self.trainer(options.phases[0])
                state = self._compile(trainer.init)()
            else:
                state = restored.tree
            loop = _Loop(self, options, metrics, checkpoints, progress, stop, str(directory.path / "profile"))
            state = loop.train(state, start)
            checkpoints.wait()
            if int(state["step"]) < options.steps:
                progress.note(f"{stop.requested}: saved after step {int(state['step'])}; the same command goes on")
                return None
            metrics.sync()
            summary = self._summary(state, runs.read_metrics(directory.path))
            directory.write_summary(summary)
            return summary

    def _target(self, steps: list[int]) -> State:
        last = max(steps[-1] - 1, 0) if steps else 0
        return jax.eval_shape(self.trainer(phase_at(self._options.phases, last)).init)

    def _compile(self, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Callable:
        started = time.perf_counter()
        jitted = jax.jit(function, out_shardings=self._placement.replicated, donate_argnums=donate)
        compiled = jitted.lower(*arguments).compile()
        self._compile_seconds += time.perf_counter() - started
        return compiled

    def batch(self, step: int) -> np.ndarray:
        """The global batch that takes the run from `step` to `step + 1`, int32 [A, B/A, T+1]."""
        batch = data.train_batch(self._dataset, seed=self._options.seed, step=step, **self._batch_shape)
        return batch.reshape(self._options.accumulate, -1, batch.shape[1])

    def place(self, tokens_AxBxT1: np.ndarray) -> jax.Array:
        return self._placement.put_batch(tokens_AxBxT1)

    def held_out(self) -> jax.Array:
        """The fixed held-out batches, int32 [E, B, T+1]."""
        return self.place(data.eval_batches(self._dataset, batches=self._options.eval_batches, **self._batch_shape))

    def enter(self, trainer: Trainer, state: State, step: int, tokens: jax.Array) -> State:
        """Begins a phase: its own scaling state, warm from the first global batch."""
        if step > 0:
            state = self._compile(trainer.enter, state)(state)
        if trainer.keeps_scales:
            state = self._compile(trainer.calibrate, state, tokens)(state, tokens)
        return state

    def functions(self, trainer: Trainer, state: State, tokens: jax.Array, held_out: jax.Array):
        """The compiled train step and evaluation of a phase."""
        step = self._compile(trainer.step, state, tokens, donate=(0,))
        return step, self._compile(trainer.evaluate, state, held_out)

    def _summary(self, state: State, lines: list[dict[str, Any]]) -> dict[str, Any]:
        options = self._options
        last_phase = phase_at(options.phases, options.steps - 1)
        eval_loss = next(line["eval_loss"] for line in reversed(lines) if line.get("eval_loss") is not None)
        tail = [line["loss"] for line in lines if line["step"] > 0.9 * options.steps] or [lines[-1]["loss"]]
        per_step = options.batch_size * options.seq_len
        per_second = statistics.median(line["tokens_per_second"] for line in lines)
        per_token = self._shapes.flops_per_token(options.seq_len)
        peak = peak_flops(jax.devices()[0].device_kind)
        devices = self._placement.batch.mesh.size
        return {
            "precision": options.label,
            "policy": str(last_phase.policy),
            "params": self._shapes.params,
            "tokens": options.steps * per_step,
            "train_loss": statistics.fmean(tail),
            "eval_loss": eval_loss,
            "eval_loss_bf16": self._evaluate_bf16(state, last_phase, eval_loss),
            "bytes_per_token": self._dataset.bytes_per_token,
            "entropy_floor": self._dataset.entropy_floor,
            "nonfinite_tensors": sum(line["nonfinite_tensors"] for line in lines),
            "tokens_per_second": per_second,
            "step_ms": 1e3 * per_step / per_second,
            "compile_seconds": self._compile_seconds,
            "peak_memory_bytes": runs.peak_memory_bytes(),
            "flops": per_token * options.steps * per_step,
            "mfu": None if peak is None else per_token * per_second / (peak * devices),
            "joules_per_token": None,
        }

    def _evaluate_bf16(self, state: State, phase: Phase, eval_loss: float) -> float:
        bf16 = resolve("bf16", ("blocks",), tied=self._shapes.tied)
        if phase.policy == bf16.policy:
            return eval_loss
        trainer, held_out = self.trainer(bf16), self.held_out()
        evaluate = self._compile(lambda state, batches: trainer.evaluate(trainer.enter(state), batches), state, held_out)
        return float(evaluate(state, held_out))


class _Loop:
    """The steps of a run; between steps it writes metrics, evaluates and saves."""

    def __init__(
        self,
        run: Run,
        options: Options,
        metrics: runs.MetricsWriter,
        checkpoints: runs.Checkpoints,
        progress: runs.Progress,
        stop: runs.StopSignal,
        profile_directory: str,
    ):
        self._run = run
        self._options = options
        self._metrics = metrics
        self._checkpoints = checkpoints
        self._progress = progress
        self._stop = stop
        self._profile_directory = profile_directory
        self._per_step = options.batch_size * options.seq_len

    def train(self, state: State, start: int) -> State:
        options, run = self._options, self._run
        held_out = run.held_out()
        phase = None
        unchecked: tuple[int, dict[str, jax.Array], jax.Array] | None = None
        with contextlib.closing(data.prefetch(run.batch, start, options.steps)) as batches:
            for step, batch in enumerate(batches, start):
                tokens = run.place(batch)
                current = phase_at(options.phases, step)
                if current is not phase:
                    phase, trainer = current, run.trainer(current)
                    if step == phase.start:
                        state = run.enter(trainer, state, step, tokens)
                    train_step, evaluate = run.functions(trainer, state, tokens, held_out)
                    self._start_window()
                done = step + 1
                self._profile(done)
                state, values = train_step(state, tokens)
                self._steps_in_window += 1
                # One step behind, so that the device is never waited for; a step that is not finite changed nothing.
                if unchecked is not None:
                    _check(trainer, state, *unchecked)
                unchecked = (done, values, tokens)
                self._profile(done, ending=True)
                stopping = self._stop.requested is not None
                evaluates = done % options.eval_every == 0 or done == options.steps
                saves = done % options.checkpoint_every == 0 or done == options.steps or stopping
                if done % options.log_every == 0 or evaluates or saves:
                    _check(trainer, state, *unchecked)
                    unchecked = None
                    self._between_steps(done, state, values, (evaluate, held_out) if evaluates else None, saves)
                self._progress.advance(done)
                if stopping:
                    break
        return state

    def _start_window(self) -> None:
        self._steps_in_window = 0
        self._window_start = time.perf_counter()

    def _between_steps(self, done: int, state: State, values: dict[str, jax.Array], evaluation: Any, saves: bool) -> None:
        line = {name: value.item() for name, value in jax.device_get(values).items()}
        elapsed = time.perf_counter() - self._window_start
        line["tokens_per_second"] = self._steps_in_window * self._per_step / elapsed
        if evaluation is not None:
            evaluate, held_out = evaluation
            line["eval_loss"] = float(evaluate(state, held_out))
        if done % self._options.log_every == 0 or evaluation is not None:
            self._metrics.write(done, line)
            shown = {name: line[name] for name in ("loss", "eval_loss") if name in line}
            self._progress.log(done, line["tokens_per_second"], **shown)
        if saves:
            self._metrics.sync()
            self._checkpoints.save(done, state)
        self._start_window()

    def _profile(self, step: int, ending: bool = False) -> None:
        if self._options.profile is None:
            return
        first, last = self._options.profile
        if step == first and not ending:
            jax.profiler.start_trace(self._profile_directory)
        if step == last and ending:
            jax.profiler.stop_trace()
            self._progress.note(f"profile of steps {first} to {last} in {self._profile_directory}")


def _check(trainer: Trainer, state: State, step: int, values: dict[str, jax.Array], tokens_AxBxT1: jax.Array) -> None:
    loss, norm = float(values["loss"]), float(values["gradient_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    if "loss_scale" in values and float(values["loss_scale"]) > 1:
        return  # the step was skipped and the loss scale halved
    for tokens_BxT1 in tokens_AxBxT1:
        amaxes = trainer.amaxes_in_order(state, tokens_BxT1)
        first = next((name for name, amax in amaxes.items() if not np.isfinite(amax)), None)
        if first is not None:
            break
    raise NotFinite(
        f"Step {step} is not finite (loss {loss}, gradient norm {norm}; first: {first or 'not seen again'}), so training "
        "stops with the parameters as before it: lower --lr, or choose another --precision."
    )
