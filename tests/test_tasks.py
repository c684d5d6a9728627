"""Tasks by threads and on Ray: the same files, whatever dies meanwhile."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from clip_jax import files
from clip_jax.prepare import layout, writer
from clip_jax.tasks import Here, runner
from tests.conftest import ROOT, write_tiny_model
from tests.data.conftest import FORMATS
from tests.nodes import Nodes
from tests.prepare.conftest import CHANGES, digests, jpeg, scene


def pairs(count: int) -> list[tuple[str, bytes, str]]:
    """Scenes, of which every fifth is one of the first again, or a changed copy of it."""
    changes = [lambda x: x, *CHANGES.values()]
    images = [scene(i) for i in range(count)]
    images[5::5] = [changes[i % 5](images[i]) for i in range(len(images[5::5]))]
    return [(f"{i:03d}.jpg", jpeg(x), f"text {i}") for i, x in enumerate(images)]


def everything(source: str, out: Path, root: Path, **fields) -> layout.PrepareConfig:
    """All stages."""
    given = {
        "source": source, "destination": out, "samples_per_shard": 20, "samples_per_task": 6,
        "drop_duplicates": True, "drop_near_duplicates": True, "shuffle": True,
        "decontaminate": (f"test={root / 'test'}",), "score_with": root / "model",
        "top_share": 0.7,
    }  # fmt: skip
    return layout.PrepareConfig(**(given | fields))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model that scores, and a folder of test images."""
    root = tmp_path_factory.mktemp("root")
    write_tiny_model(root / "model")
    (root / "test").mkdir()
    for i in (1, 2):
        scene(i).save(root / f"test/{i}.png")
    return root


def test_threads_do_each_task_once_and_say_lines(capsys):
    done = []

    def work(task, counted):
        done.append((task, list(counted(range(3)))))
        return f"line {task}" if task else None

    with Here(3) as does:
        does.run("x", work, [(i, 3) for i in range(5)])
        does.run("x", work, [])
    assert sorted(done) == [(i, [0, 1, 2]) for i in range(5)]
    assert sorted(capsys.readouterr().err.split("\n")[:-1]) == [f"line {i}" for i in range(1, 5)]


def test_work_with_a_model_is_done_by_one_thread():
    threads = set()
    with Here(4) as does:
        work = lambda task, counted: threads.add(threading.get_ident())  # noqa: E731
        does.run("x", work, [(i, 1) for i in range(9)], model=True)
    assert len(threads) == 1


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'clip-jax-pods\[ray\]'"):
        runner("ray")


# ------------------------------------------------------------------------------------- on Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray")


