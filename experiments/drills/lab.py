"""Where the drill makes its runs: their flags, their data, and the run that meets no fault."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.data.markov import MarkovSource
from experiments.data.shards import HEADER_BYTES, MAGIC, VERSION
from experiments.drills.sessions import Session
from experiments.runs import RunError

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = (sys.executable, "-m", "experiments.pretrain")
STEPS, SAVED_EVERY, EVALUATED_EVERY = 400, 8, 20
# Of runs that are damaged while they do not run: between the last two saves of which one is due to --stop_after.
STOPPED = 300
VOCAB, SHARD_TOKENS = 32, {"train": (20_000, 20_000, 20_000), "val": (6_000,)}
FLAGS = (
    *("--precision=fp8", "--layers=1", "--d_model=64", "--heads=2", "--d_ff=128", "--seq_len=16", "--batch_size=4"),
    *("--eval_batches=2", "--log_every=1", "--keep_checkpoints=2"),
    *(f"--eval_every={EVALUATED_EVERY}", f"--checkpoint_every={SAVED_EVERY}"),
)
# On the CPU whatever else is there: the drill is of files and processes. Small programs are cached, too.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class Lab:
    """Makes runs in a directory of its own, and ends at its end what still runs."""

    def __init__(self, out: Path, seed: int, say: Callable[[str], None]):
        self.out = out.absolute()
        self.random = np.random.default_rng(seed)
        self.say = say
        self._sessions: list[Session] = []
        self.shards = self._write_shards(seed)

    def start(
        self,
        workdir: Path,
        *flags: str,
        steps: int = STEPS,
        mesh: str = "data:1",
        around: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Session:
        """Starts pretrain.

        Args:
          workdir: of the run.
          flags: beside those of every run.
          steps, mesh: of the run.
          around: a program that runs it, with its arguments.
          environment: beside that of every run.
        """
        data = f"--data=shards:{self.out / 'shards'},vocab={VOCAB}"
        own = (data, f"--cache_dir={self.out / 'cache'}", f"--workdir={workdir}", f"--steps={steps}", f"--mesh={mesh}")
        session = Session(
            (*around, *PRETRAIN, *FLAGS, *own, *flags), {**os.environ, **_ENVIRONMENT, **(environment or {})}, ROOT
        )
        self._sessions.append(session)
        return session

    def directory(self, name: str) -> Path:
        """A directory that is not there yet, for a run."""
        return self.out / "runs" / name

    def stopped(self, name: str) -> tuple[Path, Session]:
        """A run that was stopped after STOPPED steps, and the start that took it there."""
        copy = self.directory(name)
        shutil.copytree(self._stopped[0], copy)
        return copy, self._stopped[1]

    @functools.cached_property
    def reference(self) -> Path:
        """The run that meets no fault."""
        return self._reference[0]

    @property
    def seconds(self) -> float:
        """What that run took."""
        return self._reference[1].seconds

    @property
    def save_seconds(self) -> float:
        """What a save of it took, in the median."""
        return statistics.median(self._reference[2])

    def close(self) -> None:
        """Ends what still runs, and writes down what every start said."""
        (self.out / "logs").mkdir()
        for number, session in enumerate(self._sessions):
            session.stop()
            (self.out / "logs" / f"{number:03d}.log").write_text(session.transcript())

    @functools.cached_property
    def _stopped(self) -> tuple[Path, Session]:
        workdir = self.directory("stopped")
        self.say("a run that compiles, and is stopped half-way")
        return workdir, finished(self.start(workdir, f"--stop_after={STOPPED}"))

    @functools.cached_property
    def _reference(self) -> tuple[Path, Session, list[float]]:
        """With how long each of its saves took."""
        _ = self._stopped  # compiles what every start after it then finds
        self.say("the run that meets no fault")
        workdir = self.directory("uninterrupted")
        session, saves = self.start(workdir), []
        while session.until(lambda: saving(workdir)):
            began = time.monotonic()
            session.until(lambda: not saving(workdir))
            saves.append(time.monotonic() - began)
        return workdir, finished(session), saves

    def _write_shards(self, seed: int) -> dict[str, list[Path]]:
        counts = [(split, count) for split, counts in SHARD_TOKENS.items() for count in counts]
        source = MarkovSource(order=1, vocab=VOCAB, tokens=sum(count for _, count in counts), seed=seed)
        tokens = np.split(source.sample().astype("<u2"), np.cumsum([count for _, count in counts])[:-1])
        (self.out / "shards").mkdir(parents=True)
        written: dict[str, list[Path]] = {split: [] for split in SHARD_TOKENS}
        for number, ((split, count), part) in enumerate(zip(counts, tokens, strict=True)):
            header = np.zeros(HEADER_BYTES // 4, "<i4")
            header[:3] = MAGIC, VERSION, count
            path = self.out / "shards" / f"drill_{split}_{number:06d}.bin"
            path.write_bytes(header.tobytes() + part.tobytes())
            written[split].append(path)
        return written


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or an old one removed."""
    return any((workdir / "checkpoints").glob("*.partial"))


def finished(session: Session) -> Session:
    """A start without a fault, at its end.

    Raises:
      RunError: it failed all the same.
    """
    if session.wait().code:
        last = session.lines[-1][1] if session.lines else "nothing"
        raise RunError(f"a run without a fault ended with exit code {session.code}, and said last: {last}")
    return session
