import contextlib
import dataclasses
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from clip_jax import parts
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.cli import arguments, commands
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.convert import run
from clip_jax.data.sources.any import PathConfig, open_single
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.losses import SoftmaxConfig
from clip_jax.optim import make_optimizer
from clip_jax.scaling.collect import gather
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage.files import AnyPath
from tests.conftest import DIGITS

LOSS = """
from dataclasses import dataclass
from clip_jax.losses import SoftmaxConfig

@dataclass(frozen=True, kw_only=True)
class {name}(SoftmaxConfig):
    \"\"\"Softmax of a sharper temperature.\"\"\"

    factor: float = 2.0  # Factor on the logit scale.
"""


SEVERAL = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optax

from clip_jax.data.sources import SourceConfig
from clip_jax.evals.evaluator import EvaluatorConfig
from clip_jax.models.tower import TokenizerConfig
from clip_jax.optim.optimizer import Optimizer, decay

@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    def chain(self, config, rows):
        return [optax.scale_by_lion(config.b1, config.b2), decay(config)]

@dataclass(frozen=True, kw_only=True)
class Letters(TokenizerConfig):
    file: str = ""

    def make(self, text):
        return lambda texts, length, truncate=False: np.array(
            [[ord(c) % text.vocab_size for c in line.ljust(length)[:length]] for line in texts]
        )

@dataclass(frozen=True, kw_only=True)
class Lines(SourceConfig):
    path: str
    suffixes: ClassVar[tuple[str, ...]] = (".lines",)

    def open(self, *_):
        return f"opened {self.path}"

@dataclass(frozen=True, kw_only=True)
class Quiet(EvaluatorConfig):
    every_steps: int = 5
"""


@pytest.fixture(autouse=True)
def imported(tmp_path, monkeypatch):
    """Work in a folder of its own, and forget afterwards what was imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    with mock.patch.dict(parts._NAMES):
        yield
    new = {*sys.modules} - before
    for kind in parts.of_users():
        if kind.__module__ in new:
            kind.__name__ = f"_{kind.__name__}"  # no part of a later test
    for name in new:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(name: str, file: str) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LOSS.format(name=name))
    return path


def config_with(module: str, name: str) -> Config:
    loss = getattr(sys.modules[module], name)()
    return dataclasses.replace(load_config(DIGITS), objective=(loss,))


def test_a_class_of_an_imported_file_has_flags_and_help_and_is_read_and_written(capsys):
    write("Sharp", "sharp_loss.py")
    Path("run.py").write_text(
        "import dataclasses\nfrom clip_jax.config_files import load_config\n"
        "from sharp_loss import Sharp\n"
        f"def get_config():\n    run = load_config({str(DIGITS)!r})\n"
        "    return dataclasses.replace(run, objective=(Sharp(),))\n"
    )
    args = ["--import", "sharp_loss.py", "run.py", "--objective.0.factor", "3"]
    modules, args = arguments.without_imports(args)
    for module in modules:
        parts.load(module)
    config = arguments.read_run(Config, args, commands.train, "train")
    assert dataclasses.asdict(config.objective[0])["factor"] == 3
    written = json.loads(json.dumps(to_dict(config)))
    assert written["objective"][0]["import"] == "sharp_loss.py"
    assert parts.flags(written) == ["--import", "sharp_loss.py"]
    assert from_dict(Config, written) == config
    with pytest.raises(SystemExit):
        arguments.read_run(Config, ["run.py", "--help-all"], commands.train, "train")
    shown = capsys.readouterr().out
    assert "--objective.0.factor" in shown
    assert "Factor on the logit scale." in shown
    assert re.search(r"objective: .*\| Sharp\b", shown)
    assert "Sharp" not in str(Config.__annotations__)  # the parser's types last as long as it does


def test_a_module_of_the_working_directory_is_recorded_by_its_name():
    write("Bright", "bright_parts/losses.py")
    Path("bright_parts/__init__.py").write_text("from bright_parts import losses\n")
    parts.load("bright_parts")
    written = to_dict(config_with("bright_parts.losses", "Bright"))
    assert parts.needed(written) == ("bright_parts",)


@pytest.mark.usefixtures("unchecked_types")
def test_each_kind_of_part_has_a_field_and_is_used():
    Path("several_parts.py").write_text(SEVERAL)
    parts.load("several_parts.py")
    mine, run = sys.modules["several_parts"], load_config(DIGITS)
    text = dataclasses.replace(run.model.text, tokenizer=mine.Letters())
    config = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, text=text),
        optim=dataclasses.replace(run.optim, optimizer=mine.Lion()),
        data=dataclasses.replace(run.data, source=mine.Lines(path="a.lines")),
        evals=(mine.Quiet(),),
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    rows = config.model.dimensions()
    params = {name: jnp.ones(2) for name in ("logit_scale", "logit_bias")}
    state = make_optimizer(config.optim, rows).init(params)
    assert "ScaleByLionState" in str(state)
    assert make_tokenizer(config.model.text)(["ab"], 3).tolist() == [[97, 98, 32]]
    assert open_single(PathConfig(path="b.lines"), 16) == "opened b.lines"


