"""The launchers for clusters: linted, valid, and run against commands that only pretend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from clip_jax import arguments, cli
from clip_jax.prepare.layout import PrepareConfig
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# The part of JobSet's schema (v1alpha2) that a file here may use; the jobs inside are Kubernetes'.
JOB_SET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "maxItems": 20,
                            "items": {
                                "type": "object",
                                "required": ["action"],
                                "additionalProperties": False,
                                "properties": {
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


# And the part of KubeRay's RayJob (v1); its pods are Kubernetes'.
GROUP = {
    "type": "object",
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
    "properties": {
        "groupName": {"type": "string"},
        "replicas": {"type": "integer", "minimum": 0},
        "minReplicas": {"type": "integer", "minimum": 0},
        "maxReplicas": {"type": "integer", "minimum": 1},
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": {"type": "object", "required": ["spec"]},
    },
}
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "headGroupSpec": GROUP,
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": GROUP | {"required": ["groupName", *GROUP["required"]]},
                        },
                    },
                },
            },
        },
    },
}


def jobs(document):
    """A JobSet's jobs, as Kubernetes gets them."""
    jsonschema.validate(document, JOB_SET)
    for replicated in document["spec"]["replicatedJobs"]:
        yield {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            **replicated["template"],
        }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", str(script)], capture_output=True, text=True, check=False, env=with_venv()
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["gke.yaml", "gke_array.yaml"])
def test_the_yaml_is_what_kubernetes_takes(name):
    document = yaml.safe_load((LAUNCH / name).read_text())
    found = list(jobs(document))
    assert found
    for job in found:
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        rules = job["spec"]["podFailurePolicy"]["rules"]
        assert [rule["onExitCodes"]["values"] for rule in rules] == [[2]]
        containers = job["spec"]["template"]["spec"]["containers"]
        names = [rule["onExitCodes"]["containerName"] for rule in rules]
        assert names == [container["name"] for container in containers]


def test_the_ray_job_is_what_kuberay_takes_and_its_command_ours():
    document = yaml.safe_load((LAUNCH / "ray.yaml").read_text())
    jsonschema.validate(document, RAY_JOB)
    cluster = document["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    program, verb, *rest = document["spec"]["entrypoint"].replace("gs://BUCKET", "/tmp").split()
    assert (program, verb) == ("clip-jax", "prepare")
    config, _ = arguments.read(PrepareConfig, rest, ("source", "destination"), cli.prepare)
    assert config.on == "ray"
    assert config.joins


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_leads_ray_on_the_first_node_and_ends_as_the_command_does(tmp_path, code):
    pretend(tmp_path, "scontrol", "echo node7; echo node8")
    pretend(
        tmp_path, "srun",
        'shift; SLURM_PROCID=0 "$@"; rm -f "$ended.2"; mv "$ended" "$ended.2"\n'
        'SLURM_PROCID=1 "$@"; cp "$ended.2" "$ended"; exit 137',
    )  # fmt: skip
    pretend(tmp_path, "ray", 'case "$*" in *--block*) cp "$ended.2" "$ended" ;; esac')
    pretend(tmp_path, "clip-jax", f"exit {code}")
    environment = with_venv(
        CALLS=str(tmp_path / "calls"), SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]",
        SLURM_CPUS_PER_TASK="32",
    )  # fmt: skip
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    script = ["bash", str(LAUNCH / "ray.sbatch"), "prepare", "in", "out", "--shuffle"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith(("ray ", "clip-jax "))] == [
        "ray start --head --port 6379 --num-cpus 32 --include-dashboard false",
        "clip-jax prepare in out --shuffle --on ray",
        "ray stop",
        "ray start --address node7:6379 --num-cpus 32 --block",
    ]
    assert not (tmp_path / "42.ended").exists()


def test_a_misspelt_field_is_found():
    document = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    job = next(jobs(document))
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_no_launcher_says_what_is_trained():
    for path in LAUNCH.iterdir():
        if path.is_file() and path.name != "README.md":
            text = path.read_text()
            for word in ("--optim.", "--batch-size", "--steps", "--model.", "--data."):
                assert word not in text, (path.name, word)


