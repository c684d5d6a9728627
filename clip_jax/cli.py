"""One sub-command per verb; each only parses and calls one function.

Exit codes: 0 done, 1 a bug or a failed check, 2 wrong use or input, 3 preempted after saving.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USAGE = """\
usage: clip-jax COMMAND [...]

CLIP in JAX: train it, evaluate it, use it, carry the weights both ways.

commands:
{commands}

`clip-jax COMMAND --help` says what a command takes.
"""


def train(args: Sequence[str]) -> int:
    """train a model from a config file: clip-jax train configs/digits.py"""
    from clip_jax.config import Config, load_config

    path, rest = _config_path(args)
    if path is None and not {"-h", "--help"} & set(rest):
        raise ValueError("train needs a config file: clip-jax train configs/digits.py")
    default = load_config(path) if path else Config()

    @dataclass(frozen=True, kw_only=True)
    class Run(Config):
        workdir: Path  # where the run lives; the same command again resumes it

    default = Run(**_fields(default), workdir=Path("runs") / Path(path or "config").stem)
    given = _fields(_parse(Run, rest, "train CONFIG", train, default))
    workdir = given.pop("workdir")

    from clip_jax.train import Diverged, Preempted
    from clip_jax.train import train as run_training

    try:
        run_training(Config(**given), workdir)
    except Diverged as error:
        return _say(str(error), code=1)
    except Preempted as error:
        return _say(str(error), code=3)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train}


def _config_path(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the config file, the first argument, from the flags."""
    if args and not args[0].startswith("-"):
        return args[0], list(args[1:])
    return None, list(args)


def _fields(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def _parse(
    kind: Any, args: Sequence[str], verb: str, command: Callable, default: Any = None
) -> Any:
    """Read flags into a dataclass with tyro; it prints its own errors and exits with 2."""
    import tyro

    return tyro.cli(
        kind,
        prog=f"clip-jax {verb}",
        description=(command.__doc__ or "").strip(),
        args=list(args),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        **({} if default is None else {"default": default}),
    )


def _say(message: str, code: int) -> int:
    print(f"clip-jax: {message}", file=sys.stderr)
    return code


def _ours(error: BaseException) -> bool:
    """Say whether our own code raised the error on purpose, rather than a library underneath."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return bool(frame) and frame.tb_frame.f_globals.get("__name__", "").startswith("clip_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(
        f"  {name:<10} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()
    )
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands=listing))
        return 0
    if args[0] == "--version":
        from clip_jax import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        return _say(f"no command {args[0]!r}; there are {', '.join(COMMANDS)}.", code=2)
    try:
        return COMMANDS[args[0]](args[1:])
    except (ValueError, KeyError) as error:
        if not _ours(error):
            raise
        return _say(str(error.args[0] if error.args else error), code=2)
    except KeyboardInterrupt:
        return _say("interrupted; the newest checkpoint is intact.", code=130)
