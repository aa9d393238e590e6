"""The part of a study that is committed: everything that its results rest on, without checkpoints, a few MB at most."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from experiments.comparing import ondisk, results
from experiments.comparing.places import without_places
from experiments.comparing.plan import RUNS, STUDY
from experiments.comparing.record import RECORD
from experiments.loading import present
from experiments.runs.config import CONFIG
from experiments.runs.errors import RunError
from experiments.runs.files import strict_json, write_atomic
from experiments.runs.metrics import METRICS, TELEMETRY
from experiments.runs.rundir import DIVERGENCE, ENVIRONMENT, SUMMARY
from experiments.training.fallback import FALLBACK

_OF_RUN = (CONFIG, ENVIRONMENT, SUMMARY, DIVERGENCE, FALLBACK)
_COMPRESSED = (METRICS, TELEMETRY)
_ABSOLUTE = re.compile(r"(?<![\w.~/:+-])/[\w.+-]+/[\w./+-]*")


def archive(study: Path, target: Path) -> list[str]:
    """Copies what is to be committed of a study, of its runs those that have ended, and evaluates that.

    The same study gives the same bytes. What is in `target` from before is overwritten, nothing else removed.

    Returns:
      Absolute paths that are named in it, which flags had.

    Raises:
      RunError: `target` is the study itself or holds something else, or cannot be written.
    """
    if target.absolute() == study.absolute():
        raise RunError(f"--archive={target} is the study itself; give another directory")
    if target.is_dir() and any(target.iterdir()) and not (target / STUDY).exists():
        raise RunError(f"--archive={target} is not empty and holds no {STUDY}; give a new or empty directory")
    foreign = set()
    with ondisk.writing(target):
        target.mkdir(parents=True, exist_ok=True)
        files = [study / name for name in (STUDY, ondisk.ATTEMPTS, RECORD)]
        for run in sorted((study / RUNS).glob("*")):
            if ondisk.outcome(run):
                files += [run / name for name in (*_OF_RUN, *_COMPRESSED)]
        for file in filter(None, map(present, files)):
            copy = target / file.relative_to(study)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.name.removesuffix(".gz") in _COMPRESSED:
                copy = copy.with_name(f"{file.name.removesuffix('.gz')}.gz")
                # By what they hold: which is newer cannot be told where a clock was set back.
                data = _uncompressed(file)
                if not copy.exists() or _uncompressed(copy) != data:
                    write_atomic(copy, [gzip.compress(data, mtime=0)])
                continue
            text = without_places(file.read_text(), study)
            foreign.update(_ABSOLUTE.findall(text))
            _replace(copy, text)
        # Of the copy: it says nothing of what runs have not ended.
        try:
            _replace(target / results.COMPARISON, strict_json(results.evaluate(target), indent=2) + "\n")
        except results.StudyError:
            (target / results.COMPARISON).unlink(missing_ok=True)
    return sorted(foreign)


def size(target: Path) -> int:
    """Bytes of an archive."""
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _replace(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        write_atomic(path, [text.encode()])
