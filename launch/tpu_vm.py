"""Runs a command on TPU VMs: asks for them, sets them up, runs on all workers, collects, and gives them back.

    python -m launch.tpu_vm --name=q8 --zone=us-east5-a --tpu=v5p:4x4x4 -- python -m experiments.pretrain

creates a queued resource, waits until it is there, copies this checkout to every worker, installs it, runs the command
on all workers at once, copies the folders that --collect names from the first worker, and deletes the resource. A run
that was told to stop is started again there; when the VMs are taken away, all of it is done again, up to --restarts
times, and the run goes on from its last checkpoint if --workdir outlives the VMs, as gs://BUCKET/FOLDER does.

    --name=NAME          of the queued resource and its nodes
    --zone=ZONE          where
    --project=PROJECT    (default: gcloud's)
    --tpu=KIND:TOPOLOGY  v4, v5e, v5p or v6e, as in v5e:4x4
    --slices=N           of them (default: 1)
    --spot               VMs that may be taken away
    --create=FLAG        a further flag for `queued-resources create`; may be repeated
    --collect=FOLDER     to copy back, relative to the checkout; may be repeated
    --restarts=N         (default: 100)
    --poll=SECONDS       between looks at the queue (default: 30)
    --keep               leave the VMs running at the end, and use those that are there
    --dry_run            print what would run, and stop
"""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from absl import app, flags

from launch import commands
from launch.commands import Command, LaunchError
from launch.tpus import Slice

FLAGS = flags.FLAGS
_NAME = r"[a-z]([-a-z0-9]{0,58}[a-z0-9])?"
_ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "q8jax", "experiments", "launch")
_ARCHIVE, _FOLDER, _JOB = "q8jax.tar.gz", "q8jax", "launch/job.json"
# What runs on workers is the same text whatever the command, which travels in a file.
_SET_UP = f"mkdir -p {_FOLDER} && tar -xzf {_ARCHIVE} -C {_FOLDER} && sh {_FOLDER}/launch/worker_setup.sh"
_RUN = f"cd {_FOLDER} && Q8JAX_MULTIHOST=1 exec .venv/bin/python -m launch.worker {_JOB}"
# Looks for a loss of VMs after ssh has ended, and asks for a state that is not told.
_LOOKS, _ASKS = 10, 20
_FETCHES = 3
_LONGEST_POLL = 3600
_CUT_OFF = 255  # what ssh itself returns
_NOT_THERE = "NOT_FOUND"
_WAITING = ("ACCEPTED", "PROVISIONING", "CREATING", "WAITING_FOR_RESOURCES")


def define_flags() -> None:
    flags.DEFINE_string("name", "", "Of the queued resource and its nodes.")
    flags.DEFINE_string("zone", "", "Where.")
    flags.DEFINE_string("project", "", "Whose.")
    flags.DEFINE_string("tpu", "", "Slice of TPUs.")
    flags.DEFINE_integer("slices", 1, "Of them.", lower_bound=1)
    flags.DEFINE_bool("spot", False, "VMs that may be taken away.")
    flags.DEFINE_multi_string("create", [], "A further flag for queued-resources create.")
    flags.DEFINE_multi_string("collect", [], "Folders to copy back.")
    flags.DEFINE_integer("restarts", 100, "How often to begin again.", lower_bound=0)
    flags.DEFINE_float("poll", 30.0, "Seconds between looks at the queue.", lower_bound=0.0)
    flags.DEFINE_bool("keep", False, "Leave the VMs running.")
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.")


