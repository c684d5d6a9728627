"""Wrong use, `--json`, and how the console script starts itself."""

import importlib.util
import json
import os
import sys
from unittest import mock

import pytest

from clip_jax.__main__ import main as console_script
from clip_jax.__main__ import plans_only
from clip_jax.cli import main
from tests.conftest import DIGITS, ROOT


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["train", str(ROOT / "configs/pairs.py"), "--data.source.path", "nowhere"], "--workdir"),
        (["evaluate", "nowhere"], "--output"),
        (["predict", "nowhere", "--images", "nowhere", "--labels", "x"], "--sheet"),
        (["search", "nowhere", "nowhere", "--text", "x"], "--sheet"),
        (["plan", str(DIGITS)], "--plot"),
        (["scale", "fit", "nowhere"], "--plot"),
        (["scale", "collect", "nowhere"], "--output"),
        (["scale", "ladder", str(ROOT / "configs/ladder_digits.py")], "--root"),
    ],
)
def test_a_destination_is_refused_before_anything_is_done(args, option, capsys, tmp_path):
    (tmp_path / "file").write_text("as it was")
    name = "x.png" if option in ("--sheet", "--plot") else "x"
    for folder, why in ((tmp_path / "file", "is a file"), ("/proc", "cannot be written")):
        assert main([*args, option, f"{folder}/{name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder} {why}" in line
        assert option in line
    assert (tmp_path / "file").read_text() == "as it was"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "no command 'nonsense'"),
        (["train"], "train needs a config file"),
        (["train", "nowhere.py"], "no config file at nowhere.py"),
        (["train", str(DIGITS), "--mesh.data", "3"], "does not use all 8 devices"),
        (["train", str(DIGITS), "--batch-size", "12"], "batch_size=12 cannot be split over 8"),
        (["train", str(DIGITS), "--steps", "10"], "optim.warmup_steps=200 leaves nothing"),
        (["train", str(ROOT / "configs/pairs.py"), "--data.source.path", "no.csv"], "no.csv"),
        (["evaluate", "nowhere"], "there is no nowhere"),
        (["scale", "nonsense"], "scale needs ladder, collect, choose, fit or report"),
        (["bench", "nonsense"], "bench needs one of input"),
        (["bench", "input"], "bench input needs a config file"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(args, says, capsys, tmp_path):
    if args[0] == "train" and len(args) > 2:
        args = [*args, "--workdir", str(tmp_path)]
    assert main(args) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_json_goes_to_standard_output_alone(capsys):
    table = str(ROOT / "tests/golden/scaling_points.csv")
    assert main(["scale", "fit", table, "--where", "upstream_dataset=LAION*", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"alpha", "beta", "points"} <= result.keys()


def test_the_console_script_starts_itself_once_with_huge_pages():
    with (
        mock.patch.object(os, "execv", autospec=True) as execute,
        mock.patch.object(sys, "platform", "linux"),
        mock.patch.object(sys, "argv", ["clip-jax", "--version"]),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("GLIBC_TUNABLES", None)
        assert console_script() == 0
        execute.assert_called_once_with(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
        assert console_script() == 0
        execute.assert_called_once()


def test_libtpu_is_left_alone_where_no_accelerator_is(tmp_path):
    others = {name: x for name, x in os.environ.items() if not name.startswith("TPU_")}
    with (
        mock.patch.object(importlib.util, "find_spec", autospec=True) as find,
        mock.patch.dict(os.environ, others, clear=True),
    ):
        find.return_value = None
        assert not plans_only(tmp_path)
        find.side_effect = lambda name, package=None: name == "libtpu" or None
        assert plans_only(tmp_path)
        (tmp_path / "vfio").mkdir()
        assert plans_only(tmp_path)
        (tmp_path / "vfio/0").touch()
        assert not plans_only(tmp_path)
        (tmp_path / "vfio/0").unlink()
        os.environ["TPU_WORKER_HOSTNAMES"] = "a,b"
        assert not plans_only(tmp_path)
