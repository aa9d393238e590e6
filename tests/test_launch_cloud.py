"""Launchers of sites, against programs on the PATH that record what they were called with."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from launch_site import HOSTILE, Site, shown

from launch import commands, tpu_vm

GKE = ("--name=q8", "--image=i", "--tpu=v5e:4x4")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


# Slurm

SLURM = ("--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--job_name=a b;c", "--sbatch=--partition=g p")


def test_slurm_submits_what_the_dry_run_shows_with_every_word_intact(site):
    dry, done = site.run("slurm", *SLURM, "--dry_run", "--", *HOSTILE), site.run("slurm", *SLURM, "--", *HOSTILE)
    assert dry.returncode == done.returncode == 0
    (call,) = site.calls
    assert shown(dry)[0] == [call]
    script = call.index(str(commands.__file__).replace("commands.py", "slurm_job.sh"))
    assert call[:script] == [
        *("sbatch", "--job-name=a b;c", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00"),
        *("--requeue", "--open-mode=append", "--signal=TERM@300", "--partition=g p"),
    ]
    assert call[script + 1 :] == HOSTILE


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_the_job_starts_all_tasks_and_requeues_a_run_that_was_stopped(site, code, requeued):
    site.answer(**{"kill__on__bad__exit": [[code, ""]]})
    environment = {**site.environment, "SLURM_JOB_ID": "17"}
    done = subprocess.run([tpu_vm._ROOT / "launch/slurm_job.sh", *HOSTILE], env=environment)
    assert done.returncode == code
    first, *rest = site.calls
    assert first == ["srun", "--kill-on-bad-exit=0", "--wait=110", "--", *HOSTILE]
    assert rest == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_an_array_has_a_task_for_each_command(site, tmp_path):
    file = tmp_path / "my commands.txt"
    tasks = ["echo", "first"], [sys.executable, "-c", "import sys; print(sys.argv)", *HOSTILE]
    file.write_text("\n\n".join(map(shlex.join, tasks)))
    assert site.run("slurm", f"--array={file}", "--at_most=1", "--gpus_per_node=1").returncode == 0
    (call,) = site.calls
    assert "--array=0-1%1" in call and call[-4:] == ["python", "-m", "launch.task", str(file)]
    site.environment["SLURM_ARRAY_TASK_ID"] = "1"
    assert site.run("task", str(file)).stdout == f"{['-c', *HOSTILE]}\n"
    site.environment["SLURM_ARRAY_TASK_ID"] = "2"
    assert "not '2'" in site.run("task", str(file)).stderr


# TPU VMs

TPU = ("--name=q8", "--zone=z", "--tpu=v5e:4x4", "--poll=0")
QUEUE, VM = ["gcloud", "compute", "tpus", "queued-resources"], ["gcloud", "compute", "tpus", "tpu-vm"]


def verbs(calls):
    return [call[4] for call in calls]


def test_a_run_on_tpu_vms_from_asking_to_giving_back(site):
    site.answer(describe=[[1, "NOT_FOUND"], [0, "WAITING_FOR_RESOURCES"], [0, "PROVISIONING"], [0, "ACTIVE"]])
    flags = (*TPU, "--project=p q", "--spot", "--collect=runs", "--create=--labels=a=b c")
    done = site.run("tpu_vm", *flags, "--", *HOSTILE)
    assert done.returncode == 0, done.stderr
    where = ["--zone=z", "--project=p q"]
    calls = [call for call, _ in itertools.groupby(site.calls)]  # it asks for the state until all is there
    describe, create, again, send, set_up, run, fetch, delete = calls
    assert describe == again == [*QUEUE, "describe", "q8", *where, "--format=value(state.state)"]
    assert create == [
        *(*QUEUE, "create", "q8", *where, "--node-id=q8", "--type=v5litepod", "--topology=4x4"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--labels=a=b c"),
    ]
    archive = site.folder / ".cache/q8jax/tpu_vm/q8.z.p%20q.tar.gz"
    assert send == [*VM, "scp", str(archive), "q8:q8jax.tar.gz", "--worker=all", *where] and not archive.exists()
    for call, text in ((set_up, tpu_vm._SET_UP), (run, tpu_vm._RUN)):
        assert call == [*VM, "ssh", "q8", "--worker=all", "--batch-size=all", f"--command={text}", *where]
    assert fetch == [*VM, "scp", "--recurse", "q8:q8jax/runs", ".", "--worker=0", *where]
    assert delete == [*QUEUE, "delete", "q8", *where, "--force", "--quiet"]
    dry = site.run("tpu_vm", *flags, "--dry_run", "--", *HOSTILE)
    assert shown(dry)[0] == calls
    assert f"# {archive} holds" in dry.stdout and json.dumps(HOSTILE) in dry.stdout


# A program that ended by itself, one that JAX ended because another VM had gone, and a connection that broke off; the
# last two before anybody said why.
@pytest.mark.parametrize(("code", "late"), [(1, 0), (1, 3), (134, 3), (255, 0), (255, 3)])
def test_vms_that_are_taken_away_are_asked_for_again(site, code, late):
    states = ["ACTIVE", *["ACTIVE"] * late, "SUSPENDED", "NOT_FOUND", "ACTIVE"]
    site.answer(
        describe=[[1, "NOT_FOUND"], *([1 if state == "NOT_FOUND" else 0, state] for state in states)],
        launch=[[0, ""], [code, ""]],
    )
    done = site.run("tpu_vm", *TPU, "--spot", "--", "x")
    assert done.returncode == 0, done.stderr
    done_verbs = [verb for verb in verbs(site.calls) if verb != "describe"]
    once = ["create", "scp", "ssh", "ssh", "delete"]
    assert done_verbs == once * 2 and "taken away" in done.stdout


def test_a_run_that_fails_on_vms_that_are_there_is_not_repeated(site):
    answers = {"describe": [[1, "NOT_FOUND"], *[[0, "ACTIVE"]] * 20], "launch": [[0, ""], [3, ""]]}
    # VMs that nobody takes away are looked at once, before they are paid for any longer.
    for flags, looks in (((), 1), (("--spot",), tpu_vm._LOOKS)):
        (site.folder / "calls.jsonl").unlink(missing_ok=True)
        site.answer(**answers)
        done = site.run("tpu_vm", *TPU, *flags, "--collect=runs", "--", "x")
        called = verbs(site.calls)
        assert done.returncode == 3 and called[-2:] == ["scp", "delete"] and called.count("create") == 1
        assert called.count("describe") == 2 + looks


@pytest.mark.parametrize("failures", [2, 3])
def test_vms_with_the_only_copy_of_a_folder_are_kept(site, failures):
    site.answer(describe=[[1, "NOT_FOUND"], [0, "ACTIVE"]], recurse=[[1, ""]] * failures)
    done = site.run("tpu_vm", *TPU, "--collect=a", "--collect=b", "--", "x")
    if failures < tpu_vm._FETCHES:
        assert done.returncode == 0 and verbs(site.calls)[-5:] == ["scp"] * 4 + ["delete"]
    else:
        assert done.returncode == 1 and "delete" not in verbs(site.calls)
        assert "--collect=a fails, so the VMs are left" in done.stderr
        assert done.stderr.endswith(" by gcloud compute tpus queued-resources delete q8 --zone=z --force --quiet\n")


def test_vms_that_are_there_when_the_connection_breaks_off_are_left(site):
    site.answer(describe=[[1, "NOT_FOUND"], *[[0, "ACTIVE"]] * 20], launch=[[0, ""], [255, ""]])
    done = site.run("tpu_vm", *TPU, "--", "x")
    assert done.returncode == 1 and "delete" not in verbs(site.calls)
    assert "with --keep to run it again, or end them by gcloud compute tpus queued-resources delete q8" in done.stderr


def test_a_state_that_is_not_told_is_asked_for_again(site):
    hiccup = [1, "ERROR: (gcloud) Connection reset"]
    site.answer(describe=[hiccup, [1, "NOT_FOUND"], [0, "ACCEPTED"], hiccup, hiccup, [0, "ACTIVE"]])
    assert site.run("tpu_vm", *TPU, "--", "x").returncode == 0
    assert verbs(site.calls).count("create") == 1
    site.answer(describe=[hiccup] * 30)
    done = site.run("tpu_vm", *TPU, "--", "x")
    assert done.returncode == 1 and "fails (ERROR: (gcloud) Connection reset): mend that" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_whatever_ends_the_launcher_the_vms_are_given_back(site, number):
    site.answer(describe=[[1, "NOT_FOUND"], *[[0, "ACCEPTED"]] * 100])
    command = [sys.executable, "-m", "launch.tpu_vm", *TPU[:-1], "--poll=0.2", "--", "x"]
    # What tests inherit from a shell that put them into the background, a child would inherit, too.
    former = signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(command, env=site.environment, stderr=subprocess.DEVNULL)
    signal.signal(number, former)
    while verbs(site.calls).count("describe") < 3:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130 and verbs(site.calls)[-1] == "delete"


def test_under_nohup_a_closed_terminal_does_not_end_the_launcher(site):
    site.answer(describe=[[1, "NOT_FOUND"], *[[0, "ACCEPTED"]] * 9, [0, "ACTIVE"]])
    command = [sys.executable, "-m", "launch.tpu_vm", *TPU[:-1], "--poll=0.2", "--", "x"]
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = subprocess.Popen(command, env=site.environment, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGHUP, former)
    while verbs(site.calls).count("describe") < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and "ssh" in verbs(site.calls)


def test_what_somebody_else_asked_for_is_neither_used_nor_deleted(site):
    site.answer(describe=[[0, "ACTIVE"]])
    done = site.run("tpu_vm", *TPU, "--", "x")
    assert done.returncode == 1 and "give another, or --keep" in done.stderr and verbs(site.calls) == ["describe"]
    site.answer(describe=[[0, "ACTIVE"], [0, "ACTIVE"]])
    assert site.run("tpu_vm", *TPU, "--keep", "--", "x").returncode == 0
    assert not {"create", "delete"} & set(verbs(site.calls))


def test_slices_run_at_once_on_nodes_of_their_own(site):
    site.answer(describe=[[1, "NOT_FOUND"], [0, "ACTIVE"]])
    assert site.run("tpu_vm", *TPU, "--slices=2", "--", "x").returncode == 0
    create = next(call for call in site.calls if call[4] == "create")
    assert {"--node-count=2", "--node-prefix=q8"} < set(create)
    assert [call[5] for call in site.calls if call[4] == "ssh"] in (
        ["q8-0", "q8-1", *order] for order in (["q8-0", "q8-1"], ["q8-1", "q8-0"])
    )


def test_the_archive_holds_the_checkout_and_the_command(tmp_path, monkeypatch):
    archive = tmp_path / "a.tar.gz"
    tpu_vm.pack(archive, [sys.executable, "-c", "import sys; print(sys.argv)", *HOSTILE])
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "home", filter="data")
    home = tmp_path / "home"
    assert (home / "q8jax/nnx/__init__.py").exists() and (home / "pyproject.toml").exists()
    assert not list(home.rglob("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "launch.worker", "launch/job.json"], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"{['-c', *HOSTILE]}\n"


def test_an_archive_that_cannot_be_written_is_named_before_anything_runs(site):
    (site.folder / ".cache").write_text("")
    done = site.run("tpu_vm", *TPU, "--", "x")
    sentence = f"launch: {site.folder}/.cache/q8jax/tpu_vm/q8.z..tar.gz cannot be written (Not a directory)"
    assert done.returncode == 1 and done.stderr.startswith(sentence) and not site.calls


def test_a_worker_starts_again_what_was_told_to_stop(tmp_path):
    count = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); n = p.exists() and len(p.read_text()); "
    count += "p.write_text('x' * (n + 1)); sys.exit(75 if n < 2 else 5)"
    job = tmp_path / "job.json"
    job.write_text(json.dumps(["python", "-c", count, str(tmp_path / "n")]))
    assert subprocess.run([sys.executable, "-m", "launch.worker", job]).returncode == 5
    assert (tmp_path / "n").read_text() == "xxx"


# What is wrong


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("slurm", (), "give either a command after -- or a file of them by --array="),
        ("slurm", ("--array=/no/such",), "--array=/no/such cannot be read (No such file or directory)"),
        ("slurm", ("--at_most=2", "--", "x"), "--at_most=2 is of an array"),
        ("slurm", ("--sbatch=foo", "--", "x"), "--sbatch=foo is no option: write it with its hyphens"),
        ("tpu_vm", (*TPU, "--create=foo", "--", "x"), "--create=foo is no option: write it with its hyphens"),
        ("tpu_vm", (*TPU[:3], "--poll=nan", "--", "x"), "--poll=nan must be seconds, at most 3600"),
        ("tpu_vm", ("--name=q8", "--tpu=v5e:4x4", "--", "x"), "--zone= is needed"),
        ("tpu_vm", (*TPU[:2], "--tpu=tpu7x:2x2x1", "--", "x"), "to be had on GKE alone"),
        ("tpu_vm", (*TPU, "--collect=../x", "--", "x"), "--collect=../x must be a folder within"),
        ("task", (), "give one file of commands"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_before_anything_runs(site, module, arguments, sentence):
    site.refuses(module, arguments, sentence)


def test_a_program_that_is_not_there_is_named(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    for module, flags in (("slurm", ()), ("gke", GKE)):
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{module}", *flags, "--", "x"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "cannot be run (No such file or directory): install it" in done.stderr


def test_a_program_on_a_worker_that_is_not_there_is_named(tmp_path):
    job = tmp_path / "job.json"
    job.write_text('["/no/such", "x"]')
    done = subprocess.run([sys.executable, "-m", "launch.worker", job], capture_output=True, text=True)
    assert done.returncode == 127
    assert done.stderr == "worker: /no/such cannot be run (No such file or directory): give a program after --\n"


# More than a pipe holds, of which nobody reads anything.
@pytest.mark.parametrize(("module", "flags"), [("gke", GKE), ("tpu_vm", TPU), ("slurm", ()), ("local", ())])
def test_who_reads_a_dry_run_may_stop_reading(site, module, flags):
    command = [sys.executable, "-m", f"launch.{module}", *flags, "--dry_run", "--", "x" * 100_000]
    with subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