def test_an_entry_point_is_a_short_name():
    write("Brief", "brief_parts.py")
    entry = metadata.EntryPoint("brief", "brief_parts", parts.GROUP)
    with mock.patch.object(metadata, "entry_points", autospec=True, return_value=(entry,)):
        parts.load("brief")
    assert parts.needed(to_dict(config_with("brief_parts", "Brief"))) == ("brief",)


def test_the_version_changes_with_any_module_of_a_part():
    """Otherwise `plan` returns what it stored of another program."""
    Path("early_parts").mkdir()
    Path("early_parts/__init__.py").write_text("from early_parts import factors, losses\n")
    Path("early_parts/factors.py").write_text("FACTOR = 2.0\n")
    write("Early", "early_parts/losses.py")
    parts.load("early_parts")
    write("Lone", "lone_parts.py")
    parts.load("lone_parts.py")
    write("Imported", "imported_parts.py")
    sys.path.append(".")
    __import__("imported_parts")
    path = write("InConfig", "config_of_a_run.py")  # which Python does not know as a module
    module = parts.run_file(path)
    before = parts.version()
    assert before == parts.version()
    files = ("early_parts/factors.py", "lone_parts.py", "imported_parts.py", str(path))
    for file in files:
        with Path(file).open("a") as changed:
            changed.write("# another version\n")
        now = parts.version()
        assert now != before, file
        before = now
    assert issubclass(vars(module)["InConfig"], SoftmaxConfig)


def test_an_import_in_python_is_enough():
    write("Plain", "plain_parts.py")
    sys.path.append(".")
    __import__("plain_parts")
    config = config_with("plain_parts", "Plain")
    assert from_dict(Config, to_dict(config)) == config
    assert parts.needed(to_dict(config)) == ("plain_parts",)


def readers(workdir: Path):
    yield lambda: load_config(workdir / "config.json")
    yield lambda: read_run_config(workdir)
    yield lambda: run.read_config(workdir)
    yield lambda: gather([workdir])


def test_readers_of_a_run_name_the_import_and_import_nothing():
    write("Lost", "lost_parts.py")
    parts.load("lost_parts.py")
    written = to_dict(config_with("lost_parts", "Lost"))
    Path("config.json").write_text(json.dumps(written).replace("lost_parts", "gone_parts"))
    written["objective"][0]["type"] = "Never"
    (workdir := Path("never")).mkdir()
    (workdir / "config.json").write_text(json.dumps(written))
    (workdir / "result.json").write_text('{"step": 1, "samples_seen": 2}')
    Path("gone_parts.py").write_text("raise SystemExit('a file of a run ran code')")
    for read in [*readers(workdir)][:-1]:  # the last one skips such a run, with the reason
        with pytest.raises(InputError, match=r"needs Never, which lost_parts.py does not define"):
            read()
    parts._NAMES.clear()
    for read in readers(workdir):
        with pytest.raises(
            InputError, match=r"needs Never of lost_parts.py, not imported: .*"
        ) as e:
            read()
        assert "config.json" in str(e.value)
        assert "Pass --import lost_parts.py" in str(e.value)
    # The class is known; what the module is called now is no obstacle.
    assert load_config("config.json").objective[0] == config_with("lost_parts", "Lost").objective[0]
    assert "gone_parts" not in sys.modules


def test_two_classes_of_one_name_are_an_error():
    write("Twice", "first_twice.py")
    write("Twice", "second_twice.py")
    parts.load("first_twice.py")
    written = to_dict(config_with("first_twice", "Twice"))
    parts.load("second_twice.py")
    with pytest.raises(InputError, match="second_twice and first_twice both define Twice"):
        from_dict(Config, written)


def test_a_class_with_the_name_of_a_built_in_one_is_an_error():
    write("SoftmaxConfig", "taken_parts.py")
    parts.load("taken_parts.py")
    with pytest.raises(InputError, match=r"taken_parts and clip_jax.* both define SoftmaxConfig"):
        parts.opened(tuple[SoftmaxConfig | None, ...])
    assert parts.opened(AnyPath) == AnyPath  # two classes of one name, which are no parts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent_parts", None, "there is no module 'absent_parts'"),
        ("absent_parts.py", None, "absent_parts.py does not exist"),
        ("broken_parts.py", "x = 1\nraise KeyError('y')", "broken_parts.py:2: KeyError: 'y'"),
        ("broken_parts", "import absent_thing", "broken_parts.py:1: .*absent_thing"),
        ("broken_pack.parts", None, "broken_pack/__init__.py:1: TypeError: y"),
        ("json.py", "", "a module 'json' was imported already"),
        ("time.py", "", "a module 'time' was imported already, from Python itself"),
    ],
)
def test_what_cannot_be_imported_is_named(name, content, message):
    Path("broken_pack").mkdir()
    Path("broken_pack/__init__.py").write_text("raise TypeError('y')")
    if content is not None:
        Path(f"{name.removesuffix('.py')}.py").write_text(content)
    with pytest.raises(InputError, match=message):
        parts.load(name)


