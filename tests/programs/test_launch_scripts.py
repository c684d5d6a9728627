"""The launchers for clusters: linted, valid, and run against commands that only pretend."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from clip_jax.cli import arguments, commands
from clip_jax.prepare.layout import PrepareConfig
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def fields(**known: Any) -> dict[str, Any]:
    """The JSON schema of an object that has no fields but these."""
    return {"type": "object", "properties": known, "additionalProperties": False}


def several(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": one}


# What the files here use of JobSet (v1alpha2) and of KubeRay's RayJob (v1). What has the type
# "object" is Kubernetes' own.
TEXT, NUMBER, OBJECT = ({"type": name} for name in ("string", "integer", "object"))
NAMED, TEMPLATE = fields(name=TEXT, annotations=OBJECT), fields(spec=OBJECT)
RULE = fields(
    action={"const": "FailJobSet"}, onJobFailureReasons=several({"const": "PodFailurePolicy"})
)
JOB_SET = fields(
    failurePolicy=fields(maxRestarts=NUMBER, rules=several(RULE)),
    replicatedJobs=several(fields(name=TEXT, replicas=NUMBER, template=TEMPLATE)),
)
GROUP = fields(
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    template=TEMPLATE,
    rayStartParams={"type": "object", "additionalProperties": TEXT},
)
RAY_JOB = fields(
    entrypoint=TEXT,
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes={"type": "boolean"},
    rayClusterSpec=fields(headGroupSpec=GROUP, workerGroupSpecs=several(GROUP)),
)


def spec_of(name: str, version: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The `spec` of a file, which its schema allows."""
    document = yaml.safe_load((LAUNCH / name).read_text())
    jsonschema.validate(document, fields(apiVersion=TEXT, kind=TEXT, metadata=NAMED, spec=schema))
    assert (document["apiVersion"], document["kind"]) == (version, kind)
    return document["spec"]


def kubernetes(version: str, kind: str, name: str, template: dict[str, Any]) -> dict[str, Any]:
    """What Kubernetes gets of a part, in which it refuses unknown fields."""
    found = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **template}
    kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
    return found


def test_shellcheck_finds_nothing():
    command = ["shellcheck", *LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["gke.yaml", "gke_array.yaml"])
def test_the_yaml_is_what_kubernetes_takes(name):
    jobs = spec_of(name, "jobset.x-k8s.io/v1alpha2", "JobSet", JOB_SET)["replicatedJobs"]
    assert jobs
    for replicated in jobs:
        job = kubernetes("batch/v1", "Job", replicated["name"], replicated["template"])
        rules = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"]]
        assert [rule["values"] for rule in rules] == [[2]]
        containers = job["spec"]["template"]["spec"]["containers"]
        assert [x["containerName"] for x in rules] == [x["name"] for x in containers]


