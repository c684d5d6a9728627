"""One sub-command per verb; each only parses and calls one function.

Exit codes: 0 done, 1 a bug or a failed check, 2 wrong use or input, 3 preempted after saving.
"""

import dataclasses
import itertools
import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

USAGE = """\
usage: clip-jax COMMAND [...]

CLIP in JAX: train it, evaluate it, use it, carry the weights both ways.

commands:
{commands}

`clip-jax COMMAND --help` says what a command takes.
"""

SCALE_USAGE = """\
usage: clip-jax scale VERB [...]

Scaling experiments: train a ladder of runs, gather them, fit a law, ask the law.

  ladder SPEC        train models x samples x seeds, what is missing of it (--dry-run: the price)
  collect RUN ...    gather finished runs into one table
  fit TABLE          fit a law, with intervals; predict runs, spend a budget, draw

`clip-jax scale VERB --help` says what a verb takes.
"""

BENCH_USAGE = """\
usage: clip-jax bench VERB CONFIG [...]

What this machine does a second, with a run's config.

  input    samples of each stage of reading, of the whole pipeline, and what limits it
  step     training steps on made-up data: pairs, MFU, memory (CPU, GPU, TPU)
  loss     the loss alone with its gradients

`clip-jax bench VERB --help` says what a verb takes.
"""


def train(args: Sequence[str]) -> int:
    """train a model from a config file: clip-jax train configs/digits.py"""
    from clip_jax.config import Config

    @dataclass(frozen=True, kw_only=True)
    class Run(Config):
        workdir: str  # where the run lives, or gs://...; the same command again resumes it

    path = Path(_leading(args)[0] if _leading(args) else "config")
    # A run's own config.json means that run.
    workdir = path.parent if path.name == "config.json" else Path("runs") / path.stem
    given = _fields(_run_config(Run, args, train, "train", workdir=str(workdir)))
    workdir = given.pop("workdir")

    from clip_jax import processes
    from clip_jax.train import Diverged, Preempted
    from clip_jax.train import train as run_training

    processes.start(given["processes"])
    try:
        run_training(Config(**given), workdir)
    except Diverged as error:
        return _say(str(error), code=1)
    except Preempted as error:
        return _say(str(error), code=3)
    return 0


def evaluate(args: Sequence[str]) -> int:
    """evaluate a run, a model folder or a foreign file: clip-jax evaluate MODEL"""
    from clip_jax.evals.report import to_table
    from clip_jax.evaluate import EvaluateConfig
    from clip_jax.evaluate import evaluate as run_evaluation

    config, as_json = _command(EvaluateConfig, args, ("model",), evaluate)
    values = run_evaluation(config)
    _print(values, as_json, to_table(values))
    return 0


def predict(args: Sequence[str]) -> int:
    """label images zero-shot: clip-jax predict MODEL --images photos --labels cat dog"""
    from clip_jax.predict import PredictConfig
    from clip_jax.predict import predict as run_prediction

    config, as_json = _command(PredictConfig, args, ("model",), predict)
    results = run_prediction(config)
    lines = [
        f"{result['image']:<32} "
        + "  ".join(f"{x['label']} {x['probability']:.1%}" for x in result["labels"][:5])
        for result in results
    ]
    _print(results, as_json, "\n".join(lines))
    return 0


def embed(args: Sequence[str]) -> int:
    """embed a folder, table or tars to Parquet: clip-jax embed MODEL SOURCE OUTPUT"""
    from clip_jax.predict import EmbedConfig
    from clip_jax.predict import embed as run_embedding

    config, as_json = _command(EmbedConfig, args, ("model", "source", "output"), embed)
    result = run_embedding(config)
    for line in result["skipped"]:
        print(f"skipped {line['key']}: {line['reason']}", file=sys.stderr)
    _print(result, as_json, f"{result['images']} images in {result['output']}")
    return 0


def search(args: Sequence[str]) -> int:
    """search an embedded folder: clip-jax search MODEL EMBEDDINGS --text 'a red bicycle'"""
    from clip_jax.predict import SearchConfig
    from clip_jax.predict import search as run_search

    config, as_json = _command(SearchConfig, args, ("model", "embeddings"), search)
    results = run_search(config)
    _print(results, as_json, "\n".join(f"{x['similarity']:.4f}  {x['key']}" for x in results))
    return 0


