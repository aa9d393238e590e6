"""JobSets for GKE: what kubectl is called with, and whether the API would take it."""

import functools
import json
import operator
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from launch_site import HOSTILE, Site, shown

from launch import commands, gke
from launch.tpus import Slice

OF = ("--name=q8", "--image=i", "--tpu=v5e:4x4")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_gke_applies_what_the_dry_run_shows(site):
    flags = (
        "--name=q8",
        "--image=image",
        "--tpu=v5p:4x4x4",
        "--slices=2",
        "--spot",
        "--claim=runs:/runs",
        "--namespace=x",
    )
    dry, done = site.run("gke", *flags, "--dry_run", "--", *HOSTILE), site.run("gke", *flags, "--", *HOSTILE)
    assert dry.returncode == done.returncode == 0
    (call,) = site.calls
    manifest = json.loads((site.folder / "stdin").read_text())
    assert shown(dry)[0] == [call] == [["kubectl", "apply", "--namespace=x", "--filename=-"]]
    assert json.loads(shown(dry)[1]) == manifest
    (job,) = manifest["spec"]["replicatedJobs"]
    own = job["template"]["spec"]
    pod = own["template"]["spec"]
    assert (job["replicas"], own["parallelism"], own["completions"]) == (2, 16, 16)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert [word.replace("$$", "$") for word in container["command"]] == HOSTILE
    assert not any("$(" in word.replace("$$", "") for word in container["command"])


def test_on_gpus_the_manifest_says_where_the_first_process_is():
    made = gke.manifest(["x"], name="q8", image="i", gpu=("nvidia-h100-80gb", 8), nodes=3)
    (job,) = made["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    # JobSet names pods SET-JOB-INDEX-INDEX, in a domain named like the set.
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == "q8-workers-0-0.q8:8476"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "3" and job["template"]["spec"]["completions"] == 3
    assert "job-completion-index" in environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def listed_once(validator, keys, items, schema):
    found = [tuple(item.get(key) for key in keys) for item in items]
    if len(set(found)) < len(found):
        yield jsonschema.ValidationError(f"two of the same {keys} in {found}")


JobSet = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"x-kubernetes-list-map-keys": listed_once})(
    json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
)
FULL = {"gpu": ("nvidia-h100-80gb", 8), "nodes": 3, "claims": [("a", "/b"), ("a.b", "/c")], "spot": True, "queue": "q"}


@pytest.mark.parametrize(
    "options",
    [FULL, {**FULL, "claims": [], "queue": ""}, *({"tpu": Slice.parse(tpu)} for tpu in ("v6e:1x1", "tpu7x:8x16x16"))],
)
def test_manifests_are_those_of_a_jobset(options):
    JobSet.validate(gke.manifest(HOSTILE, name="n" * 40, image="a.b:5/c/d:e", **options))