def test_the_ray_job_is_what_kuberay_takes_and_its_command_ours():
    spec = spec_of("ray.yaml", "ray.io/v1", "RayJob", RAY_JOB)
    cluster = spec["rayClusterSpec"]
    assert all(group["groupName"] for group in cluster["workerGroupSpecs"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        kubernetes("v1", "Pod", "x", group["template"])
    program, verb, *rest = spec["entrypoint"].replace("gs://BUCKET", "/tmp").split()
    assert (program, verb) == ("clip-jax", "prepare")
    config, _ = arguments.read(PrepareConfig, rest, ("source", "destination"), commands.prepare)
    assert (config.on, config.joins) == ("ray", True)


def test_no_launcher_says_what_is_trained():
    for path in LAUNCH.iterdir():
        if path.is_file() and path.name != "README.md":
            flags = re.findall(r"--(?:optim|batch-size|steps|model|data)\b", path.read_text())
            assert not flags, path


def run_script(name: str, folder: Path, commands: dict[str, str], *arguments, **environment):
    """Run a script with pretended commands, each of which does what its text says.

    Return the process and the command lines that were called, in order.
    """
    for command, body in commands.items():
        path = folder / command
        path.write_text(f'#!/usr/bin/env bash\necho "{command} $*" >> "$CALLS"\n{body}\n')
        path.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    done = subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env=os.environ | {"PATH": f"{folder}:{PATH}", "CALLS": str(calls)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_leads_ray_on_the_first_node_and_ends_as_the_command_does(tmp_path, code):
    commands = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; SLURM_PROCID=0 "$@"; rm -f "$ended.2"; mv "$ended" "$ended.2"\n'
        'SLURM_PROCID=1 "$@"; cp "$ended.2" "$ended"; exit 137',
        "ray": 'case "$*" in *--block*) cp "$ended.2" "$ended" ;; esac',
        "clip-jax": f"exit {code}",
    }
    done, calls = run_script(
        "ray.sbatch",
        tmp_path,
        commands,
        "prepare",
        "in",
        "out",
        "--shuffle",
        SLURM_JOB_ID="42",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_CPUS_PER_TASK="32",
    )
    assert done.returncode == code
    assert [call for call in calls if call.startswith(("ray ", "clip-jax "))] == [
        "ray start --head --port 6379 --num-cpus 32 --include-dashboard false",
        "clip-jax prepare in out --shuffle --on ray",
        "ray stop",
        "ray start --address node7:6379 --num-cpus 32 --block",
    ]
    assert not (tmp_path / "42.ended").exists()


GCLOUD = r"""
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null || exit 1 ;;
  *"queued-resources create"*) echo ACTIVE > "$STATE" ;;
  *"queued-resources delete"*) rm -f "$STATE" ;;
  *ssh*clip-jax*train*)
    code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"
    if [ "$code" = 137 ]; then echo SUSPENDED > "$STATE"; fi  # preempted
    for one in 0 1; do echo "clip-jax exit code $code"; done ;;
esac
"""
TRAIN = ["train", "configs/vit_l14.py", "--workdir", "gs://b/runs/l14"]


@pytest.mark.parametrize(
    ("codes", "attempts", "created", "ends", "says"),
    [
        ([75, 137, 0], 3, 2, 0, ""),  # of 137, preempted, the slice is created once more
        ([134, 0], 2, 1, 0, ""),
        ([2, 0], 1, 1, 2, "exit code 2 means"),
        ([1, 1, 1, 0], 3, 1, 1, "not started again"),
    ],
    ids=["a bucket silent, preempted", "aborted", "wrong use", "three times at once"],
)
def test_tpu_vm_starts_again_what_may_succeed(codes, attempts, created, ends, says, tmp_path):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done, calls = run_script(
        "tpu_vm.sh",
        tmp_path,
        {"gcloud": GCLOUD},
        "up",
        *TRAIN,
        STATE=str(tmp_path / "state"),
        CODES=str(tmp_path / "codes"),
        ZONE="z",
        TYPE="v5litepod-16",
        POLL="0",
    )
    assert done.returncode == ends, done.stderr
    assert says in done.stderr
    assert sum("ssh" in call and " train " in call for call in calls) == attempts
    assert sum("queued-resources create" in call for call in calls) == created
    assert ("queued-resources delete clip" in calls[-1]) == (ends == 0)


def test_tpu_vm_wants_a_bucket(tmp_path):
    up = ("up", *TRAIN[:-1], "runs/l14")
    done, calls = run_script("tpu_vm.sh", tmp_path, {"gcloud": ""}, *up, ZONE="z", TYPE="t")
    assert (done.returncode, "gs://" in done.stderr, calls) == (2, True, [])


@pytest.mark.parametrize(
    ("code", "restarts", "ends"),
    [(0, 0, 0), (2, 0, 2), (3, 0, 0), (75, 0, 0), (137, 7, 0), (1, 100, 1)],
)
def test_slurm_requeues_all_but_what_is_done_or_wrong(tmp_path, code, restarts, ends):
    """A job that is requeued ends with 0, whatever its command ended with."""
    commands = {
        "srun": 'shift; "$@"; code=$?; [ "$code" = 2 ] && exit 137; exit "$code"',
        "clip-jax": f"exit {code}",
        "scontrol": "",
    }
    done, calls = run_script(
        "slurm.sbatch",
        tmp_path,
        commands,
        *TRAIN,
        SLURM_JOB_ID="42",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert ("scontrol requeue 42" in calls) == (code != ends == 0), done.stdout
    assert done.returncode == ends
    assert any(f"clip-jax {' '.join(TRAIN)} --processes" in call for call in calls)
    assert not (tmp_path / "42.wrong").exists()


@pytest.mark.parametrize(
    ("command", "flags"),
    [(("embed", "m", "photos", "out"), " --worker 3/8"), (("scale", "ladder", "spec.py"), "")],
)
def test_a_slurm_array_takes_its_part(command, flags, tmp_path):
    done, calls = run_script(
        "slurm_array.sbatch",
        tmp_path,
        {"clip-jax": ""},
        *command,
        SLURM_ARRAY_TASK_ID="3",
        SLURM_ARRAY_TASK_MIN="1",
        SLURM_ARRAY_TASK_MAX="8",
    )
    assert done.returncode == 0
    assert calls == [f"clip-jax {' '.join(command)}{flags}"]


def test_the_local_launcher_keeps_simulated_devices_on_the_cpu(tmp_path):
    """Where a GPU or a TPU is, its processes would take that."""
    (tmp_path / "pretended.py").write_text("import os; print(os.environ['JAX_PLATFORMS'])")
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "local.py"), "--module", "pretended", "train"],
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "tpu"},
        check=True,
        capture_output=True,
    )
    assert {"[0] cpu", "[1] cpu"} <= {*done.stdout.splitlines()}