def test_a_module_that_a_config_needs_is_named_as_it_is_imported():
    write("Near", "near_loss.py")
    write("Far", "far/far_loss.py")
    for path, advice in (("near_loss", "near_loss"), ("far_loss", "far/far_loss.py")):
        Path("far/run.py").write_text(f"import {path}\n")
        with pytest.raises(
            InputError, match=rf"No module named '{path}'; pass --import {advice}\."
        ):
            load_config("far/run.py")


def test_annotations_of_a_file_may_be_texts():
    path = write("Late", "late_loss.py")
    future = "from __future__ import annotations\nfrom typing import ClassVar\n"
    path.write_text(f"{future}{path.read_text()}    name: ClassVar[str] = 'late'\n")
    parts.load("late_loss.py")
    written = to_dict(config_with("late_loss", "Late"))
    assert to_dict(from_dict(Config, written)) == written
    assert written["objective"][0]["factor"] == 2.0


def test_a_config_without_parts_does_not_name_a_module_of_its_name():
    write("Same", f"{DIGITS.stem}.py")
    parts.load(DIGITS.stem)
    kind = vars(sys.modules[DIGITS.stem])["Same"]
    load_config(DIGITS)
    assert parts.origin(kind) == DIGITS.stem


def test_a_file_imports_modules_beside_it():
    write("Beside", "elsewhere/beside_loss.py")
    Path("elsewhere/all_losses.py").write_text("from beside_loss import Beside")
    parts.load("elsewhere/all_losses.py")
    assert "Beside" in [kind.__name__ for kind in parts.of_users()]


def test_a_file_is_the_same_by_any_path_and_from_any_folder(tmp_path, monkeypatch):
    write("Again", "folder/again_parts.py")
    Path("folder/late_parts.py").write_text("")
    for path in (
        "folder/again_parts.py",
        "./folder/again_parts.py",
        f"{tmp_path}/folder/again_parts.py",
    ):
        parts.load(path)
    monkeypatch.chdir("folder")
    parts.load("again_parts.py")
    assert [x.__name__ for x in parts.of_users() if x.__module__ == "again_parts"] == ["Again"]
    monkeypatch.chdir("/")
    __import__("late_parts")  # of the folder of a file that was imported
    (tmp_path / "other").mkdir()
    (tmp_path / "other/again_parts.py").write_text("")
    with pytest.raises(InputError, match="'again_parts' was imported already, from "):
        parts.load(f"{tmp_path}/other/again_parts.py")


def test_a_part_may_contain_dataclasses_and_no_dicts():
    path = write("Boxed", "nested_loss.py")
    inner = "@dataclass(frozen=True)\nclass Inner:\n    size: int = 1\n\n@dataclass(frozen"
    text = path.read_text().replace("@dataclass(frozen", inner, 1)
    path.write_text(text + "    inner: Inner = Inner()\n    table: dict | None = None\n")
    parts.load("nested_loss.py")
    written = to_dict(config_with("nested_loss", "Boxed"))
    assert written["objective"][0]["inner"] == {"type": "Inner", "size": 1}
    parts.check(written, "config.json")
    assert to_dict(from_dict(Config, written)) == written
    written["objective"][0]["table"] = {}
    with pytest.raises(InputError, match=r"objective\[0\].table .* annotated as .*dict"):
        from_dict(Config, written)


def test_the_flag_is_taken_out_of_any_position():
    args = ["--import", "a", "plan", "x.py", "--import=b.py", "--json", "--import", "c"]
    assert arguments.without_imports(args) == (["a", "b.py", "c"], ["plan", "x.py", "--json"])
    for wrong in (["--import"], ["--import", "--json"], ["--import="]):
        with pytest.raises(InputError, match="it needs a module"):
            arguments.without_imports(wrong)


def test_the_command_line_imports_before_it_does_anything(capsys):
    with mock.patch.object(parts, "load", autospec=True) as load, contextlib.suppress(SystemExit):
        assert commands.main(["--import", "x.py", "--version"]) == 0
    assert load.call_args_list == [mock.call("x.py")]
    assert capsys.readouterr().out.strip()