def on_ray(
    source: str, out: Path, root: Path, address: str = "local", *flags: str,
    folder: Path | None = None, before: Sequence[str] = (), stderr: int | None = None,
) -> subprocess.Popen:  # fmt: skip
    """Start `everything` as a person does."""
    command = [*before, sys.executable, "-m", "clip_jax", "prepare", source, str(out)]
    command += ["--on", "ray"]
    command += ["--samples-per-shard", "20", "--samples-per-task", "6", "--shuffle", "--json"]
    command += ["--drop-duplicates", "--drop-near-duplicates"]
    command += ["--decontaminate", f"test={root / 'test'}", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    where = {"cwd": folder or out.parent, "env": environment, "text": True}
    return subprocess.Popen(command, **where, stdout=subprocess.PIPE, stderr=stderr)


def scored(root: Path) -> list[str]:
    return ["--score-with", str(root / "model"), "--top-share", "0.7"]


def ended(process: subprocess.Popen) -> dict:
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


@needs_ray
@pytest.mark.long
def test_ray_makes_the_shards_that_threads_make(root, tmp_path):
    (tmp_path / "in").mkdir()
    source = FORMATS["tar"](tmp_path / "in", pairs(30)).path
    process = on_ray(source, tmp_path / "there", root)
    config = everything(source, tmp_path / "here", root, score_with=None, top_share=1.0)
    here, there = writer.prepare(config), ended(process)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert there["counts"] == here["counts"]
    assert len(here["counts"]) == 4


@pytest.fixture
def several(root, tmp_path):
    """More pairs, as tars; the shards that threads make of them."""
    (tmp_path / "in").mkdir()
    source = FORMATS["tar"](tmp_path / "in", pairs(120)).path
    writer.prepare(everything(source, tmp_path / "here", root))
    return source, digests(tmp_path / "here")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("format", ["tar", "parquet", "table"])
def test_one_two_and_four_nodes_make_the_same_shards(format, root, tmp_path):
    (tmp_path / "in").mkdir()
    source = FORMATS[format](tmp_path / "in", pairs(60)).path
    here = writer.prepare(everything(source, tmp_path / "here", root))
    for count in (1, 2, 4):
        out = tmp_path / f"{count}"
        with Nodes(count) as nodes:
            there = ended(on_ray(source, out, root, nodes.address, *scored(root)))
        assert digests(out) == digests(tmp_path / "here")
        assert there["counts"] == here["counts"]
    assert len(here["counts"]) == 5


@needs_ray
@pytest.mark.slow
def test_embeddings_are_the_same_on_two_nodes_when_workers_die(root, tmp_path):
    (tmp_path / "photos").mkdir()
    for name, image, _ in pairs(60):
        (tmp_path / "photos" / name).write_bytes(image)
    command = [sys.executable, "-m", "clip_jax", "embed", str(root / "model"), "photos"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    where = {"cwd": tmp_path, "stdout": subprocess.DEVNULL}
    rows = ["--rows-per-file", "4"]
    subprocess.run([*command, "here", *rows], **where, env=environment, check=True)
    with Nodes(2) as nodes:
        there = environment | {"RAY_ADDRESS": nodes.address}
        process = subprocess.Popen([*command, "there", *rows, "--on", "ray"], **where, env=there)
        while not list((tmp_path / "there").glob("rows-*")):
            assert process.poll() is None
            time.sleep(0.005)
        assert nodes.kill_workers()
        assert process.wait() == 0
    made = {x.name: x.read_bytes() for x in (tmp_path / "here").glob("rows-*")}
    assert {x.name: x.read_bytes() for x in (tmp_path / "there").glob("rows-*")} == made
    assert len(made) == 15


# What a stage writes, by which one sees that it has begun.
SIGNS = {
    "evaluation sets": "set-*", "read": "*.read", "same": "same-*", "alike": "alike-*",
    "score": "*.scores", "write": "../pairs-*.json",
}  # fmt: skip


def wait_for(out: Path, stage: str, process: subprocess.Popen) -> None:
    while not list((out / "work").glob(SIGNS[stage])):
        assert process.poll() is None
        time.sleep(0.005)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("what", ["workers", "node"])
@pytest.mark.parametrize("stage", SIGNS)
def test_what_dies_in_a_stage_changes_nothing(what, stage, several, root, tmp_path):
    """SIGKILL of all workers, or of one of two nodes, when a stage has written its first file."""
    source, here = several
    with Nodes(2) as nodes:
        process = on_ray(source, tmp_path / "out", root, nodes.address, *scored(root))
        wait_for(tmp_path / "out", stage, process)
        if what == "node":
            nodes.lose_node()
        else:
            assert nodes.kill_workers()
        ended(process)
        assert digests(tmp_path / "out") == here


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["read", "alike", "score", "write"])
def test_a_killed_driver_goes_on_where_it_was(stage, several, root, tmp_path):
    source, here = several
    out = tmp_path / "out"
    process = on_ray(source, out, root, "local", *scored(root))
    wait_for(out, stage, process)
    process.kill()
    process.communicate()
    while is_worked_in(tmp_path):  # they notice that they are alone
        time.sleep(0.1)
    assert not (out / "_SUCCESS").exists()
    finished = [path for sign in SIGNS.values() for path in (out / "work").glob(sign)]
    stamps = {path.resolve(): path.stat().st_mtime_ns for path in finished}
    process, seen = on_ray(source, out, root, "local", *scored(root)), {}
    while process.poll() is None:
        for path in stamps:
            with contextlib.suppress(FileNotFoundError):
                seen[path] = path.stat().st_mtime_ns
        time.sleep(0.01)
    ended(process)
    assert digests(out) == here
    assert seen == stamps


def is_worked_in(folder: Path) -> bool:
    """Whether a process of Ray's works there."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ray = (path / "cmdline").read_bytes().startswith(b"ray::")
            if is_ray and (path / "cwd").readlink() == folder:
                return True
    return False


@needs_ray
@pytest.mark.slow
def test_from_a_bucket_to_a_bucket_on_ray(bucket, root, tmp_path):
    """With a sample that is no image and a tar that ends too early: counted as by threads."""
    (tmp_path / "in").mkdir()
    images = pairs(40)
    images[7] = (images[7][0], b"no image", images[7][2])
    FORMATS["tar"](tmp_path / "in", images)
    for path in (tmp_path / "in").glob("*.tar"):
        content = path.read_bytes()
        files.write_whole(f"{bucket.url}/in/{path.name}", content)
    files.write_whole(f"{bucket.url}/in/short.tar", content[:-4000])
    source, out = f"{bucket.url}/in/*.tar", files.place(f"{bucket.url}/out")
    refused = on_ray(source, out, root, folder=tmp_path, stderr=subprocess.PIPE)
    message = refused.communicate()[1]
    assert refused.returncode == 2
    assert "short.tar (truncated" in message
    assert "Traceback" not in message
    there = ended(on_ray(source, out, root, "local", "--bad-shards", "skip", folder=tmp_path))
    config = everything(source, tmp_path / "here", root, score_with=None, top_share=1.0)
    here = writer.prepare(replace(config, bad_shards="skip"))
    assert there["counts"] == here["counts"]
    assert there["counts"]["not an image"] == 1
    shards = [path for path in out.iterdir() if path.name.endswith(".array_record")]
    read = {path.name: hashlib.sha256(files.read(path)).hexdigest() for path in shards}
    assert read == digests(tmp_path / "here")


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounting a disk takes unshare")
def test_a_full_disk_on_ray_is_one_message_and_goes_on(root, tmp_path):
    """A disk of 100 KB, and the same command once it has more."""
    (tmp_path / "in").mkdir()
    (tmp_path / "disk").mkdir()
    source = FORMATS["tar"](tmp_path / "in", pairs(40)).path
    out = tmp_path / "disk/out"
    script = 'mount -t tmpfs -o size=100k none disk && { "$@"; echo "ended with $?"; } && '
    script += 'mount -o remount,size=100m disk && "$@" && cp -r disk/out .'
    alone = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    process = on_ray(source, out, root, before=alone, folder=tmp_path, stderr=subprocess.PIPE)
    said, message = process.communicate()
    assert process.returncode == 0, message
    assert said.startswith("ended with 2")
    assert f"no space left for {out}" in message
    assert "Traceback" not in message
    writer.prepare(everything(source, tmp_path / "here", root, score_with=None, top_share=1.0))
    assert digests(tmp_path / "out") == digests(tmp_path / "here")
