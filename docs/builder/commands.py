"""The pages of the commands: one for each, with its options, exit codes and printed help."""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

from builder import settings

# What the code does not say: the page that shows a command at work, and an example.
HOW_TO = {
    "configs": ("how-to/train.md", "Train"),
    "sample-data": ("tutorials/your-data.md", "Your data"),
    "train": ("how-to/train.md", "Train"),
    "evaluate": ("how-to/evaluate.md", "Evaluate"),
    "predict": ("how-to/command-line.md", "Label, embed, search"),
    "embed": ("how-to/command-line.md", "Label, embed, search"),
    "search": ("how-to/command-line.md", "Label, embed, search"),
    "demo": ("how-to/command-line.md", "Label, embed, search"),
    "serve": ("how-to/serve.md", "Serve a model"),
    "convert": ("how-to/weights.md", "Convert weights"),
    "export": ("how-to/export.md", "Export to ONNX and StableHLO"),
    "prepare": ("how-to/prepare.md", "Prepare at any scale"),
    "plan": ("how-to/pods.md", "Plan and run on pods"),
    "bench": ("how-to/pods.md", "Plan and run on pods"),
    "scale": ("how-to/scale.md", "Fit scaling laws"),
    "completion": ("install.md", "Install"),
}
EXAMPLES = {
    "configs": "clip-jax configs",
    "sample-data": "clip-jax sample-data shapes",
    "train": "clip-jax train digits",
    "evaluate": "clip-jax evaluate runs/digits",
    "predict": "clip-jax predict runs/digits --images photos --labels seven forty-two",
    "embed": "clip-jax embed runs/digits photos embedded",
    "search": 'clip-jax search runs/digits embedded --text "a red bicycle"',
    "demo": "clip-jax demo runs/digits",
    "serve": "clip-jax serve runs/digits",
    "convert": "clip-jax convert runs/digits hugging-face --to hugging-face --verify",
    "export": "clip-jax export runs/digits onnx --format onnx --verify",
    "prepare": "clip-jax prepare pairs.csv prepared",
    "plan": "clip-jax plan vit_b16 --topology v5e:16x16",
    "scale ladder": "clip-jax scale ladder ladder_digits --dry-run",
    "scale collect": "clip-jax scale collect runs/ladder_digits",
    "scale choose": "clip-jax scale choose scaling.csv --choose-by info_nce --report loss",
    "scale fit": "clip-jax scale fit scaling.csv --metric info_nce --predict ViT-L-14@1B",
    "scale divide": "clip-jax scale divide scaling.csv --metric info_nce --budget 1e21",
    "scale plan": "clip-jax scale plan scaling.csv --metric info_nce --budget 300chip-hours",
    "scale relate": "clip-jax scale relate scaling.csv --metric top1 --against info_nce",
    "scale ranks": "clip-jax scale ranks scaling.csv --metric top1 --methods data",
    "scale report": "clip-jax scale report runs/ladder_digits",
    "bench input": "clip-jax bench input digits",
    "bench step": "clip-jax bench step digits",
}
CODES = {  # exit codes with a meaning of their own
    "train": {
        1: "The loss or the gradient is not finite, or the run made no progress for "
        "`--processes.watchdog-minutes`.",
        2: "Also after `--processes.max-starts` starts in a row without a new checkpoint.",
        3: "Preempted (SIGTERM) after saving a checkpoint; run the same command again.",
    },
    "convert": {1: "`--verify` found a difference above its bound."},
    "export": {1: "`--verify` found a difference above its bound."},
    "scale ladder": {
        1: "A point failed; the other points were trained.",
        3: "Preempted (SIGTERM); run the same command again.",
    },
}
GENERAL = """\
| Exit code | Meaning |
|---|---|
| 0 | Done. |
| 1 | A failed check, or a bug, which prints its traceback. |
| 2 | Invalid options or input; the message says what to change. |
| 3 | Preempted after saving: run the same command again. |
| 75 | A bucket did not respond for three minutes: run the same command again. |
| 130 | Interrupted by Ctrl-C. |
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, or a verb of one, as its page shows it."""

    name: str
    summary: str
    example: str
    help: str
    kind: type | None  # its config; None for a command with verbs
    positional: tuple[str, ...]

    @property
    def page(self) -> str:
        return self.name.replace(" ", "-") + ".md"


