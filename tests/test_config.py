"""A person's own file: what is wrong in it is said with its place, and never passes for success."""

import dataclasses
import json
from unittest import mock

import pytest

from clip_jax.cli import main
from clip_jax.config import Config, check_resumable, load_config, with_order
from clip_jax.models import zoo
from clip_jax.optim import Constant, OptimConfig
from clip_jax.refused import Refused
from clip_jax.serialize import to_dict
from tests.conftest import tiny_digits

HEAD = "from clip_jax.config import Config\ndef get_config():\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
        ("import nowhere_at_all\n", ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef get_config(:\n", ":2: SyntaxError: invalid syntax"),
        ("x = '\x00'\n", ": "),
        ("x = 1\n", "has no get_config()"),
        ("get_config = 3\n", ": TypeError: 'int' object is not callable"),
        ("def get_config(a):\n    pass\n", ": TypeError: get_config() missing 1 required"),
        ("def get_config():\n    return 1\n", "returned int, not a Config"),
        (HEAD + "    return Config(\n        steps=0)\n", ":3: steps=0 must be from 1 to"),
        (HEAD + "    return Config(stpes=3)\n", ":3: TypeError: "),
        (HEAD + "    return {}['gone']\n", ":3: KeyError: 'gone'"),
        (HEAD + "    import clip_jax.models.zoo as zoo\n    return zoo.get('ViT-B-99')\n",
         ":4: no architecture 'ViT-B-99'"),
    ],
)  # fmt: skip
def test_an_error_in_a_config_file_is_said_with_its_line(text, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith((f"clip-jax: {path}", f"clip-jax: get_config() of {path}"))
    assert says in line


def test_a_bug_of_ours_under_a_config_file_stays_a_bug(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from clip_jax.models import zoo\ndef get_config():\n    return zoo.get('RN50')\n"
    )
    with mock.patch.object(zoo, "ARCHITECTURES", None), pytest.raises(TypeError):
        load_config(path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe{}", b"[]", b'{"steps": "many"}', b'{"steps": 0}', b"[" * 100_000]
)
def test_a_damaged_config_json_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"config\.json"):
        load_config(path)


@pytest.mark.parametrize(("kept", "found"), [("stretches", "stretches"), (None, "global")])
def test_the_order_that_a_run_began_with_is_kept(kept, found, tmp_path):
    """Also where the data have moved since, and where there was but one order."""
    config = Config()
    assert with_order(tmp_path, config).data.order == "auto"
    before = to_dict(config)
    before["data"] |= {"order": kept}
    if kept is None:
        del before["data"]["order"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    resumed = with_order(tmp_path, config)
    assert resumed.data.order == found
    check_resumable(tmp_path, resumed)
    other = {"stretches": "global", "global": "stretches"}[found]
    data = dataclasses.replace(config.data, order=other)
    with pytest.raises(Refused, match=f"data.order: {found} in .*, {other} given"):
        check_resumable(tmp_path, dataclasses.replace(config, data=data))


def test_a_run_whose_schedule_has_no_end_may_be_made_longer(tmp_path):
    trunk = tiny_digits(optim=OptimConfig(schedule=Constant(), warmup_steps=2))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(trunk)))
    check_resumable(tmp_path, dataclasses.replace(trunk, steps=trunk.steps + 1))
    with pytest.raises(Refused, match=r"steps: 24 in .*, 23 given"):
        check_resumable(tmp_path, dataclasses.replace(trunk, steps=trunk.steps - 1))
    cosine = tiny_digits()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(cosine)))
    with pytest.raises(Refused, match=r"steps: 24 in .*, 25 given"):
        check_resumable(tmp_path, dataclasses.replace(cosine, steps=25))