POD = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
        (("metadata", "name"), "Q_8"),
        (("metadata", "labels", "kueue.x-k8s.io/queue-name"), 'a b;"c'),
        (("spec", "failurePolicy", "maxRestarts"), "100"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "name"), None),
        (("spec", "replicatedJobs", 0, "replicas"), -1),
        ((*POD[:5], "completionMode"), "indexed"),
        ((*POD[:5], "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [0]),
        ((*POD, "restartPolicy"), "OnFailure"),
        ((*POD, "nodeselector"), {}),
        ((*POD, "nodeSelector", "cloud.google.com/gke-spot"), True),
        ((*POD, "volumes", 1, "name"), "claim-0"),
        ((*POD, "containers"), []),
        ((*CONTAINER, "image"), " "),
        ((*CONTAINER, "command", 0), 1),
        ((*CONTAINER, "env", 0, "name"), "1 A"),
        ((*CONTAINER, "env", 0, "value"), 1),
        ((*CONTAINER, "resources", "limits", "nvidia.com/gpu"), "8 GPUs"),
        ((*CONTAINER, "volumeMounts", 1, "mountPath"), "/b"),
        ((*CONTAINER, "volumeMounts", 1, "mountPath"), None),
    ],
)
def test_other_manifests_are_not(place, value):
    made = json.loads(json.dumps(gke.manifest(["x"], name="n", image="i", **FULL)))
    JobSet.validate(made)
    around = functools.reduce(operator.getitem, place[:-1], made)
    if value is None:
        del around[place[-1]]
    else:
        around[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        JobSet.validate(made)


def test_what_comes_out_the_same_every_time_is_not_started_again():
    spec = gke.manifest(["x"], name="n", image="i", **FULL)["spec"]
    (of_pods,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    (of_jobs,) = spec["failurePolicy"]["rules"]
    assert (of_pods["action"], of_jobs["action"]) == ("FailJob", "FailJobSet")
    assert of_jobs["onJobFailureReasons"] == ["PodFailurePolicy"]
    mistyped = subprocess.run([sys.executable, "-m", "experiments.pretrain", "--stepz=1"], capture_output=True)
    named = "from experiments import pretrain; print(pretrain.DIVERGED, pretrain.STOPPED)"
    diverged, stopped = map(int, subprocess.check_output([sys.executable, "-c", named]).split())
    assert of_pods["onExitCodes"]["values"] == [mistyped.returncode, diverged]
    assert stopped not in (mistyped.returncode, diverged)


@pytest.mark.parametrize("tpu", ["v5e:16x16", "v6e:2x4", "v4:12x16x16", "v5p:16x16x24", "v5p:2x2x1", "tpu7x:4x4x4"])
def test_topologies_that_there_are(tpu):
    assert Slice.parse(tpu).hosts * Slice.parse(tpu).chips_per_host == Slice.parse(tpu).chips


@pytest.mark.parametrize(
    "tpu", ["v5e:999x4", "v5e:4x2", "v6e:16x32", "v5e:4", "v5p:4x4", "v5p:4x4x2", "v5p:16x16x28", "v4:8x4x4", "v4:"]
)
def test_topologies_that_there_are_not(tpu):
    with pytest.raises(
        commands.LaunchError, match=f"--tpu={tpu} is no topology of {tpu.partition(':')[0]}, which has [12]x"
    ):
        Slice.parse(tpu)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--name=q8", "--image=i", "--tpu=v5e:4x4"), "no command is given"),
        (("--name=Q_8", "--image=i", "--tpu=v5e:4x4", "--", "x"), "--name=Q_8 must be"),
        (("--name=q8", "--tpu=v5e:4x4", "--", "x"), "--image= is needed"),
        (("--name=q8", "--image=i", "--", "x"), "give one of --tpu= and --gpu="),
        (("--name=q8", "--image=i", "--tpu=v5q:4x4", "--", "x"), "--tpu=v5q:4x4 must begin with one of v4, "),
        (("--name=q8", "--image=i", "--tpu=v5e:999x4", "--", "x"), "--tpu=v5e:999x4 is no topology of v5e"),
        ((*OF, '--queue=a b;"c', "--", "x"), '--queue=a b;"c must be at most 63'),
        ((*OF, "--namespace=-x", "--", "x"), "--namespace=-x must be at most 63"),
        *(
            ((*OF, f"--image={image}", "--", "x"), f"--image={image} must be the name of an image")
            for image in (" ", "a b", "A", "a:b:c", "-a", "a/", "a@sha256:0")
        ),
        ((*OF, "--claim=a:/b", "--claim=c:/b", "--", "x"), "--claim=c:/b is mounted where a is"),
        ((*OF, "--claim=a:/b/../c:d", "--", "x"), "--claim=a:/b/../c:d must be"),
        ((*OF, "--claim=A b:/c", "--", "x"), "--claim=A b:/c must be"),
        ((*OF[:2], "--gpu=a b:8", "--", "x"), "--gpu=a b:8 must be an accelerator's label"),
        (("--name=q8", "--image=i", "--gpu=h100", "--", "x"), "--gpu=h100 must be an accelerator's label"),
        (("--name=q8", "--image=i", "--gpu=h:8", "--claim=x", "--", "x"), "--claim=x must be"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_before_anything_runs(site, arguments, sentence):
    site.refuses("gke", arguments, sentence)
