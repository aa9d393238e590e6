"""Runs a command on GKE as a JobSet: on slices of TPUs, or on nodes with GPUs.

    python -m launch.gke --name=q8 --image=IMAGE --tpu=v5p:4x4x4 --slices=2 -- python -m experiments.pretrain
    python -m launch.gke --name=q8 --image=IMAGE --gpu=nvidia-h100-80gb:8 --nodes=4 -- python -m experiments.pretrain

hands `kubectl apply` a manifest. Every host runs the command once; on TPUs GKE tells the processes of each other, on
GPUs the manifest does. A pod that is evicted gets SIGTERM, the run saves and ends, and the JobSet starts all of it
again. It does not where a flag did not parse, or the loss was not finite.

    --name=NAME           of the JobSet
    --image=IMAGE         that holds the project, as launch/Dockerfile makes it
    --tpu=KIND:TOPOLOGY   v4, v5e, v5p, v6e or tpu7x, as in v5e:4x4
    --slices=N            of them (default: 1)
    --gpu=KIND:N          accelerator label and GPUs of a node, instead of --tpu
    --nodes=N             of them (default: 1)
    --restarts=N          after which a run that does not succeed is given up (default: 100)
    --spot                on nodes that may be taken away
    --queue=NAME          Kueue's local queue (default: none)
    --claim=CLAIM:PATH    mounts a persistent volume claim, for data, or for a --workdir that is not gs://BUCKET/FOLDER;
                          may be repeated
    --namespace=NAME      (default: that of kubectl's context)
    --dry_run             print what would run, and stop
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from launch import commands
from launch.tpus import Slice

FLAGS = flags.FLAGS
_CONTAINER = "q8jax"
# What comes out the same however often it is tried: flags that do not parse, and a loss that is not finite.
_FINAL_CODES = [2, 4]
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_PART = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
# https://github.com/distribution/reference
_IMAGE = rf"([A-Za-z0-9.-]+(:[0-9]+)?/)?{_PART}(/{_PART})*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[0-9a-f]{{64}})?"
_JOB = "workers"
_PORT = 8476
_GRACE_SECONDS = 300


def define_flags() -> None:
    flags.DEFINE_string("name", "", "Of the JobSet.")
    flags.DEFINE_string("image", "", "That holds the project.")
    flags.DEFINE_string("tpu", "", "Slice of TPUs.")
    flags.DEFINE_integer("slices", 1, "Of them.", lower_bound=1)
    flags.DEFINE_string("gpu", "", "Accelerator label and GPUs of a node.")
    flags.DEFINE_integer("nodes", 1, "Of them.", lower_bound=1)
    flags.DEFINE_integer("restarts", 100, "After which a run is given up.", lower_bound=0)
    flags.DEFINE_bool("spot", False, "On nodes that may be taken away.")
    flags.DEFINE_string("queue", "", "Kueue's local queue.")
    flags.DEFINE_multi_string("claim", [], "A persistent volume claim and where to mount it.")
    flags.DEFINE_string("namespace", "", "Of the JobSet.")
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.")


def manifest(
    command: Sequence[str],
    *,
    name: str,
    image: str,
    tpu: Slice | None = None,
    slices: int = 1,
    gpu: tuple[str, int] | None = None,
    nodes: int = 1,
    restarts: int = 100,
    spot: bool = False,
    queue: str = "",
    claims: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) that runs a command once on each host.

    Args:
      command: program and arguments; they arrive as they are.
      name: of the JobSet.
      image: of the container.
      tpu, slices: slices of TPUs, or
      gpu, nodes: the label of an accelerator with how many a node has, and nodes of it.
      restarts: after which it has failed.
      spot: whether nodes may be taken away.
      queue: Kueue's, '' for none.
      claims: persistent volume claims with where they are mounted.
    """
    if tpu is not None:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": tpu.generation.gke,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        }
        limits, hosts, replicas = {"google.com/tpu": tpu.chips_per_host}, tpu.hosts, slices
        environment: list[dict[str, Any]] = []
    else:
        assert gpu is not None
        selector, limits, hosts, replicas = (
            {"cloud.google.com/gke-accelerator": gpu[0]},
            {"nvidia.com/gpu": gpu[1]},
            nodes,
            1,
        )
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{_JOB}-0-0.{name}:{_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": _CONTAINER,
        "image": image,
        # Kubernetes puts variables in the place of $(NAME), and takes $$ for $.
        "command": [word.replace("$", "$$") for word in command],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, *environment],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": f"claim-{i}", "mountPath": path} for i, (_, path) in enumerate(claims)],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, (claim, _) in enumerate(claims)
        ],
    }
    final = {"containerName": _CONTAINER, "operator": "In", "values": _FINAL_CODES}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {"spec": pod},
    }
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    # Each slice is a node pool of its own, and takes one job whole.
    topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if tpu else {}
    give_up = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "labels": labels, "annotations": topology},
        "spec": {
            "failurePolicy": {"maxRestarts": restarts, "rules": [give_up]},
            "replicatedJobs": [{"name": _JOB, "replicas": replicas, "template": {"spec": job}}],
        },
    }