def with_venv(**more):
    """The environment, with what pip installed beside Python found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | more


def pretend(directory, name, body):
    """Put a command into `directory` that notes its arguments and does what `body` says."""
    path = directory / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
    path.chmod(0o755)


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


def tpu_vm(tmp_path, codes, *arguments):
    """Run the script against a pretended cloud whose attempts end with these exit codes."""
    pretend(tmp_path, "gcloud", GCLOUD)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    environment = with_venv(
        CALLS=str(tmp_path / "calls"), STATE=str(tmp_path / "state"),
        CODES=str(tmp_path / "codes"), ZONE="z", TYPE="v5litepod-16", POLL="0",
    )  # fmt: skip
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


TRAIN = ["up", "train", "configs/vit_l14.py", "--workdir", "gs://b/runs/l14"]


@pytest.mark.parametrize("code", [75, 134])
def test_tpu_vm_starts_again_until_the_run_is_done(code, tmp_path):
    done, calls = tpu_vm(tmp_path, [code, 137, 0], *TRAIN)
    assert done.returncode == 0, done.stderr
    assert sum("ssh" in call and " train " in call for call in calls) == 3
    assert sum("queued-resources create" in call for call in calls) == 2  # once more: preempted
    assert "queued-resources delete clip" in calls[-1]


def test_tpu_vm_does_not_start_what_is_wrong_again(tmp_path):
    done, calls = tpu_vm(tmp_path, [2, 0], *TRAIN)
    assert done.returncode == 2
    assert sum("ssh" in call and " train " in call for call in calls) == 1
    assert "exit code 2 means" in done.stderr


def test_tpu_vm_gives_up_what_ends_at_once(tmp_path):
    done, calls = tpu_vm(tmp_path, [1, 1, 1, 0], *TRAIN)
    assert done.returncode == 1
    assert sum("ssh" in call and " train " in call for call in calls) == 3


def test_tpu_vm_wants_a_bucket(tmp_path):
    done, calls = tpu_vm(tmp_path, [], "up", "train", "configs/vit_l14.py", "--workdir", "runs/l14")
    assert done.returncode == 2
    assert "gs://" in done.stderr
    assert not calls


@pytest.mark.parametrize(
    ("code", "restarts", "requeued", "ends"),
    [
        (0, 0, False, 0),
        (2, 0, False, 2),
        (3, 0, True, 0),
        (75, 0, True, 0),
        (137, 7, True, 0),
        (1, 100, False, 1),
    ],
)
def test_slurm_requeues_all_but_what_is_done_or_wrong(tmp_path, code, restarts, requeued, ends):
    pretend(tmp_path, "srun", 'shift; "$@"; code=$?; [ "$code" = 2 ] && exit 137; exit "$code"')
    pretend(tmp_path, "clip-jax", f"exit {code}")
    pretend(tmp_path, "scontrol", "")
    environment = with_venv(
        CALLS=str(tmp_path / "calls"), SLURM_JOB_ID="42", SLURM_RESTART_COUNT=str(restarts)
    )
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN[1:]],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text()
    assert ("scontrol requeue 42" in calls) == requeued, done.stdout
    assert done.returncode == ends
    assert "clip-jax train configs/vit_l14.py --workdir gs://b/runs/l14 --processes" in calls
    assert not (tmp_path / "42.wrong").exists()


def test_a_slurm_array_takes_its_part(tmp_path):
    pretend(tmp_path, "clip-jax", "")
    environment = with_venv(
        CALLS=str(tmp_path / "calls"), SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_MIN="1",
        SLURM_ARRAY_TASK_MAX="8",
    )  # fmt: skip
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    script = ["bash", str(LAUNCH / "slurm_array.sbatch"), "embed", "m", "photos", "out"]
    subprocess.run(script, env=environment, check=True)
    assert (tmp_path / "calls").read_text() == "clip-jax embed m photos out --part 3/8\n"


PRETENDED = """
import os, pathlib, signal, sys, time
HERE = pathlib.Path(__file__).parent
index = int(os.environ["CLIP_JAX_PROCESS_INDEX"])
(HERE / f"pid {index}").write_text(str(os.getpid()))