def printed(*command: str) -> tuple[str, Any]:
    """Return what a command prints with `--help`, and the call that parsed its options."""
    from clip_jax.cli import arguments, commands

    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80"),  # as wide as a block of code
        mock.patch.object(arguments, "parse", autospec=True, side_effect=arguments.parse) as parse,
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        commands.main([*command, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    return "\n".join(line.rstrip() for line in plain.splitlines()), parse.call_args


def read(name: str, doc: str) -> list[Command]:
    """Return a command, followed by its verbs."""
    said, _, example = doc.strip().partition(": clip-jax")
    text, call = printed(*name.split())
    example = EXAMPLES.get(name, f"clip-jax{example}")
    kind = call.args[0] if call else None
    positional = tuple(call.args[6]) if call else ()
    command = Command(name, said.strip(), example, text, kind, positional)
    if kind:
        return [command]
    verbs = re.findall(r"^  (\w[\w-]*) +(.*)$", text, re.M)
    return [command, *(x for verb, does in verbs for x in read(f"{name} {verb}", does))]


def all_commands() -> list[Command]:
    """Return all commands in the order of `clip-jax --help`, verbs after their command."""
    from clip_jax.cli.commands import COMMANDS

    return [x for name, run in COMMANDS.items() for x in read(name, run.__doc__ or "")]


def sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else text + "."


PAGE_OF: dict[type, type] = {}  # the command with the anchor of a base of several commands


def options(command: Command, links: Mapping[type, str]) -> str:
    """Write the table of a command's own options, and where the others are."""
    from clip_jax.config import Config

    kind = command.kind
    assert kind is not None
    is_run = issubclass(kind, Config)
    bases = [
        f"[](){{#{base.__name__}}}"
        for base in kind.__mro__
        if dataclasses.is_dataclass(base) and base not in links
        and PAGE_OF.setdefault(base, kind) is kind
    ]  # fmt: skip
    lines = ["".join(bases) + "\n", "## Options\n"]
    without = settings.hints(Config) if is_run else ()
    use = settings.Use(command.name)
    lines.append(settings.table(kind, [use], links, without, command.positional))
    if is_run:
        lines.append(
            f"All fields of [Config]({links[Config]}) are options, too: see "
            "[Settings](../settings/index.md). `CONFIG` is a config file or the name of a bundled "
            "config; for a run's own `config.json`, the run is resumed.\n"
        )
    if "--json" in command.help:
        lines.append(
            "`--json` prints one JSON object on standard output, everything else on standard "
            "error.\n"
        )
    return "\n".join(lines)


def bundled() -> str:
    """Write the table of the bundled configs, from the docstrings of their files."""
    from clip_jax.config_files import bundled_configs, lab_note

    lines = [
        "## Bundled configs\n",
        "| Config | Trains | Hardware, time, cost | Expected result |",
        "|---|---|---|---|",
    ]
    for name, path in bundled_configs().items():
        note = lab_note(path)
        cells = (note.get(label, "") for label in ("about", "Hardware", "Expected"))
        lines.append(
            " | ".join([f"| `{name}`", *(settings.cell(settings.escape(x)) for x in cells)]) + " |"
        )
    return "\n".join([*lines, ""])


def page(command: Command, verbs: list[Command], links: Mapping[type, str]) -> str:
    """Write the page of a command."""
    name, title = HOW_TO.get(command.name.split()[0], ("how-to/command-line.md", "Command line"))
    lines = [settings.HIDE, f"# clip-jax {command.name}\n", sentence(command.summary) + "\n"]
    if verbs:
        lines += ["| Verb | Does |", "|---|---|"]
        lines += [f"| [{x.name}]({x.page}) | {sentence(x.summary)} |" for x in verbs]
        lines.append("")
    else:
        lines.append(f"```shell\n{command.example}\n```\n")
    lines.append(f"How to: [{title}](../../{name}).\n")
    if codes := CODES.get(command.name):
        lines += ["| Exit code | Meaning |", "|---|---|"]
        lines += [f"| {code} | {text} |" for code, text in codes.items()]
        lines.append("\nOther codes: [all commands](index.md#exit-codes).\n")
    if command.name == "configs":
        lines.append(bundled())
    if command.kind:
        lines.append(options(command, links))
    lines.append(f"## Printed help\n\n```text\n{command.help}\n```\n")
    return "\n".join(lines)


def index(commands: list[Command]) -> str:
    """List all commands."""
    lines = [settings.HIDE, "# Commands\n", "| Command | Does | How to |", "|---|---|---|"]
    for command in commands:
        name, title = HOW_TO.get(command.name.split()[0], ("", ""))
        link = f"[{title}](../../{name})" if name else ""
        lines.append(
            f"| [`{command.name}`]({command.page}) | {sentence(command.summary)} | {link} |"
        )
    lines.append("\n`clip-jax COMMAND --help` prints the options; `--version` the version.\n")
    return "\n".join([*lines, "## Exit codes\n", GENERAL])


def pages(commands: list[Command], links: Mapping[type, str]) -> dict[str, str]:
    """Write the pages of all commands, by file name."""
    texts = {"index.md": index(commands)}
    for command in commands:
        verbs = [x for x in commands if x.name.startswith(f"{command.name} ")]
        texts[command.page] = page(command, verbs, links)
    return texts