def _gpu(text: str) -> tuple[str, int]:
    label, _, count = text.rpartition(":")
    if not re.fullmatch(_LABEL, label) or not re.fullmatch("[1-9][0-9]?", count):
        raise commands.LaunchError(
            f"--gpu={text} must be an accelerator's label and how many, as in nvidia-h100-80gb:8"
        )
    return label, int(count)


def _claims(given: Sequence[str]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for text in given:
        claim, _, path = text.partition(":")
        if not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", claim) or not re.fullmatch(r"(/[^/:]+)+", path):
            raise commands.LaunchError(f"--claim={text} must be a claim and an absolute path, as in runs:/runs")
        if path in found:
            raise commands.LaunchError(f"--claim={text} is mounted where {found[path]} is: give it a path of its own")
        found[path] = claim
    return [(claim, path) for path, claim in found.items()]


def application(command: Sequence[str]) -> commands.Command:
    """The `kubectl` that the flags ask for.

    Raises:
      LaunchError: what is wrong with them.
    """
    if not command:
        raise commands.LaunchError("no command is given: write it after --, as in -- python -m experiments.pretrain")
    if not FLAGS.image:
        raise commands.LaunchError("--image= is needed: give the image that launch/Dockerfile made")
    for flag, pattern, form in (
        ("name", "[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "at most 40 small letters, digits and hyphens, a letter first"),
        ("image", _IMAGE, "the name of an image, as in REGION-docker.pkg.dev/project/repo/q8jax:tag"),
        ("queue", f"({_LABEL})?", "at most 63 small letters, digits and hyphens"),
        ("namespace", f"({_LABEL})?", "at most 63 small letters, digits and hyphens"),
    ):
        if not re.fullmatch(pattern, given := getattr(FLAGS, flag)):
            raise commands.LaunchError(f"--{flag}={given} must be {form}")
    if bool(FLAGS.tpu) == bool(FLAGS.gpu):
        raise commands.LaunchError("give one of --tpu= and --gpu=")
    if (FLAGS.slices > 1 and FLAGS.gpu) or (FLAGS.nodes > 1 and FLAGS.tpu):
        raise commands.LaunchError("--slices= goes with --tpu=, and --nodes= with --gpu=")
    made = manifest(
        command,
        name=FLAGS.name,
        image=FLAGS.image,
        tpu=Slice.parse(FLAGS.tpu) if FLAGS.tpu else None,
        slices=FLAGS.slices,
        gpu=_gpu(FLAGS.gpu) if FLAGS.gpu else None,
        nodes=FLAGS.nodes,
        restarts=FLAGS.restarts,
        spot=FLAGS.spot,
        queue=FLAGS.queue,
        claims=_claims(FLAGS.claim),
    )
    where = [f"--namespace={FLAGS.namespace}"] if FLAGS.namespace else []
    return commands.Command(("kubectl", "apply", *where, "--filename=-"), json.dumps(made, indent=2))


def main(argv: list[str]) -> int:
    """Applies what the flags say; returns the exit code."""
    try:
        command = application(argv[1:])
    except commands.LaunchError as error:
        return commands.refuse(error)
    return commands.carry_out([command], dry_run=FLAGS.dry_run)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=commands.parse)