def demo(args: Sequence[str]) -> int:
    """serve a page that labels and searches: clip-jax demo MODEL --embeddings EMBEDDINGS"""
    from clip_jax.demo import DemoConfig
    from clip_jax.demo import demo as serve

    config, _ = _command(DemoConfig, args, ("model",), demo)
    serve(config)
    return 0


def convert(args: Sequence[str]) -> int:
    """convert weights and prove it: clip-jax convert SRC DST --to hugging-face --verify"""
    from clip_jax.load import ConvertConfig
    from clip_jax.load import convert as run_conversion

    config, as_json = _command(ConvertConfig, args, ("source", "destination"), convert)
    found = run_conversion(config)
    if found is None:
        _print({"destination": str(config.destination)}, as_json, f"wrote {config.destination}")
        return 0
    values = dataclasses.asdict(found) | {"max_relative_difference": found.max_relative_difference}
    _print(values, as_json, "\n".join(f"{name:<24} {value}" for name, value in values.items()))
    return 0 if found.passed else 1


def scale(args: Sequence[str]) -> int:
    """scaling laws: clip-jax scale ladder SPEC, scale collect RUN ..., scale fit TABLE"""
    verb, rest = (args[0], args[1:]) if args else ("", [])
    if verb in ("-h", "--help"):
        print(SCALE_USAGE)
        return 0
    if verb == "ladder":
        return _ladder(rest)
    from clip_jax import scale as scaling

    if verb == "fit":
        config, as_json = _command(scaling.FitConfig, rest, ("table",), scale, "scale fit")
        result = scaling.fit(config)
        _print(result, as_json, scaling.describe(result))
    elif verb == "collect":
        paths = _leading(rest)
        rest = [*(["--paths", *paths] if paths else []), *rest[len(paths) :]]
        config, as_json = _command(scaling.CollectConfig, rest, (), scale, "scale collect")
        result = scaling.collect(config)
        _print(result, as_json, f"{result['rows']} runs in {result['table']}")
        for line in result["skipped"]:
            print(f"left out: {line}", file=sys.stderr)
    else:
        raise ValueError(f"scale needs one of ladder, collect, fit; got {verb or 'nothing'!r}.")
    return 0


def _ladder(args: Sequence[str]) -> int:
    from clip_jax.jobs import Stopped
    from clip_jax.ladder import LadderCommand, climb

    config, as_json = _command(LadderCommand, args, ("spec",), scale, "scale ladder")
    stream = sys.stderr if as_json else sys.stdout
    try:
        result = climb(config, lambda line: print(line, file=stream, flush=True))
    except Stopped as stopped:
        return _say(str(stopped), code=3)
    if as_json:
        print(json.dumps(result))
    failures = [point for point in result["points"] if point["failure"]]
    for point in failures:
        print(f"failed: {point['name']}: {point['failure']}", file=sys.stderr)
    left = [point for point in result["points"] if not point["done"]]
    if not left:
        print(f"next: clip-jax scale collect {result['root']}", file=sys.stderr)
    return 1 if failures else 0


def plan(args: Sequence[str]) -> int:
    """what a run takes on a pod you don't have: clip-jax plan CONFIG --topology v5e:16x16"""
    from clip_jax.plan import PlanConfig
    from clip_jax.plan import plan as make_plan
    from clip_jax.scaling.pods import compare, describe

    as_json = "--json" in args
    rest = [arg for arg in args if arg != "--json"]
    plans = make_plan(_run_config(PlanConfig, rest, plan, "plan"))
    values = plans[0].to_json()
    text = describe(plans[0])
    if len(plans) > 1:
        values["compared"] = [x.to_json() for x in plans[1:]]
        text += "\n" + compare(plans)
    _print(values, as_json, text)
    return 0


def prepare(args: Sequence[str]) -> int:
    """any image-text set to ArrayRecord shards: clip-jax prepare SRC DST; --inspect only looks"""
    from clip_jax.data import writer

    config, as_json = _command(writer.PrepareConfig, args, ("source", "destination"), prepare)
    result = writer.inspect(config) if config.inspect else writer.prepare(config)
    _print(result, as_json, writer.describe(result))
    return 0


