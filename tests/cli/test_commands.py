"""Wrong use, and how the console script starts itself."""

import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from clip_jax import __main__ as console_script
from clip_jax.cli import arguments
from clip_jax.cli.commands import COMMANDS, demo, embed, main, search, train
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.inference.embed import EmbedConfig
from clip_jax.inference.search import SearchConfig
from clip_jax.serve.demo import DemoConfig
from clip_jax.storage.files import as_path
from clip_jax.train import Diverged, Preempted
from tests import words
from tests.conftest import DIGITS, ROOT

SCALE = ("ladder", "collect", "choose", "fit", "divide", "plan", "relate", "ranks", "report")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("nonsense", "no command 'nonsense'"),
        ("tarin configs/digits.py", "no command 'tarin'; .* Did you mean train"),
        ("train", "train needs a config file"),
        ("train nowhere.py", r"no config file at nowhere\.py"),
        ("train configs/digits.py --mesh.data 3", "does not use all 8 devices"),
        ("train configs/digits.py --batch-size 12", "batch_size=12 cannot be split over 8"),
        ("train configs/pairs.py --data.source.path no.csv", r"no\.csv"),
        ("evaluate nowhere", "there is no nowhere"),
        ("train configs/digits.py --optim.lr 1", "no option --optim.lr; use --optim.learning"),
        ("train configs/digits.py --num_train_epochs=3", "use --steps"),
        ("train configs/digits.py --train-data x", "use --data.source.path"),
        ("train configs/digits.py --model ViT-B-32", "use a config file with another model"),
        ("train configs/digits.py --output-dir x", "use --workdir"),
        ("train configs/digits.py --evals None", r"use evals=\(\) in a config file"),
        ("evaluate loop", r"loop has checkpoints but no config\.json"),
        ("prepare file.csv out", "SOURCE: .* 'image', only 'as it was'; set image_column"),
        ("prepare nowhere out", "SOURCE: nowhere does not exist"),
        (
            "scale nonsense",
            "scale needs ladder, collect, choose, fit, divide, plan, relate, ranks or report",
        ),
        ("bench nonsense", "bench needs input or step, not 'nonsense'"),
        ("bench input", "bench input needs a config file"),
        ("demo nowhere", r"pip install 'clip-jax-pods\[demo\]'"),
        # A destination is checked before anything is done.
        ("train configs/pairs.py --data.source.path no --workdir file/x", "file is a .* --workdir"),
        ("evaluate nowhere --output file/x", "file is a file, .* --output"),
        ("search nowhere nowhere --text x --sheet file/x.png", "file is a file, .* --sheet"),
        ("scale fit nowhere --plot file/x.png", "file is a file, .* --plot"),
        ("scale collect nowhere --output file/x", "file is a file, .* --output"),
        ("scale ladder configs/ladder_digits.py --root file/x", "file is a file, .* --root"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(command, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "loop/checkpoints").mkdir(parents=True)
    for name in ("file", "file.csv"):
        (tmp_path / name).write_text("as it was\nx\n")
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert re.search(says, printed.err), printed.err
    assert printed.err.count("\n") == 1
    assert bool(printed.out) == ("ladder" in command)  # which shows its runs first
    assert (tmp_path / "file").read_text() == "as it was\nx\n"


def test_all_flags_of_open_clip_in_a_command_are_translated_at_once(capsys):
    command = "train configs/digits.py --lock-image --precision amp --beta2=0.98 --lr 3 --lr 4"
    assert main(command.split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "clip-jax: there is no option --lock-image; use --optim.locked image.",
        "there is no option --precision; use --model.dtype bfloat16 or float32.",
        "there is no option --beta2; use --optim.b2.",
        "there is no option --lr; use --optim.learning-rate.",
    ]


@pytest.mark.parametrize(("end", "code"), [(Diverged("why"), 1), (Preempted("why"), 3)])
def test_what_ended_a_run_is_its_exit_code(end, code, capsys, monkeypatch, tmp_path):
    with (
        mock.patch("clip_jax.processes.start", autospec=True),
        mock.patch("clip_jax.train.train", autospec=True, side_effect=end),
    ):
        command = ["train", str(ROOT / "configs/digits.py"), "--workdir", str(tmp_path)]
        assert main(command) == code
    assert "why" in capsys.readouterr().err


def test_a_config_with_stages_is_read_and_flags_override_it(monkeypatch, tmp_path):
    """What a config computes from its fields, and keeps, is no setting."""
    monkeypatch.chdir(tmp_path)
    Path("staged.py").write_text(
        "from dataclasses import replace\n"
        "from clip_jax.config import StageConfig\n"
        "from clip_jax.config_files import load_config\n"
        "def get_config():\n"
        "    return replace(load_config('digits'), stages=(StageConfig(begin=0.5),))\n"
    )
    with (
        mock.patch("clip_jax.processes.start", autospec=True),
        mock.patch("clip_jax.train.train", autospec=True) as trained,
    ):
        assert main(["train", "staged.py", "--steps", "20"]) == 0
    config, workdir = trained.call_args.args
    assert config.first_steps == (0, 10)
    assert workdir == "runs/staged"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train configs/digits.py --optim.learning-rat 1", "--optim.learning-rate"),
        ("train configs/digits.py --batch-size 0", "batch_size=0 must be at least 2"),
        ("train configs/digits.py --batch-size many", "many"),
        ("train configs/digits.py --model.vision.num-heads 7", "vision.num_heads=7"),
        ("demo nowhere --port 65536", "must be at least 1 and at most 65535"),
    ],
)
def test_a_wrong_flag_is_explained_and_exits_with_2(command, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


FIRST = {  # arguments of each command before its flags
    "configs": [""],
    "sample-data": ["x"],
    "train": ["configs/digits.py"],
    "evaluate": ["x"],
    "predict": ["x"],
    "embed": ["x y z"],
    "search": ["x y"],
    "demo": ["x"],
    "serve": ["x"],
    "convert": ["x y"],
    "average": ["x y z"],
    "export": ["x y"],
    "prepare": ["x y"],
    "plan": ["configs/digits.py"],
    "scale": ["", *(f"{verb} x" for verb in SCALE)],
    "bench": ["", "input configs/digits.py", "step configs/digits.py"],
    "completion": ["bash"],
}


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *((f"{name} {first}", "--nope") for name, row in FIRST.items() for first in row),
        ("configs digits", "--nope"),
        *((command, "--json") for command in ("train configs/digits.py", "demo x", "serve x")),
    ],
)
def test_a_flag_that_a_command_does_not_know_is_refused(command, flag, capsys, monkeypatch):
    """One that is ignored, misspelt perhaps, gives a result of other settings than its user's."""
    assert FIRST.keys() == COMMANDS.keys()
    monkeypatch.chdir(ROOT)
    try:
        code = main([*command.split(), flag])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert flag in printed.err


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("None", None),
        ("a/b.png", Path("a/b.png")),
        ("gs://bucket/b.png", as_path("gs://bucket/b.png")),
    ],
)
def test_a_path_that_may_be_left_out_takes_urls_and_none(text, path):
    args = ["model", "embeddings", "--text", "a cat", "--sheet", text]
    config, _ = arguments.read(SearchConfig, args, ("model", "embeddings"), search)
    assert config.sheet == path
    assert type(config.sheet) is type(path)


