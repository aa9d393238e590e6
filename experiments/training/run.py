"""One pretraining run: from checked options to a finished run on disk."""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, runs
from experiments.bucket import is_url
from experiments.options import Options
from experiments.training import fallback
from experiments.training.clock import Clock
from experiments.training.errors import DivergedError, TrainingError
from experiments.training.loop import Loop
from experiments.training.mesh import Placement
from experiments.training.precision import Phase, naming, phase_at, resolve
from experiments.training.step import State, Trainer, fingerprint
from q8jax import audit
from q8jax.devices import get_device


class Run:
    """A run that is checked but not started: nothing is on disk and nothing compiled.

    Args:
      options: the checked flags.
      dataset: the loaded data.
      placement: on which devices.

    Attributes:
      interrupted: whether a signal stopped it, and it has been saved.

    Raises:
      ValueError: the data is too short for the sequences, a rule of the precision matches no layer, or a tile does not
        divide its axis.
    """

    def __init__(self, options: Options, dataset: data.Dataset, placement: Placement):
        self.options = options
        self._dataset = dataset
        self._shapes = options.model_with(dataset.vocab_size)
        self._batch_shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
        data.check_batch(dataset, **self._batch_shape)
        self._placement = placement
        self._shardings = placement.of_model(options.mesh, self._shapes, options.seq_len)
        starts = np.arange(options.accumulate)[:, None] * options.microbatch
        self._rows_AxB = starts + placement.local_rows(options.microbatch)
        self._compile_seconds = 0.0
        self.interrupted = False
        self.fallback: fallback.Fallback | None = None
        with naming(options.precision_flag):
            self._trainers = {phase: self.trainer_of(phase) for phase in options.phases}
            for trainer in self._trainers.values():
                jax.eval_shape(trainer.step, jax.eval_shape(trainer.init), self.tokens)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return self.options.config(
            mesh=str(self._placement),
            tokenizer=self._dataset.tokenizer.name,
            vocab=self._shapes.vocab,
            data_sha256=self._dataset.sha256,
        )

    @property
    def tokens(self) -> jax.ShapeDtypeStruct:
        """One global batch, int32 [A, B/A, T+1]."""
        options = self.options
        shape = (options.accumulate, options.microbatch, options.seq_len + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._placement.batch)

    @property
    def devices(self) -> int:
        return self._placement.size

    def description(self) -> list[str]:
        """Lines for a person: data, model, precision, devices."""
        kind, processes = jax.devices()[0].device_kind, jax.process_count()
        several = f" of {processes} processes" if processes > 1 else ""
        where = f" as {self._placement}" if self.devices > 1 else ""
        unused = jax.device_count() - self.devices
        where += f", {unused} others unused" if unused else ""
        return [
            f"data: {self._dataset.description}",
            f"model: {self._shapes.params:,} parameters; precision: {self.options.label}; on {self.devices} × "
            f"{kind}{several}{where}",
        ]

    def trainer(self, phase: Phase) -> Trainer:
        """The functions of a phase."""
        return self._trainers[phase]

    def trainer_after(self, phase: Phase, step: int) -> Trainer:
        """The functions with which a phase goes on after a step: without the layers that fell back; made anew."""
        trainer = self.trainer(phase)
        if self.fallback is None:
            return trainer
        narrowed = self.fallback.narrowed(phase, trainer.recipes(), step)
        return trainer if narrowed == phase else self.trainer_of(narrowed)

    def trainer_of(self, phase: Phase) -> Trainer:
        """The functions of a phase that need not be one of the run's own."""
        options = self.options
        seeds = options.seed, options.init_perturbation
        return Trainer(self._shapes, phase, options.optimizer, options.accumulate, *seeds, self._shardings)

    def know_fallback(self, directory: Path) -> None:
        """Reads which layers have fallen back, from the run's directory."""
        bounds = fallback.parse(self.options.fallback)
        self.fallback = fallback.Fallback(directory, bounds, jax.process_index() == 0) if bounds else None

    def execute(self) -> dict[str, Any] | None:
        """Trains to the last step, or until told to stop.

        Returns:
          The summary, or None if the run was stopped before its last step.

        Raises:
          runs.RunError: the run directory is in use, another run's, or damaged.
          DivergedError: the loss or the gradient is not finite; the run directory says so too.
          TrainingError: the device would not run the precision, or the data is not what it seemed.
        """
        options = self.options
        primary = jax.process_index() == 0
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(self._opened(primary))
            finished = directory.summary()
            if finished is not None:
                self.say(f"{options.workdir} is finished already: give another --workdir to train again")
                return finished
            session = {"mesh": str(self._placement), "data": self._dataset.description}
            stop = stack.enter_context(runs.StopSignal())
            stack.enter_context(runs.MaintenanceNotice())
            self.know_fallback(directory.path)
            checkpoints = stack.enter_context(
                runs.Checkpoints(
                    directory.checkpoints,
                    keep=options.keep_checkpoints,
                    check=directory.check,
                    before=directory.push,
                )
            )
            restored = checkpoints.latest_good(self.target)
            start = 0 if restored is None else restored.step
            if options.stop_after is not None and start >= options.stop_after:
                self.say(f"{options.workdir} stands after step {start} already, --stop_after={options.stop_after}")
                return None
            if self.fallback is not None:
                self.fallback.resume(start)
            writer = functools.partial(
                runs.MetricsWriter, directory.path, None if restored is None else start, primary=primary
            )
            metrics = stack.enter_context(writer())
            told = stack.enter_context(writer(name=runs.TELEMETRY)) if options.telemetry else None
            tokens = options.batch_size * options.seq_len
            progress = stack.enter_context(runs.Progress(options.steps, start, tokens, primary=primary))
            if restored is None:
                state = self.compile(self.trainer(options.phases[0]).init)()
                session["initialisation"] = f"{int(self.compile(fingerprint, state)(state)):08x}"
            else:
                state = restored.tree
                progress.note(f"{options.workdir}: going on after step {start} of {options.steps}")
                if "mesh" in directory.changed:
                    then, now = directory.changed["mesh"]
                    progress.note(
                        f"--mesh was {then} and is {now}: sums are reordered, so losses need not agree bit for bit"
                    )
            directory.record_session({**runs.environment(), **session})
            loop = Loop(self, metrics, told, checkpoints, progress, stop, directory)
            try:
                state = loop.train(state, start)
            except DivergedError as error:
                directory.write_divergence(error.step, str(error))
                raise
            with loop.clock.standing():
                checkpoints.wait()
            done = int(state["step"])
            if done < options.steps:
                self.interrupted = stop.requested is not None
                reason = stop.requested or f"--stop_after={options.stop_after}"
                progress.note(f"{reason}: saved after step {done}; the same command goes on")
                return None
            lines = runs.read_metrics(directory.path) if primary else []
            losses = self._final_losses(state, lines[-1]["eval_loss"] if primary else math.nan)
            if not primary:
                return None
            summary = self._summary(lines, losses, loop.clock)
            directory.write_summary(summary)
            return summary

    def _opened(self, primary: bool) -> runs.RunDir:
        """The run's directory, or an error on every process if the first one, whose it is, has one."""
        options = self.options
        opened, failure = None, None
        try:
            opened = runs.RunDir.open(options.workdir, self.config, may_change=options.may_change, primary=primary)
        except runs.RunError as error:
            failure = error
        if runs.first_process_says(int(failure is not None)):
            raise failure or runs.RunError(
                f"--workdir={options.workdir} cannot be used, and the first process says why"
            )
        assert opened is not None
        if not is_url(options.workdir):
            runs.check_shared(opened.path)
        return opened

    @property
    def is_first(self) -> bool:
        """Of the processes of this run."""
        return jax.process_index() == 0

    def say(self, text: str) -> None:
        """Prints, on the first process."""
        if self.is_first:
            print(text, flush=True)

    def target(self, step: int) -> State:
        """The shapes, and the shardings, of what was saved after `step` steps."""
        phase = phase_at(self.options.phases, step - 1)
        trainer = self.trainer_after(phase, step)
        return self._placement.shapes(fallback.carried(trainer, jax.eval_shape(trainer.init)))

    def compile(self, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Callable:
        """Compiles a function of arrays, whose results are placed as those of a run are."""
        return self._compiled(function, *arguments, donate=donate)[1]

    def _compiled(
        self, function: Callable, *arguments: Any, donate: tuple[int, ...]
    ) -> tuple[jax.stages.Lowered, jax.stages.Compiled]:
        started = time.perf_counter()
        lowered = self._placement.lower(function, *arguments, donate=donate)
        compiled = lowered.compile()
        self._compile_seconds += time.perf_counter() - started
        return lowered, compiled

    def compile_step(self, trainer: Trainer, state: State, tokens: jax.Array, note: Callable[[str], None]) -> Callable:
        """Compiles a training step and audits it.

        Args:
          trainer: of the phase.
          state, tokens: that the first step takes.
          note: gets the audit's line.

        Raises:
          TrainingError: a GEMM that is not what the precision asked, or, under --require_native, is emulated.
        """
        lowered, compiled = self._compiled(trainer.step, state, tokens, donate=(0,))
        report = audit(lowered, compiled)
        note(report.summary())
        if not report.ok:
            raise TrainingError(
                f"{self.options.precision_flag} is not what this device would run, see the audit: choose another "
                "precision, or ask for auto."
            )
        if self.options.require_native and not report.is_native:
            raise TrainingError(
                f"{self.options.precision_flag} is emulated on this device, see the audit: leave out --require_native, "
                "or choose another precision."
            )
        return compiled

    def batch(self, step: int) -> np.ndarray:
        """Of the global batch that takes the run from `step` to `step + 1`, what this process holds: [A, B/A, T+1]."""
        local = self._read(functools.partial(data.train_batch, seed=self.options.seed, step=step))
        return local.reshape(*self._rows_AxB.shape, -1)

    def place(self, local_AxBxT1: np.ndarray) -> jax.Array:
        """Puts microbatches, of which this process has its own rows, on the devices."""
        return self._placement.place(local_AxBxT1, self.tokens.shape[1])

    def zero(self) -> jax.Array:
        """A counter to begin with, on every device."""
        return self._placement.replicate(np.zeros((), np.int32))

    def held_out(self, batches: int) -> jax.Array:
        """So many fixed held-out batches, of a microbatch's rows each: int32 [E, B/A, T+1]."""
        local = self._read(functools.partial(data.eval_batches, batches=batches))
        return self.place(local.reshape(-1, self._rows_AxB.shape[1], local.shape[-1]))

    def _read(self, read: Callable[..., np.ndarray]) -> np.ndarray:
        """What a function of batches reads of the rows that this process holds."""
        try:
            return read(self._dataset, rows=self._rows_AxB.reshape(-1), **self._batch_shape)
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def _summary(self, lines: list[dict[str, Any]], losses: dict[str, float], clock: Clock) -> dict[str, Any]:
        options = self.options
        last = self.trainer_after(phase_at(options.phases, options.steps - 1), options.steps)
        # Of the lines that every such run has, whatever else it tells and wherever it was stopped.
        regular = [line for line in lines if line["step"] % options.log_every == 0 or line["step"] == options.steps]
        tail = [line["loss"] for line in regular if line["step"] > 0.9 * options.steps and line["loss"] is not None]
        per_step = options.batch_size * options.seq_len
        per_second = statistics.median(line["tokens_per_second"] for line in lines)
        per_token = self._shapes.flops_per_token(options.seq_len)
        device = get_device(jax.devices()[0].device_kind)
        return {
            "precision": options.label,
            "policy": str(last.phase.policy),
            "params": self._shapes.params,
            "tokens": options.steps * per_step,
            "train_loss": statistics.fmean(tail) if tail else None,
            **losses,
            "bytes_per_token": self._dataset.bytes_per_token,
            "entropy_floor": self._dataset.entropy_floor,
            "nonfinite_tensors": sum(line["nonfinite_tensors"] for line in lines),
            "tokens_per_second": per_second,
            "step_ms": 1e3 * per_step / per_second,
            # What was logged by a version without it is not known.
            "input_wait": statistics.fmean(line.get("input_wait", math.nan) for line in lines),
            "checkpoint_wait": clock.checkpoint_wait,
            "checkpoint_share": clock.checkpoint_share,
            "compile_seconds": self._compile_seconds,
            "peak_memory_bytes": runs.peak_memory_bytes(),
            "flops": per_token * options.steps * per_step,
            # Against the peak in 16 bits in every precision, so that a faster format shows as a higher utilization.
            "mfu": None if device is None else per_token * per_second / (device.bf16 * self.devices),
            "joules_per_token": None,
        }

    def _final_losses(self, state: State, last_loss: float) -> dict[str, float]:
        """Held-out losses of the parameters at the end, and of their average where there is one.

        Args:
          state: at the end.
          last_loss: of the last evaluation, which need not be made again.
        """
        options = self.options
        trainer = self.trainer_after(phase_at(options.phases, options.steps - 1), options.steps)
        losses = {"eval_loss": last_loss}
        if options.final_eval_batches != options.eval_batches or "average" in state:
            held_out = self.held_out(options.final_eval_batches)
            evaluate = self.compile(trainer.evaluate, state, held_out)
            losses["eval_loss"] = float(evaluate(state, held_out))
            if "average" in state:
                losses["eval_loss_average"] = float(evaluate({**state, "params": state["average"]}, held_out))
        losses["eval_gap_bf16"] = self._loss_in_bf16(state, trainer, last_loss) - last_loss
        return losses

    def _loss_in_bf16(self, state: State, trainer: Trainer, last_loss: float) -> float:
        """The last evaluation again with every product in BF16, to tell what quantization does to the loss itself."""
        bf16 = resolve("bf16")
        if trainer.phase.policy == bf16.policy:
            return last_loss
        plain, held_out = self.trainer_of(bf16), self.held_out(self.options.eval_batches)

        def evaluate(state: State, batches: jax.Array) -> jax.Array:
            return plain.evaluate(plain.enter(state, plain.phase_state()), batches)

        return float(self.compile(evaluate, state, held_out)(state, held_out))