def bench(args: Sequence[str]) -> int:
    """measure this machine: clip-jax bench input CONFIG, bench step CONFIG, bench loss CONFIG"""
    from clip_jax import bench as benches

    verb, rest = (args[0], args[1:]) if args else ("", [])
    if verb in ("-h", "--help"):
        print(BENCH_USAGE)
        return 0
    if verb not in benches.BENCHES:
        raise ValueError(
            f"bench needs one of {', '.join(benches.BENCHES)}; got {verb or 'nothing'!r}."
        )
    kind, measure, describe = benches.BENCHES[verb]
    flags = [arg for arg in rest if arg != "--json"]
    config = _run_config(kind, flags, bench, f"bench {verb}")
    if verb != "input":  # which computes on no device
        from clip_jax import processes

        processes.start(config.processes)  # with the flags that training takes
    result = measure(config)
    _print(result, len(flags) < len(rest), describe(result))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "search": search,
    "demo": demo,
    "convert": convert,
    "prepare": prepare,
    "plan": plan,
    "scale": scale,
    "bench": bench,
}


def _leading(args: Sequence[str]) -> list[str]:
    """Return what stands before the first flag."""
    return list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))


def _command(
    kind: Any, args: Sequence[str], positional: Sequence[str], command: FunctionType, verb: str = ""
) -> tuple[Any, bool]:
    """Read a command's config, its first fields by position; say whether --json was given."""
    rest = [arg for arg in args if arg != "--json"]
    values = _leading(rest)[: len(positional)]
    names = positional[: len(values)]
    flags = [part for pair in zip(names, values, strict=True) for part in (f"--{pair[0]}", pair[1])]
    verb = " ".join([verb or command.__name__, *(name.upper() for name in positional)])
    config = _parse(kind, [*flags, *rest[len(values) :]], f"{verb} [--json]", command)
    return config, len(rest) < len(args)


def _run_config(
    kind: Any, args: Sequence[str], command: FunctionType, verb: str, **defaults: Any
) -> Any:
    """Read a config file and the flags over it into `kind`, a Config with fields of its own."""
    from clip_jax.config import Config, load_config

    path = _leading(args)[0] if _leading(args) else None
    rest = list(args[1:] if path else args)
    if path is None and not {"-h", "--help"} & set(rest):
        raise ValueError(f"{verb} needs a config file: clip-jax {verb} configs/digits.py")
    default = load_config(path) if path else Config()
    return _parse(kind, rest, f"{verb} CONFIG", command, kind(**_fields(default), **defaults))


def _print(values: Any, as_json: bool, text: str) -> None:
    print(json.dumps(values) if as_json else text)


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
        config=(tyro.conf.AvoidSubcommands,),
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
    try:
        code = _run(args)
        sys.stdout.flush()
        return _together(code)
    except (ValueError, KeyError) as error:
        if not _ours(error):
            return _failed(error)
        return _together(_say(str(error.args[0] if error.args else error), code=2))
    except KeyboardInterrupt:
        return _together(_say("interrupted; the newest checkpoint is intact.", code=130))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return _together(141)  # as a shell reports SIGPIPE
        return _failed(error)


def _run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        listing = "\n".join(
            f"  {name:<10} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()
        )
        print(USAGE.format(commands=listing))
        return 0
    if args[0] == "--version":
        from clip_jax import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        return _say(f"no command {args[0]!r}; there are {', '.join(COMMANDS)}.", code=2)
    return COMMANDS[args[0]](args[1:])


def _unread() -> bool:
    """Say whether the reader of the output, `head` say, has left; if so, drop the rest of it."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    if left := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _together(code: int) -> int:
    """Return the exit code; with other processes that may wait for this one, leave at once."""
    processes = sys.modules.get("clip_jax.processes")  # none is there without it
    return processes.leave(code) if processes and code not in (0, 3) else code


def _failed(error: Exception) -> int:
    """Let Python report a bug, unless its way out is through other processes."""
    processes = sys.modules.get("clip_jax.processes")
    if not processes or processes.is_alone():
        raise error
    traceback.print_exception(error)
    return _together(1)
