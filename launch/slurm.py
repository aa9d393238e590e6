"""Submits a run to Slurm: one process for each GPU of one or more nodes, or an array of the runs of a study.

    python -m launch.slurm --nodes=2 --gpus_per_node=8 --time=12:00:00 -- python -m experiments.pretrain --precision=fp8

submits the command with `sbatch`, to be started by `srun` once for each GPU; the processes find each other by Slurm's
own variables. Before the time is up Slurm sends SIGTERM, the run saves and ends, and the job goes back into the queue.

    python -m experiments.compare --precisions=bf16,fp8 --seeds=8 --print_commands > commands.txt
    python -m launch.slurm --array=commands.txt --at_most=4 --gpus_per_node=1

submits an array with a task for each line, four of them at a time.

    --nodes=N          nodes of each run (default: 1)
    --gpus_per_node=N  GPUs, and so processes, of each node; 0 for one process without (default: 8)
    --time=LIMIT       as Slurm writes it, 12:00:00 or 2-00 (default: the partition's)
    --job_name=NAME    (default: q8jax)
    --array=FILE       commands, a line each, instead of the one after --
    --at_most=N        tasks of the array at a time (default: all)
    --sbatch=FLAG      a further flag for sbatch, as in --sbatch=--partition=gpu; may be repeated
    --dry_run          print what would run, and stop
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from launch import commands

FLAGS = flags.FLAGS
_JOB = Path(__file__).with_name("slurm_job.sh")
# Before the time is up, enough to finish a step and to save.
_NOTICE_SECONDS = 300


def define_flags() -> None:
    flags.DEFINE_integer("nodes", 1, "Nodes of each run.", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", 8, "GPUs of each node.", lower_bound=0)
    flags.DEFINE_string("time", "", "Limit of time.")
    flags.DEFINE_string("job_name", "q8jax", "Name of the job.")
    flags.DEFINE_string("array", "", "File of commands, a line each.")
    flags.DEFINE_integer("at_most", None, "Tasks of the array at a time.", lower_bound=1)
    flags.DEFINE_multi_string("sbatch", [], "A further flag for sbatch.")
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.")


def submission(
    command: Sequence[str],
    *,
    nodes: int,
    gpus_per_node: int,
    name: str,
    time: str = "",
    tasks: int | None = None,
    at_most: int | None = None,
    further: Sequence[str] = (),
) -> commands.Command:
    """The `sbatch` that submits a command.

    Args:
      command: each process's program and arguments.
      nodes, gpus_per_node: of a run.
      name, time: of the job.
      tasks: of an array, None for a job of its own.
      at_most: tasks at a time.
      further: flags for sbatch.
    """
    own = [f"--job-name={name}", f"--nodes={nodes}", f"--ntasks-per-node={max(gpus_per_node, 1)}"]
    if gpus_per_node:
        own.append(f"--gpus-per-node={gpus_per_node}")
    if time:
        own.append(f"--time={time}")
    if tasks is not None:
        own.append(f"--array=0-{tasks - 1}" + (f"%{at_most}" if at_most else ""))
    own += ["--requeue", "--open-mode=append", f"--signal=TERM@{_NOTICE_SECONDS}", *further]
    return commands.Command(("sbatch", *own, str(_JOB), *command))


def main(argv: list[str]) -> int:
    """Submits what the flags say; returns the exit code."""
    command, tasks = argv[1:], None
    try:
        commands.check_options("sbatch", FLAGS.sbatch)
        if bool(command) == bool(FLAGS.array):
            raise commands.LaunchError("give either a command after -- or a file of them by --array=")
        if FLAGS.array:
            tasks = len(commands.read(FLAGS.array))
            command = ["python", "-m", "launch.task", str(Path(FLAGS.array).resolve())]
        elif FLAGS.at_most:
            raise commands.LaunchError(f"--at_most={FLAGS.at_most} is of an array: leave it out, or give --array=")
    except commands.LaunchError as error:
        return commands.refuse(error)
    job = submission(
        command,
        nodes=FLAGS.nodes,
        gpus_per_node=FLAGS.gpus_per_node,
        name=FLAGS.job_name,
        time=FLAGS.time,
        tasks=tasks,
        at_most=FLAGS.at_most,
        further=FLAGS.sbatch,
    )
    return commands.carry_out([job], dry_run=FLAGS.dry_run)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=commands.parse)
