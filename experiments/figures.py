"""Draws the figures of a study and prints its tables: python -m experiments.figures --runs=results/tiny --out=figures

Every figure comes as PDF, SVG and PNG (300 dpi), every table as LaTeX with the rules of booktabs; report.html has all
of them in one page that opens from disk. provenance.json says which runs, revisions and versions each file comes from,
and numbers.json holds all plotted numbers and all cells of tables, rounded to 6 digits. The same runs give the same
bytes in the same environment.

    --runs=DIR      a study of experiments.compare, any directory of runs, a glob of some, or gs://BUCKET/FOLDER;
                    benchmark.json of experiments.benchmark and whatif.json are found there too
    --out=DIR       where to write; new, empty, or with what this program wrote before
    --tensors_of=A,B    arms to draw tensor by tensor, of those with telemetry (default: eight at most)
    --venue=NAME    whose columns and letters to fit: icml, neurips, iclr, acl, ieee, acm or nature (default: icml)
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments import bucket
from experiments.plots.plot import Plot
from experiments.plots.style import VENUES

PROVENANCE, NUMBERS, REPORT = "provenance.json", "numbers.json", "report.html"


class OutError(Exception):
    """Figures cannot be written to a directory; its text goes on from the flag, and says the fix."""


def define_flags() -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    flags.DEFINE_string("runs", None, "A study, a directory of runs, or a glob.", required=True)
    flags.DEFINE_string("out", None, "Where to write.", required=True)
    flags.DEFINE_list("tensors_of", [], "Arms to draw tensor by tensor.")
    flags.DEFINE_enum("venue", "icml", list(VENUES), "Whose columns to fit.")


def main(argv: list[str]) -> int:
    """Draws what the flags say; returns the exit code."""
    logging.set_verbosity(logging.ERROR)  # fonttools tells of every table of every font
    FLAGS = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}, where a flag is written --name=value.")
    if importlib.util.find_spec("matplotlib") is None:
        print("figures: what draws is not installed: pip install 'q8jax[figures]'.", file=sys.stderr)
        return 1
    from experiments.comparing.record import StudyError
    from experiments.loading import LoadError
    from experiments.plots.telemetry import ArmError
    from experiments.runs.errors import RunError

    try:
        with bucket.fetched(FLAGS.runs) as here:
            missing = write(here, Path(FLAGS.out).expanduser(), FLAGS.venue, FLAGS.tensors_of)
    except ArmError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 1
    except (LoadError, StudyError, RunError, bucket.BucketError) as error:
        print(f"figures: --runs={FLAGS.runs}: {error}", file=sys.stderr)
        return 1
    except OutError as error:
        print(f"figures: --out={FLAGS.out} {error}", file=sys.stderr)
        return 1
    print("\n".join([*missing, f"all is in {FLAGS.out}"]))
    return 0


def write(runs: str, out: Path, venue: str, tensors_of: Sequence[str] = ()) -> list[str]:
    """Draws all there is to draw.

    Args:
      runs: the directory of a study or of runs, or a glob.
      out: directory to write to.
      venue: of VENUES.
      tensors_of: arms to draw tensor by tensor; the first few by default.

    Returns:
      Sentences on what is missing.

    Raises:
      LoadError, StudyError: there is nothing to draw, or what there is is damaged or not comparable.
      ArmError: one of `tensors_of` has no telemetry.
      OutError: the directory holds something else, or the disk refuses a file.
    """
    before = _written_before(out)
    files, missing = draw(runs, venue, tensors_of)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in before:
            (out / name).unlink(missing_ok=True)
        # First, so that a directory that is there in part is known for one of figures.
        for name in sorted(files, key=lambda name: name != PROVENANCE):
            (out / name).write_bytes(files[name])
    except OSError as error:
        raise OutError(f"cannot be written ({error.strerror}): give another.") from error
    return missing


def draw(runs: str, venue: str, tensors_of: Sequence[str] = ()) -> tuple[dict[str, bytes], list[str]]:
    """What is to be written, by name, and sentences on what is missing."""
    from experiments.plots import drawing, latex, provenance, report, saving, study, tables, telemetry

    found = study.load(runs)
    gathered = telemetry.gather_arms(found)
    detailed, left_out = telemetry.chosen(gathered, tensors_of)
    missing = [*found.missing, *left_out]
    plots: list[Plot] = []
    files: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    with drawing.style(VENUES[venue]):
        for item in saving.saved(_drawings(found, detailed, venue), VENUES[venue]):
            if isinstance(item, str):
                missing.append(item)
            else:
                plot, pictures = item
                plots.append(plot)
                files |= {f"{plot.name}.{suffix}": (content, plot.runs) for suffix, content in pictures.items()}
    printed = list(tables.tables(found, gathered))
    for table in printed:
        of_table = tuple(dict.fromkeys(run for runs in table.runs for run in runs))
        files[f"{table.name}.tex"] = latex.latex(table).encode(), of_table
    everything = tuple(dict.fromkeys(run for _, runs in files.values() for run in runs))
    files[NUMBERS] = provenance.numbers(plots, printed).encode(), everything
    origin = provenance.provenance(found.runs, found.others, venue)
    page = report.render(found.title, plots, printed, origin, missing)
    files[REPORT] = page.encode(), everything
    origin["outputs"] = provenance.outputs(origin, files)
    contents = {name: content for name, (content, _) in files.items()}
    return contents | {PROVENANCE: (json.dumps(origin, indent=1, ensure_ascii=False) + "\n").encode()}, missing


def _drawings(found: Any, gathered: Sequence[Any], venue: str) -> Iterator[Any]:
    from experiments.plots import curves, difference, quality, roofline, scalars, sensitivity, telemetry

    look = VENUES[venue]
    yield from quality.draw(found, look)
    yield from curves.draw(found, look)
    yield from difference.draw(found, look)
    yield from scalars.draw(found, look)
    yield from telemetry.draw(gathered, look)
    yield from sensitivity.draw(found, look)
    yield from roofline.draw(found, look)


def _written_before(out: Path) -> list[str]:
    """The files that this program wrote to a directory, which it may replace.

    Raises:
      OutError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    try:
        outputs = json.loads((out / PROVENANCE).read_bytes())["outputs"]
        return [Path(name).name for output in outputs.values() for name in output["files"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise OutError("is there already, and not a directory of figures: give another.") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
