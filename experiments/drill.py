"""Fault drill: hurts real runs in every way that a run has to survive, and sees whether anything is lost.

    python -m experiments.drill --out=runs/drill                                 # all faults, 50 kills
    python -m experiments.drill --out=runs/drill --faults=kill,disk_full --kills=4

Each fault meets `python -m experiments.pretrain` in a process of its own, a small model on the CPU. What it must come
to is the run that met no fault: every line of metrics but for the speed, the summary, and every leaf of the last
checkpoint, bit for bit. Where a run has to say something, it is listened to. At the end stands a table in Markdown, and
--out holds the runs and drill.json, with every kill.

Seconds lost are those that a restart takes to get further than the run was before: starting Python, reading compiled
programs, restoring, and taking steps again.

Exit code: 0, or 1 if something was lost or went otherwise than it has to.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments.comparing.places import without_places
from experiments.drills import clock, kills, shards, sharing, storage
from experiments.drills.lab import Lab
from experiments.drills.outcomes import Outcome, table
from experiments.runs import RunError, environment
from experiments.runs.files import strict_json
from q8jax import choices

FLAGS = flags.FLAGS
REPORT = "drill.json"
FAULTS = {
    "kill": lambda lab: kills.killed_at_random_moments(lab, FLAGS.kills),
    "truncated": storage.newest_truncated,
    "flipped": storage.newest_flipped,
    "disk_full": storage.disk_full,
    "process": sharing.one_of_two_killed,
    "two_runs": sharing.two_runs_in_one_directory,
    "shard_damaged": shards.damaged_between_starts,
    "shard_gone": shards.gone_between_starts,
    "shard_in_use": shards.damaged_in_use,
    "clock": clock.clock_jumps,
}


def define_flags() -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    flags.DEFINE_string("out", "runs/drill", "A new directory, for the runs and the report.")
    flags.DEFINE_list("faults", ["all"], f"all, or some of {', '.join(FAULTS)}.")
    flags.DEFINE_integer("kills", 50, "How often to kill -9.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the moments of the kills, and of the data.", lower_bound=0)


def main(argv: list[str]) -> int:
    """Carries out the drill that the parsed flags ask for; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: this program takes flags only.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    jax.config.update("jax_platforms", "cpu")  # the device is for the runs' processes, if for any
    try:
        names = named(FLAGS.faults)
        out = Path(FLAGS.out).expanduser()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"--out={out} is there already; give a new directory")
        outcomes = carry_out(names, out)
    except (ValueError, OSError, RunError) as error:
        print(f"drill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print("\n" + without_places(table(outcomes), out))
    return int(any(outcome.problems for outcome in outcomes))


def named(faults: Sequence[str]) -> list[str]:
    """The faults that a flag names, in the order of FAULTS.

    Raises:
      ValueError: one is unknown.
    """
    for name in faults:
        choices.check("--faults", name, ("all", *FAULTS))
    return [name for name in FAULTS if name in faults or "all" in faults]


def carry_out(names: list[str], out: Path) -> list[Outcome]:
    """What comes of the named faults, which `out` then holds a report of."""
    lab = Lab(out, FLAGS.seed, lambda text: print(text, flush=True))
    outcomes = []
    try:
        for number, name in enumerate(names, 1):
            outcome = FAULTS[name](lab)
            outcomes.append(outcome)
            verdict = "; ".join(outcome.problems) or "nothing lost"
            lab.say(f"{number} of {len(names)}, {outcome.fault}: {verdict}")
            report = {
                "environment": environment(),
                "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 3),
                "seconds_of_the_run_without_a_fault": lab.seconds,
                "seconds_of_a_save": lab.save_seconds,
                "faults": [dataclasses.asdict(outcome) for outcome in outcomes],
            }
            (out / REPORT).write_text(without_places(strict_json(report, indent=2), out) + "\n")
    finally:
        lab.close()
    return outcomes


if __name__ == "__main__":
    define_flags()
    app.run(main)