class Resource:
    """A queued resource: the commands about it.

    Attributes:
      nodes: names of its nodes, one for each slice.
      spot: whether it may be taken away.
    """

    def __init__(
        self,
        name: str,
        tpu: Slice,
        *,
        zone: str,
        project: str = "",
        slices: int = 1,
        spot: bool = False,
        further: Sequence[str] = (),
    ):
        self._name, self._tpu, self._slices = name, tpu, slices
        self._where = [f"--zone={zone}", *([f"--project={project}"] if project else [])]
        self._asked = [*(["--spot"] if spot else []), *further]
        self.spot = spot
        self.nodes = [name] if slices == 1 else [f"{name}-{index}" for index in range(slices)]

    def create(self) -> Command:
        if self._slices == 1:
            nodes = [f"--node-id={self._name}"]
        else:
            nodes = [f"--node-count={self._slices}", f"--node-prefix={self._name}"]
        kind = [
            f"--type={self._tpu.generation.type}",
            f"--topology={self._tpu.topology}",
            f"--runtime-version={self._tpu.generation.runtime}",
        ]
        return self._queue("create", *nodes, *kind, *self._asked)

    def describe(self) -> Command:
        """Prints its state and nothing else."""
        return self._queue("describe", "--format=value(state.state)")

    def delete(self) -> Command:
        return self._queue("delete", "--force", "--quiet")

    def send(self, node: str, file: str) -> Command:
        """Copies the archive to the home of every worker of a node."""
        return self._vm("scp", file, f"{node}:{_ARCHIVE}", "--worker=all")

    def ssh(self, node: str, text: str) -> Command:
        """Runs a line of shell on every worker of a node, all at once."""
        return self._vm("ssh", node, "--worker=all", "--batch-size=all", f"--command={text}")

    def fetch(self, node: str, folder: str) -> Command:
        """Copies a folder of the checkout on the first worker to this directory."""
        return self._vm("scp", "--recurse", f"{node}:{_FOLDER}/{folder}", ".", "--worker=0")

    def _queue(self, verb: str, *flags: str) -> Command:
        return Command(("gcloud", "compute", "tpus", "queued-resources", verb, self._name, *self._where, *flags))

    def _vm(self, verb: str, *words: str) -> Command:
        return Command(("gcloud", "compute", "tpus", "tpu-vm", verb, *words, *self._where))


class Session:
    """What a command does with a resource, from creating it to giving it back.

    Args:
      resource: where.
      archive: of the checkout and the command.
      collect: folders to copy back.
      poll: seconds between looks at the queue.
      keep: whether the resource outlives the session, and may be there already; else only what the session created
        is deleted.
      dry_run: whether to print instead.
    """

    def __init__(
        self, resource: Resource, archive: str, *, collect: Sequence[str], poll: float, keep: bool, dry_run: bool
    ):
        self._resource, self._archive, self._collect = resource, archive, collect
        self._poll, self._keep, self._dry_run = poll, keep, dry_run
        self._is_own = False

    def run(self, restarts: int) -> int:
        """Runs the command to its end, through so many losses of the VMs; returns its exit code.

        Raises:
          LaunchError: a step before or after it does not succeed.
        """
        try:
            for _ in range(restarts + 1):
                self._enter()
                failure: LaunchError | None = None
                code = 0
                try:
                    code = self._attempt()
                except LaunchError as error:
                    failure = error
                if not (code or failure) or not self._were_taken(code):
                    break
                print("launch: the VMs were taken away: asking for them again", flush=True)
                self._delete()
            else:
                raise LaunchError(f"--restarts={restarts} were not enough: raise it, or leave out --spot")
            if failure:
                raise failure
            if code == _CUT_OFF:
                self._is_own = False
                raise LaunchError(
                    "the connection to the VMs broke off, which are there and may go on: look there, then give the "
                    f"same command with --keep to run it again, or end them by {self._resource.delete()}"
                )
            for folder in self._collect:
                self._fetch(folder)
            return code
        finally:
            if self._is_own and not self._keep:
                self._delete()

    def _fetch(self, folder: str) -> None:
        """Copies a folder back; where that fails, the VMs are left, which have all that there is of it."""
        fetch = self._resource.fetch(self._resource.nodes[0], folder)
        for attempt in range(_FETCHES):
            if attempt:
                time.sleep(self._poll)
            with contextlib.suppress(LaunchError):
                return self._do(fetch)
        self._is_own = False
        raise LaunchError(
            f"--collect={folder} fails, so the VMs are left and cost: copy it by {fetch}, and then end them by "
            f"{self._resource.delete()}"
        )

    def _delete(self) -> None:
        self._do(self._resource.delete())
        self._is_own = False

    def _enter(self) -> None:
        """Waits until the VMs are there."""
        if self._state() is None:
            try:
                self._do(self._resource.create())
            except LaunchError:
                self._is_own = self._state() is not None
                raise
            except KeyboardInterrupt:
                self._is_own = True
                raise
            self._is_own = True
        elif not self._keep:
            raise LaunchError("there is a queued resource of that --name: give another, or --keep to use it")
        while (state := self._state()) in _WAITING:
            time.sleep(self._poll)
        if state != "ACTIVE":
            raise LaunchError(f"the queued resource is {state or 'gone'} instead of active: ask for it again")

    def _attempt(self) -> int:
        """Sets the nodes up and runs the command on all at once; the exit code of the first that failed."""
        for node in self._resource.nodes:
            self._do(self._resource.send(node, self._archive))
            self._do(self._resource.ssh(node, _SET_UP))
        commands_ = [self._resource.ssh(node, _RUN) for node in self._resource.nodes]
        if self._dry_run:
            for command in commands_:
                print(command)
            return 0
        started = [subprocess.Popen(command.argv, stdin=subprocess.DEVNULL) for command in commands_]
        return next((code for code in [process.wait() for process in started] if code), 0)

    def _were_taken(self, code: int) -> bool:
        """Whether the VMs are no longer there, which may be told late.

        When one VM goes, JAX ends the programs on the others, so that a program seems to have ended by itself.
        """
        looks = 1 if 0 < code < _CUT_OFF and not self._resource.spot else _LOOKS
        for look in range(looks):
            if look:
                time.sleep(self._poll)
            if self._state() != "ACTIVE":
                return True
        return False

    def _state(self) -> str | None:
        """Of the queued resource; None where there is none, as a dry run has it until it has created one.

        Raises:
          LaunchError: nobody says so, however often they are asked.
        """
        if self._dry_run:
            print(self._resource.describe())
            return "ACTIVE" if self._is_own else None
        said = ""
        for ask in range(_ASKS):
            if ask:
                time.sleep(self._poll)
            done = commands.ask(self._resource.describe())
            if done.returncode == 0:
                return done.stdout.strip() or None
            if _NOT_THERE in done.stderr:
                return None
            said = (done.stderr.strip().splitlines() or [""])[-1]
        raise LaunchError(f"{self._resource.describe()} fails ({said}): mend that, and look whether there are VMs")

    def _do(self, command: Command) -> None:
        if self._dry_run:
            print(command)
        else:
            commands.run(command)