def state(other):  # "Z": has ended; "": and the launcher knows
    file = HERE / f"pid {other}"
    if not (pid := file.exists() and file.read_text()):
        return "not begun"
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
    except FileNotFoundError:
        return ""

"""


def local(tmp_path, body, *options):
    """Run launch/local.py with processes that are no JAX but do what `body` says."""
    (tmp_path / "pretended.py").write_text(PRETENDED + body)
    return subprocess.run(
        [sys.executable, str(LAUNCH / "local.py"), "--module", "pretended", *options, "train"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_local_gives_each_process_its_place_and_devices(tmp_path):
    names = ("CLIP_JAX_PROCESS_COUNT", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    body = f"print(sys.argv[1], *(os.environ[name] for name in {names}))\n"
    done = local(tmp_path, body, "--processes", "3", "--devices", "2")
    assert done.returncode == 0
    said = [line for line in done.stdout.splitlines() if not line.startswith("launch:")]
    assert sorted(said) == [f"[{index}] train 3 2 cpu" for index in range(3)]


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        (
            "while index == 1 and state(0): time.sleep(0.01)\nsys.exit(3)", 3,
            "launch: process 0 ended first, with exit code 3:",
        ),
        (
            "index == 1 and sys.exit('no disk')\ntime.sleep(60)", 1,
            "launch: process 1 ended first, with exit code 1: no disk",
        ),
        (
            "index == 1 and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 137,
            "launch: process 1 was killed by SIGKILL",
        ),
        # JAX aborts those that wait for a dead process; they are no cause.
        (
            "while index == 0 and state(1) not in ('Z', ''): time.sleep(0.01)\n"
            "os.kill(os.getpid(), signal.SIGABRT if index == 0 else signal.SIGKILL)", 137,
            "launch: process 1 was killed by SIGKILL",
        ),
    ],
    ids=["preempted", "an exception", "killed", "aborted by JAX"],
)  # fmt: skip
def test_local_ends_all_and_names_the_cause_last(tmp_path, body, code, last):
    done = local(tmp_path, body, "--grace", "0.2")
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].strip() == last


@pytest.mark.parametrize(("code", "starts"), [(75, 3), (2, 1), (3, 1), (0, 1)])
def test_local_starts_again_what_may_be(tmp_path, code, starts):
    body = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nsys.exit({code})"
    done = local(tmp_path, body, "--processes", "1", "--restarts", "2")
    assert done.returncode == code
    assert len((tmp_path / "starts").read_text()) == starts


def test_ci_finds_a_python_wherever_it_is_and_names_one_that_is_not(tmp_path):
    function = re.search(r"^python_of\(\).*?^\}", (ROOT / ".ci/run").read_text(), re.M | re.S)[0]
    homes = (tmp_path / "first", tmp_path / "second", tmp_path / ".pyenv/versions/9.8.1/bin")
    says = "#!/bin/sh\necho "
    for home, text in zip(
        homes, ("#!/bin/sh\nexit 127\n", f"{says}9.9\n", f"{says}9.8\n"), strict=True
    ):
        home.mkdir(parents=True)
        for version in ("9.8", "9.9"):
            file = home / ("python" if ".pyenv" in str(home) else f"python{version}")
            file.write_text(text)
            file.chmod(0o755)

    def find(version):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{function}\npython_of {version}"],
            env={"PATH": f"{homes[0]}:{homes[1]}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True,
        )  # fmt: skip

    assert find("9.9").stdout.strip() == str(homes[1] / "python9.9")
    assert find("9.8").stdout.strip() == str(homes[2] / "python")
    missing = find("9.7")
    assert missing.returncode == 2
    assert "There is no Python 9.7" in missing.stderr