def test_the_console_script_starts_itself_once_with_huge_pages():
    with (
        mock.patch.object(os, "execv", autospec=True) as execute,
        mock.patch.object(sys, "platform", "linux"),
        mock.patch.object(sys, "argv", ["clip-jax", "--version"]),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("GLIBC_TUNABLES", None)
        assert console_script.main() == 0
        execute.assert_called_once_with(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
        assert console_script.main() == 0
        execute.assert_called_once()


# Commands with all their arguments; the help of those with few options is complete.
SHORTENED = {
    "train": "train configs/pairs.py",
    "plan": "plan configs/digits.py",
    "evaluate": "evaluate runs/x",
    "prepare": "prepare a b",
    "average": "average a b c",
    "bench input": "bench input configs/pairs.py",
    "bench step": "bench step configs/pairs.py",
}


def printed_help(print_it: Callable[[], object]) -> str:
    """What a call prints without a terminal's encoding, for which boxes are drawn in ASCII."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit),
    ):
        print_it()
    return printed.getvalue()


@functools.cache
def complete_help(command: str) -> str:
    return printed_help(lambda: main([*command.split(), "--help-all"]))


def test_help_shows_the_options_used_most_and_help_all_every_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")  # on which groups of options stand side by side
    monkeypatch.chdir(ROOT)
    assert {command.split()[0] for command in SHORTENED} == arguments._MOST_USED.keys()
    shown = {}
    for name, command in SHORTENED.items():
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        text, complete = capsys.readouterr().out, complete_help(command)
        shown[name] = re.findall(r"^  --([a-z][\w.-]*)", text, re.M)
        count = int(re.search(r"All (\d+) options: clip-jax .* --help-all", text)[1])
        assert len(re.findall(r"^  --[a-z]", complete, re.M)) == count
        is_run = "configs/" in command
        assert ("  model.vision: ViTConfig | ResNetConfig | " in complete) == is_run
    for name, few in arguments._MOST_USED.items():
        if name != "bench":
            assert [option for option in shown[name] if option != "json"] == [*few]
    of_bench = {*shown["bench input"], *shown["bench step"]}
    assert of_bench - {"json"} == {*arguments._MOST_USED["bench"]}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


def test_help_without_a_config_shows_where_data_of_ones_own_go(capsys):
    text = help_of("train", capsys)
    assert "\n  CONFIG  Config file" in text
    assert "Defaults below: those of the config pairs." in " ".join(text.split())
    assert "\n  --data.source.path STR\n" in text
    assert "runs/CONFIG)" in text


@pytest.mark.parametrize(
    ("command", "usage", "arguments"),
    [
        ("predict", "MODEL", {"MODEL": "required"}),
        ("embed", "MODEL SOURCE OUTPUT", {"MODEL": "required", "OUTPUT": "required"}),
        ("average", "MODEL ... OUTPUT", {"MODEL": "default: empty", "OUTPUT": "required"}),
        ("scale fit", "[TABLE]", {"TABLE": "default: scaling.csv"}),
        ("configs", "[NAME ...]", {"NAME": "default: empty"}),
    ],
)
def test_help_lists_arguments_by_the_names_of_the_usage(command, usage, arguments, capsys):
    text = help_of(command, capsys)
    assert text.startswith(f"usage: clip-jax {command} {usage} [OPTIONS]\n")
    block = re.search(r"\narguments:\n(.*?)\n\n", text, re.S)[1]
    for name, hint in arguments.items():
        (about,) = re.findall(rf"^  {name}(?: .*)?(?:\n   .*)*", block, re.M)
        assert " ".join(about.split()).endswith(f"({hint})")
        assert f"--{name.lower()} " not in text


def test_values_by_position_and_by_flag_are_the_same():
    by_flag = ["--model", "runs/x", "--embeddings", "y", "--text", "a cat"]
    read = functools.partial(arguments.read, SearchConfig, positional=("model", "embeddings"))
    for args in (["runs/x", "y", "--text", "a cat"], by_flag):
        config, _ = read(args, command=search)
        assert (config.model, config.embeddings) == (Path("runs/x"), Path("y"))


def test_a_missing_argument_is_named_as_in_the_usage(capsys):
    with pytest.raises(SystemExit):
        main(["embed", "runs/x"])
    assert re.search(r"^.? +SOURCE *.?$", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(("group", "verbs"), [("scale", SCALE), ("bench", ("input", "step"))])
def test_the_help_of_each_verb_begins_with_its_own_sentence(group, verbs, capsys):
    listing = dict(re.findall(r"^  (\w+) +(.*)$", help_of(group, capsys), re.M))
    assert listing.keys() == {*verbs}
    for verb, about in listing.items():
        sentence = " ".join(help_of(f"{group} {verb}", capsys).split("\n\n")[1].split())
        assert sentence.startswith(f"{about}: clip-jax {group} {verb} ")


def test_json_is_among_the_options_of_the_commands_that_take_it(capsys):
    commands = [name for name in COMMANDS if name not in ("scale", "bench")]
    verbs = [*(f"scale {verb}" for verb in SCALE), "bench input", "bench step"]
    takers = {
        name for name in [*commands, *verbs] if re.search(r"\n  --json\s", help_of(name, capsys))
    }
    without = {"train", "demo", "serve", "completion"}
    assert {*commands, *verbs} - takers == without


def commands_of(path: Path) -> list[list[str]]:
    """The commands in a config's docstring, without what a shell reads."""
    note = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
    lines = [line.strip() for line in note.splitlines() if line.startswith("    clip-jax ")]
    parts = [part for line in lines for part in re.sub(" +#.*", "", line).split(" && ")]
    return [shlex.split(part)[1:] for part in parts]


def has_field(config: object, option: str) -> bool:
    """Say whether a config has the field of an option, such as evals.0.dataset."""
    for name in option.replace("-", "_").split("."):
        if isinstance(config, tuple) and name.isdecimal() and int(name) < len(config):
            config = config[int(name)]
        elif dataclasses.is_dataclass(config) and hasattr(config, name):
            config = getattr(config, name)
        else:
            return False
    return True


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda x: x.stem)
def test_the_commands_of_a_configs_note_use_options_that_exist(path):
    commands = commands_of(path)
    assert commands
    for name, *args in commands:
        if name in ("scale", "bench"):
            name = f"{name} {args.pop(0)}"
        of_config = name in ("train", "plan", "bench step")
        config = load_config(args[0]) if of_config and not args[0].endswith(".json") else None
        for flag in (arg for arg in args if arg.startswith("--")):
            if not has_field(config, flag.removeprefix("--")):
                text = complete_help(f"{name} pairs" if of_config else name)
                assert re.search(rf"^  (?:.*, )?{flag}\b", text, re.M), (name, flag)


WITH_HELP = [
    *SHORTENED.values(),
    *(f"scale {verb}" for verb in SCALE),
    *("predict", "embed", "search", "demo", "serve", "convert", "export"),
    *("sample-data", "configs", "completion"),
]


def components(value: object) -> dict[type, object]:
    """One of each dataclass in a config that has options."""
    if isinstance(value, tuple):
        return {kind: x for part in value for kind, x in components(part).items()}
    if not dataclasses.is_dataclass(value) or not vars(value):
        return {}
    return components(tuple(vars(value).values())) | {type(value): value}


def assert_stands_alone(help_text: str) -> None:
    """Each option's text is a phrase of its own, and does not go on where its name ends."""
    joined = re.sub(r", *\n  (?! )", ", ", help_text)  # long names go on in a second line
    pattern = r"^  (?:--[a-z]|(?!CONFIG)[A-Z]{3,}).*\n(?: {6}.*\n)*"  # options and arguments
    blocks = re.findall(pattern, joined, re.M)
    assert blocks
    for block in blocks:
        option, text = re.split(r" {2,}|\n +", block.strip(), maxsplit=1)
        text = " ".join(text.split())
        assert re.match(r"[A-Z0-9\"`\[]", text), (option, text)
        assert not re.match(r"(Of|Which|Whose|None)\b", text), (option, text)
        assert re.search(r"\. \((default|required|repeatable).*\)$", text), (option, text)
        assert not words.in_text(text)


@pytest.mark.parametrize("command", WITH_HELP)
def test_every_help_text_stands_alone(command):
    assert_stands_alone(complete_help(command))


def test_help_texts_of_every_component_of_a_bundled_config_stand_alone():
    """Those that the commands above do not show, each by itself."""
    paths = [x for x in (ROOT / "configs").glob("[!_]*.py") if not x.name.startswith("ladder_")]
    every = components(tuple(map(load_config, sorted(paths))))
    shown = components((load_config(ROOT / "configs/pairs.py"), load_config(DIGITS)))
    assert len(every) > len(shown) + 15
    for kind in every.keys() - shown.keys():
        read = functools.partial(arguments.parse, kind, ["--help-all"], "train", train)
        assert_stands_alone(printed_help(functools.partial(read, every[kind])))


def test_bundled_configs_are_listed_and_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["configs"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^digits\n  .*\n  Hardware: two CPU cores", text, re.M)
    assert main(["configs", "digits"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/digits.py").read_text()
    assert main(["configs", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)
    assert notes.keys() == {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    assert all(note["Hardware"].endswith(".") for note in notes.values())
    assert notes["vit_b16"]["Expected"].endswith("evaluation of the released weights).")
    assert main(["configs", "digits", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == {"digits": notes["digits"] | {"python": (ROOT / "configs/digits.py").read_text()}}
    assert main(["configs", "digit"]) == 2
    assert "no config 'digit'; choose from" in capsys.readouterr().err


def test_on_a_terminal_the_first_line_comes_at_once(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["evaluate", "nowhere"])
    assert capsys.readouterr().err.startswith("clip-jax: starting evaluate ...\n")


def test_json_is_printed_on_request_alone():
    for args, as_json in ((["nowhere"], False), (["nowhere", "--json"], True)):
        assert arguments.read(DemoConfig, args, ("model",), demo)[1] is as_json


def test_a_former_name_of_an_option_works_and_the_warning_names_the_present_one(capsys):
    config = load_config(DIGITS)
    args = ["--optim.image-rate", "0.5", "--data.window=7", "--steps", "9"]
    read = arguments.parse(Config, args, "train", train, config)
    assert (read.optim.image_learning_rate_scale, read.data.shuffle_blocks, read.steps) == (
        0.5,
        7,
        9,
    )
    rows = capsys.readouterr().err.splitlines()
    assert len(rows) == 2
    assert "--optim.image-rate is now --optim.image-learning-rate-scale. The former" in rows[0]
    assert "--data.window is now --data.shuffle-blocks" in rows[1]
    args = ["model", "in", "out", "--part", "1/2"]
    config, _ = arguments.read(EmbedConfig, args, ("model", "source", "output"), embed)
    assert config.worker == "1/2"
    assert "--part is now --worker" in capsys.readouterr().err