def pack(archive: Path, command: Sequence[str]) -> None:
    """Writes the checkout and a command into an archive.

    Raises:
      LaunchError: it cannot be written.
    """
    job = json.dumps(list(command)).encode()
    entry = tarfile.TarInfo(_JOB)
    entry.size = len(job)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:gz") as tar:
            tar.addfile(entry, io.BytesIO(job))
            for name in _SHIPPED:
                tar.add(_ROOT / name, name, filter=lambda entry: None if entry.name.endswith("__pycache__") else entry)
    except OSError as error:
        raise LaunchError(f"{archive} cannot be written ({error.strerror}): make room for it") from error


def _checked(command: Sequence[str]) -> Resource:
    if not command:
        raise LaunchError("no command is given: write it after --, as in -- python -m experiments.pretrain")
    if not re.fullmatch(_NAME, FLAGS.name):
        raise LaunchError(
            f"--name={FLAGS.name} must be at most 60 small letters, digits and hyphens, and begin with a letter"
        )
    if not FLAGS.zone:
        raise LaunchError("--zone= is needed: give one that has these TPUs")
    tpu = Slice.parse(FLAGS.tpu)
    if tpu.generation.type is None:
        raise LaunchError(f"--tpu={FLAGS.tpu} is to be had on GKE alone: use launch.gke")
    for folder in FLAGS.collect:
        if folder.startswith(("/", "-")) or ".." in Path(folder).parts or not re.fullmatch(r"[\w./-]+", folder):
            raise LaunchError(
                f"--collect={folder} must be a folder within the checkout, of letters, digits, . / _ and -"
            )
    commands.check_options("create", FLAGS.create)
    if not FLAGS.poll <= _LONGEST_POLL:
        raise LaunchError(f"--poll={FLAGS.poll} must be seconds, at most {_LONGEST_POLL}")
    options = {"project": FLAGS.project, "slices": FLAGS.slices, "spot": FLAGS.spot, "further": FLAGS.create}
    return Resource(FLAGS.name, tpu, zone=FLAGS.zone, **options)


def main(argv: list[str]) -> int:
    """Does what the flags say; returns the exit code."""
    command = argv[1:]
    # Whatever ends this program, VMs are not left behind; what nohup has it ignore does not end it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        resource = _checked(command)
        options = {"collect": FLAGS.collect, "poll": FLAGS.poll, "keep": FLAGS.keep, "dry_run": FLAGS.dry_run}
        # The same at every start, so that a dry run can tell it.
        whose = quote(f"{FLAGS.name}.{FLAGS.zone}.{FLAGS.project}", safe="")
        archive = Path(f"~/.cache/q8jax/tpu_vm/{whose}.tar.gz").expanduser()
        session = Session(resource, str(archive), **options)
        if FLAGS.dry_run:
            print(f"# {archive} holds {', '.join(_SHIPPED)} and, in {_JOB}, the command {json.dumps(command)}")
            return session.run(FLAGS.restarts)
        pack(archive, command)
        try:
            return session.run(FLAGS.restarts)
        finally:
            archive.unlink(missing_ok=True)
    except LaunchError as error:
        return commands.refuse(error)
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=commands.parse)
