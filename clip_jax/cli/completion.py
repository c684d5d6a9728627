"""Scripts with which bash and zsh complete the commands, options and values of `clip-jax`.

A script lists all words, since a command takes too long to import to be asked at each key. The
words are read from the commands' complete help.
"""

import contextlib
import io
import os
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from clip_jax.config_files import bundled_configs

Run = Callable[[Sequence[str]], int]
Shell = Literal["bash", "zsh"]
SHELLS: tuple[Shell, ...] = typing.get_args(Shell)

WITH_VERBS = ("scale", "bench")
# Commands that begin with a config. The options listed are those of this one, which reads pairs.
OF_CONFIG = ("train", "plan", "bench input", "bench step")
EXAMPLE = "pairs"

_SCRIPT = """\
# Written by `clip-jax completion {shell}`.
_clip_jax() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" first=2 words=""
    if [[ "$COMP_CWORD" -eq 1 ]]; then
        command="" first=1
    elif [[ "$COMP_CWORD" -gt 2 && " {with_verbs} " == *" $command "* ]]; then
        command="$command ${{COMP_WORDS[2]}}" first=3
    fi
    case "$command $previous" in
{values}
    esac
    if [[ -z "$words" && "$word" == -* ]]; then
        case "$command" in
{options}
        esac
    elif [[ -z "$words" && "$COMP_CWORD" -eq "$first" ]]; then
        case "$command" in
{first}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _clip_jax clip-jax
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Settings of `clip-jax completion`."""

    shell: Shell  # Shell that reads the script.


def script(shell: Shell, commands: Mapping[str, Run]) -> str:
    """Write the script of a shell. Other words than these are completed as paths."""
    configs = tuple(bundled_configs())
    first = {"": tuple(commands), "configs": configs, "completion": SHELLS}
    options: dict[str, Sequence[str]] = {}
    values: dict[str, Sequence[str]] = {}
    for name, run in commands.items():
        if name in WITH_VERBS:
            first[name] = tuple(re.findall(r"^  (\w+) ", _help(run, "--help"), re.M))
        for verb in first[name] if name in WITH_VERBS else ("",):
            command, args = f"{name} {verb}".strip(), [verb] if verb else []
            if command in OF_CONFIG:
                first[command] = configs
                args.append(EXAMPLE)
            choices = _options(_help(run, *args, "--help-all"))
            options[command] = tuple(choices)
            values |= {f"{command} {option}": words for option, words in choices.items() if words}
    text = _SCRIPT.format(
        shell=shell,
        with_verbs=" ".join(WITH_VERBS),
        values=_cases(values, 8),
        options=_cases(options, 12),
        first=_cases(first, 12),
    )
    return (_ZSH if shell == "zsh" else "") + text


def _help(run: Run, *args: str) -> str:
    printed = io.StringIO()
    os.environ["COLUMNS"] = "100"  # on a wide terminal, groups of options stand side by side
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run(args)
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())


def _options(text: str) -> dict[str, list[str]]:
    """Return the options that a help lists, each with its values if these are a closed set."""
    options = {}
    for names, choices in re.findall(r"^  (-[a-z-].*?)(?: \[?(\{[^}]*\}).*)?$", text, re.M):
        if option := re.search(r"--[a-z][\w.-]*", names):
            options[option[0]] = re.findall(r"[\w-]+", choices) if choices != "{None}" else []
    return options


def _cases(words: Mapping[str, Sequence[str]], indent: int) -> str:
    cases = (f'"{name}") words="{" ".join(x)}" ;;' for name, x in words.items())
    return textwrap.indent("\n".join(cases), " " * indent)
