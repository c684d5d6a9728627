"""The sub-commands of `clip-jax`; each parses its arguments and calls one function.

Exit codes: 0 done, 1 a bug or a failed check, 2 wrong use or input, 3 preempted after saving, 75 a
bucket did not respond (run it again).
"""

import dataclasses
import difflib
import errno
import functools
import os
import re
import select
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax import parts
from clip_jax.cli import arguments
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.serialize import to_json
from clip_jax.storage.errors import Unreachable, explained

USAGE = """\
usage: clip-jax COMMAND [...]

CLIP in JAX: train, evaluate, use and convert models.

commands:
{commands}

`clip-jax COMMAND --help` lists the options that are used most, `--help-all` all of them.
`--import MODULE`, before or after COMMAND, makes the losses, towers, data sources, evaluators,
optimizers and tokenizers of your own module known (repeat it for several modules).
"""

GROUP_USAGE = """\
usage: clip-jax {group} VERB [...]

{about}

{verbs}

`clip-jax {group} VERB --help` lists the options of a verb.
"""


def train(args: Sequence[str]) -> int:
    """Train a model from a config file: clip-jax train digits"""
    from clip_jax.config import Config

    @dataclass(frozen=True, kw_only=True)
    class Run(Config):
        workdir: str  # Run directory, local or gs://, s3://; the same command resumes the run.

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.workdir.strip():
                raise InputError(f"workdir={self.workdir!r} is empty; set a folder or gs://...")

    path = Path(arguments.leading(args)[0] if arguments.leading(args) else "CONFIG")
    # The config.json of a run resumes that run.
    workdir = path.parent if path.name == "config.json" else Path("runs") / path.stem
    run = arguments.read_run(Run, args, train, "train", workdir=str(workdir))
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(run, name) for name in names})

    from clip_jax import processes
    from clip_jax.train import Diverged, LostProcess, Preempted
    from clip_jax.train import train as run_training

    try:
        with processes.interruptible():
            processes.start(config.processes)
            run_training(config, run.workdir)
    except (Diverged, LostProcess) as error:
        return _end(str(error), code=1)
    except Preempted as error:
        return _end(str(error), code=3)
    return 0


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a run, model folder or weight file: clip-jax evaluate MODEL [--watch]"""
    from clip_jax import processes
    from clip_jax.evals.results import to_table
    from clip_jax.inference.evaluate import EvaluateConfig
    from clip_jax.inference.evaluate import evaluate as run_evaluation
    from clip_jax.inference.watch import watch

    config, as_json = arguments.read(EvaluateConfig, args, ("model",), evaluate)
    processes.start(processes.ProcessesConfig())
    values = watch(config) if config.watch else run_evaluation(config)
    if processes.is_lead():
        _print(values, as_json, to_table(values))
    return 0


def predict(args: Sequence[str]) -> int:
    """Label or caption images: clip-jax predict MODEL --images photos --labels cat dog"""
    from clip_jax.inference.predict import PredictConfig
    from clip_jax.inference.predict import predict as run_prediction

    config, as_json = arguments.read(PredictConfig, args, ("model",), predict)
    results = run_prediction(config)
    lines, width = [], max(len(result["image"]) for result in results)
    for result in results:
        best = [f"{x['label']} {x['probability']:.1%}" for x in result.get("labels", [])[:5]]
        captions = [result["caption"]] if "caption" in result else []
        lines.append("  ".join([f"{result['image']:<{width}}", *captions, *best]))
    return _print(results, as_json, "\n".join(lines))


def embed(args: Sequence[str]) -> int:
    """Embed images of a folder, table or tars to Parquet: clip-jax embed MODEL SOURCE OUTPUT"""
    from clip_jax.inference.embed import EmbedConfig
    from clip_jax.inference.embed import embed as run_embedding

    config, as_json = arguments.read(EmbedConfig, args, ("model", "source", "output"), embed)
    result = run_embedding(config)
    for line in result["skipped"]:
        say(f"skipped {line['key']}: {line['reason']}")
    return _print(result, as_json, f"{result['images']} images in {result['output']}")


def search(args: Sequence[str]) -> int:
    """Search embedded images: clip-jax search MODEL EMBEDDINGS --text 'a red bicycle'"""
    from clip_jax.inference.search import SearchConfig
    from clip_jax.inference.search import search as run_search

    config, as_json = arguments.read(SearchConfig, args, ("model", "embeddings"), search)
    results = run_search(config)
    text = "\n".join(f"{x['similarity']:.4f}  {x['key']}" for x in results)
    return _print(results, as_json, text)


def demo(args: Sequence[str]) -> int:
    """Open a web demo that labels and searches: clip-jax demo MODEL --embeddings EMBEDDINGS"""
    from clip_jax.serve.demo import DemoConfig
    from clip_jax.serve.demo import demo as serve

    config, _ = arguments.read(DemoConfig, args, ("model",), demo, takes_json=False)
    serve(config)
    return 0


def serve(args: Sequence[str]) -> int:
    """Serve a model to many clients over HTTP: clip-jax serve MODEL --embeddings EMBEDDINGS"""
    from clip_jax.serve.server import serve as run_server
    from clip_jax.serve.service import ServeConfig

    config, _ = arguments.read(ServeConfig, args, ("model",), serve, takes_json=False)
    run_server(config)
    return 0


def convert(args: Sequence[str]) -> int:
    """Convert weights and verify them: clip-jax convert SRC DST --to hugging-face --verify"""
    from clip_jax.convert.conversion import ConvertConfig
    from clip_jax.convert.conversion import convert as run_conversion

    config, as_json = arguments.read(ConvertConfig, args, ("source", "destination"), convert)
    done = run_conversion(config)
    values: dict[str, Any] = {"destination": str(config.destination)}
    if done.activation_difference is not None:
        values["activation_difference"] = done.activation_difference
    proof = done.verification
    if proof is None:
        return _print_proof(values, None, as_json)
    most = {"max_relative_difference": proof.max_relative_difference}
    if as_json:
        made = [dataclasses.asdict(x) | {"differing": x.differing} for x in proof.made]
        values |= {"verifications": made, "not_compared": proof.not_compared, **most}
        return _print(values, as_json, "") or int(not proof.passed)
    _print_proof(values, None, as_json)
    print(proof.describe())
    _print_proof(most, None, as_json)
    return int(not proof.passed)


def average(args: Sequence[str]) -> int:
    """Average models, or evaluate a curve between two: clip-jax average A B OUT --weights 1 1"""
    from clip_jax.display import table
    from clip_jax.inference.average import AverageConfig
    from clip_jax.inference.average import average as run_average

    config, as_json = arguments.read(AverageConfig, args, ("models", "output"), average)
    result = run_average(config)
    rows = result["rows"]
    lines = [f"{name}: {x}" for name, x in result.items() if name != "rows"]
    text = "\n".join([table([*rows[0]], (row.values() for row in rows)), *lines])
    return _print(result, as_json, text)


def export(args: Sequence[str]) -> int:
    """Export a model to ONNX or StableHLO: clip-jax export MODEL OUT --format onnx --verify"""
    from clip_jax.export import ExportConfig
    from clip_jax.export import export as run_export

    config, as_json = arguments.read(ExportConfig, args, ("model", "output"), export)
    proof = run_export(config)
    return _print_proof({"output": str(config.output)}, proof, as_json)


def scale(args: Sequence[str]) -> int:
    """Run scaling experiments: clip-jax scale ladder | collect | fit | plan | report ..."""
    about = (
        "Scaling experiments: train a ladder of runs, collect the results, fit scaling laws and "
        "use them."
    )
    return _run_verb("scale", about, SCALE, args)


def _ladder(args: Sequence[str]) -> int:
    """Train the missing runs of models x samples x seeds: clip-jax scale ladder SPEC --dry-run"""
    from clip_jax.scaling.climb import LadderCommand, climb
    from clip_jax.scaling.jobs import Stopped

    config, as_json = arguments.read(LadderCommand, args, ("spec",), _ladder, "scale ladder")
    show = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    try:
        result = climb(config, show)
    except Stopped as stopped:
        return _end(str(stopped), code=3)
    if as_json:
        print(to_json(result))
    for point in (failures := [point for point in result["points"] if point["failure"]]):
        say(f"failed: {point['name']}: {point['failure']}")
    if all(point["done"] for point in result["points"]):
        say(f"next: clip-jax scale collect {result['root']}")
    return 1 if failures else 0


def _collect(args: Sequence[str]) -> int:
    """Collect finished runs into one table: clip-jax scale collect RUN ... --output runs.csv"""
    from clip_jax.scaling.collect import CollectConfig
    from clip_jax.scaling.collect import collect as run_collection

    config, as_json = arguments.read(CollectConfig, args, ("paths",), _collect, "scale collect")
    result = run_collection(config)
    _print(result, as_json, f"{result['rows']} runs in {result['table']}")
    for line in result["skipped"]:
        say(f"skipped: {line}")
    return 0


def _choose(args: Sequence[str]) -> int:
    """Choose the best trial at each point of a sweep; check the learning-rate rule: clip-jax scale
    choose TABLE --choose-by info_nce"""
    from clip_jax.scaling import choose

    config, as_json = arguments.read(choose.ChooseConfig, args, ("table",), _choose, "scale choose")
    result = choose.choose(config)
    return _print(result, as_json, choose.describe(result))


def _fit(args: Sequence[str]) -> int:
    """Fit a law with intervals; predict runs, compare families: clip-jax scale fit TABLE"""
    from clip_jax.scaling import fit, fit_result

    command, as_json = arguments.read(fit.FitCommand, args, ("table",), _fit, "scale fit")
    fitted = fit.fit_file(command)
    return _print(fitted.to_json(), as_json, fit_result.describe(fitted))


def _scale_plan(args: Sequence[str]) -> int:
    """Plan a run for a budget (model, pairs, batch, learning rate, hours, price): clip-jax scale
    plan TABLE --budget 300chip-hours"""
    from clip_jax.scaling import planning

    kind = planning.ScalePlanConfig
    config, as_json = arguments.read(kind, args, ("table",), _scale_plan, "scale plan")
    result = planning.plan(config)
    return _print(result, as_json, planning.describe(result))


def _divide(args: Sequence[str]) -> int:
    """Divide compute between model size and samples, by Chinchilla's approaches: clip-jax scale
    divide TABLE --budget 1e21"""
    from clip_jax.scaling import chinchilla

    kind = chinchilla.DivideConfig
    config, as_json = arguments.read(kind, args, ("table",), _divide, "scale divide")
    result = chinchilla.divide(config)
    return _print(result, as_json, chinchilla.describe(result))


def _relate(args: Sequence[str]) -> int:
    """Fit one metric against another, such as accuracy against loss: clip-jax scale relate TABLE
    --metric imagenet1k_acc1 --against info_nce"""
    from clip_jax.scaling import downstream

    kind = downstream.RelateConfig
    config, as_json = arguments.read(kind, args, ("table",), _relate, "scale relate")
    result = downstream.relate(config)
    return _print(result, as_json, downstream.describe(result))


def _ranks(args: Sequence[str]) -> int:
    """Correlate the ranks of methods between scales: clip-jax scale ranks TABLE --methods filter
    --metric imagenet1k_acc1"""
    from clip_jax.scaling import rank_correlation

    kind = rank_correlation.RanksConfig
    config, as_json = arguments.read(kind, args, ("table",), _ranks, "scale ranks")
    result = rank_correlation.ranks(config)
    return _print(result, as_json, rank_correlation.describe(result))


def _report(args: Sequence[str]) -> int:
    """Write an HTML report of points, laws, loss curves, costs, failures: clip-jax scale report
    RUN ... --output report.html"""
    from clip_jax.scaling.html_report import ReportConfig
    from clip_jax.scaling.html_report import report as write_report

    config, as_json = arguments.read(ReportConfig, args, ("paths",), _report, "scale report")
    result = write_report(config)
    shown = (f"{number} {status}" for status, number in result["runs"].items())
    return _print(result, as_json, f"{result['page']}: {', '.join(shown)}")


SCALE: dict[str, Callable[[Sequence[str]], int]] = {
    "ladder": _ladder,
    "collect": _collect,
    "choose": _choose,
    "fit": _fit,
    "divide": _divide,
    "plan": _scale_plan,
    "relate": _relate,
    "ranks": _ranks,
    "report": _report,
}


def plan(args: Sequence[str]) -> int:
    """Estimate memory and speed of a run on a pod: clip-jax plan CONFIG --topology v5e:16x16"""
    from clip_jax.pods.plan import PlanConfig
    from clip_jax.pods.plan import plan as make_plan
    from clip_jax.pods.summary import compare, describe

    rest, as_json = [arg for arg in args if arg != "--json"], "--json" in args
    plans = make_plan(arguments.read_run(PlanConfig, rest, plan, "plan"))
    values, text = plans[0].to_json(), describe(plans[0])
    if len(plans) > 1:
        values["compared"] = [x.to_json() for x in plans[1:]]
        text += "\n" + compare(plans)
    return _print(values, as_json, text)


def prepare(args: Sequence[str]) -> int:
    """Convert image-text data to ArrayRecord or tar shards: clip-jax prepare SRC DST [--inspect]"""
    from clip_jax.prepare import writer
    from clip_jax.prepare.layout import PrepareConfig

    config, as_json = arguments.read(PrepareConfig, args, ("source", "destination"), prepare)
    if config.index:
        indexed = writer.index(config)
        return _print(indexed, as_json, writer.describe_index(indexed))
    result = writer.inspect(config) if config.inspect else writer.prepare(config)
    if "kept" not in result["counts"]:
        say("no pair was kept; the counts say why pairs were dropped.")
    return _print(result, as_json, writer.describe(result))


def bench(args: Sequence[str]) -> int:
    """Measure this machine's throughput: clip-jax bench input CONFIG, clip-jax bench step CONFIG"""
    about = "Measure the throughput of this machine with a run's config."
    return _run_verb("bench", about, BENCH, args)


def _bench_input(args: Sequence[str]) -> int:
    """Measure samples/s of each input stage and the bottleneck: clip-jax bench input CONFIG"""
    return _measure("input", args, _bench_input)


def _bench_step(args: Sequence[str]) -> int:
    """Measure pairs/s, MFU and memory of training steps on synthetic data: clip-jax bench step
    CONFIG"""
    return _measure("step", args, _bench_step)


BENCH: dict[str, Callable[[Sequence[str]], int]] = {"input": _bench_input, "step": _bench_step}


def _measure(verb: str, args: Sequence[str], command: Callable) -> int:
    from clip_jax.bench import BENCHES

    kind, measure, describe = BENCHES[verb]
    flags = [arg for arg in args if arg != "--json"]
    config = arguments.read_run(kind, flags, command, f"bench {verb}")
    if verb != "input":  # the input benchmark uses no device
        from clip_jax import processes

        processes.start(config.processes)  # with the flags that training takes
    result = measure(config)
    return _print(result, len(flags) < len(args), describe(result))


def _run_verb(
    group: str, about: str, verbs: dict[str, Callable[[Sequence[str]], int]], args: Sequence[str]
) -> int:
    """Run a verb of a group of commands, or print the group's help."""
    verb, rest = (args[0], args[1:]) if args else ("", [])
    if arguments.is_help([verb]):
        listing = re.sub(r": clip-jax .*", "", _listing(verbs))
        print(GROUP_USAGE.format(group=group, about=about, verbs=listing))
        return 0
    if verb not in verbs:
        *names, last = verbs
        raise InputError(f"{group} needs {', '.join(names)} or {last}, not {verb!r}.")
    return verbs[verb](rest)


def _listing(commands: dict[str, Callable[[Sequence[str]], int]]) -> str:
    """List commands with the first lines of their docstrings."""
    width = max(map(len, commands)) + 2
    lines = ((name, " ".join((run.__doc__ or "").split())) for name, run in commands.items())
    return "\n".join(f"  {name:<{width}}{about}" for name, about in lines)


def configs(args: Sequence[str]) -> int:
    """List the bundled configs, or print one to start from: clip-jax configs [NAME]"""
    from clip_jax.config_files import bundled_configs, lab_note

    @dataclass(frozen=True, kw_only=True)
    class Choice:
        names: tuple[str, ...] = ()  # Bundled configs to print. Empty: list all, with their notes.

    config, as_json = arguments.read(Choice, args, ("names",), configs)
    paths = bundled_configs()
    if unknown := [name for name in config.names if name not in paths]:
        raise InputError(f"no config {unknown[0]!r}; choose from {', '.join(paths)}.")
    notes = {name: lab_note(paths[name]) for name in config.names or paths}
    if config.names:
        texts = {name: paths[name].read_text(encoding="utf-8") for name in config.names}
        values = {name: note | {"python": texts[name]} for name, note in notes.items()}
        return _print(values, as_json, "\n".join(texts.values()).removesuffix("\n"))
    width = shutil.get_terminal_size().columns - 2
    lines = []
    for name, note in notes.items():
        texts = [note["about"], *(f"{label}: {x}" for label, x in note.items() if label != "about")]
        lines += [name, *(textwrap.indent(textwrap.fill(text, width), "  ") for text in texts)]
    return _print(notes, as_json, "\n".join(lines))


def sample_data(args: Sequence[str]) -> int:
    """Write drawn shapes to try things with: clip-jax sample-data FOLDER"""
    from clip_jax.data.shapes import SampleDataConfig, write

    verb = "sample-data"
    config, as_json = arguments.read(SampleDataConfig, args, ("output",), sample_data, verb)
    result = write(config)
    text = "{output}: {train} training and {test} test images of {classes} classes"
    return _print(result, as_json, text.format(**result))


def completion(args: Sequence[str]) -> int:
    """Print a script for a shell that completes commands and options: clip-jax completion bash"""
    from clip_jax.cli.completion import CompletionConfig, script

    config, _ = arguments.read(CompletionConfig, args, ("shell",), completion, takes_json=False)
    print(script(config.shell, COMMANDS), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "configs": configs,
    "sample-data": sample_data,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "search": search,
    "demo": demo,
    "serve": serve,
    "convert": convert,
    "average": average,
    "export": export,
    "prepare": prepare,
    "plan": plan,
    "scale": scale,
    "bench": bench,
    "completion": completion,
}
COMPUTING = {  # commands whose programs are cached for the next call; a run has a cache of its own
    *("evaluate", "predict", "embed", "search", "demo", "serve"),
    *("convert", "average", "export"),
}


def _print(values: Any, as_json: bool, text: str) -> int:
    print(to_json(values) if as_json else text)
    return 0


def _print_proof(values: dict[str, Any], proof: Any, as_json: bool) -> int:
    """Print one value per line, without missing ones; return 1 if the verification failed."""
    if proof:
        most = proof.max_relative_difference
        values |= dataclasses.asdict(proof) | {"max_relative_difference": most}
    shown = {n: f"{x:.2g}" if isinstance(x, float) else x for n, x in values.items()}
    text = "\n".join(f"{name:<24} {x}" for name, x in shown.items() if x is not None)
    _print(values, as_json, text)
    return 0 if proof is None or proof.passed else 1


def _end(message: str, code: int) -> int:
    """Print a message, and return the exit code."""
    say(message)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with explained():
            code = _run(args)
        sys.stdout.flush()
        return _together(code)
    except InputError as error:
        return _together(_end(str(error), code=2))
    except Unreachable as error:
        return _together(_end(f"{error}. Saved files are intact.", code=75))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once
        return _together(_end("interrupted.", code=130))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return _together(141)  # as a shell reports SIGPIPE
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _together(_end(f"{error.strerror}: {error.filename}", code=2))
        processes = sys.modules.get("clip_jax.processes")
        if not processes or processes.is_alone():
            raise  # a bug, which Python reports; with other processes, it is printed below
        traceback.print_exception(error)
        return _together(1)


def _run(args: Sequence[str]) -> int:
    modules, args = arguments.without_imports(args)
    for module in modules:
        parts.load(module)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands=_listing(COMMANDS)))
        return 0
    if args[0] == "--version":
        from clip_jax import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        return _end(f"no command {args[0]!r}; choose from {', '.join(COMMANDS)}.{meant}", code=2)
    if sys.stderr.isatty() and not {"-h", "--help", "--help-all"} & set(args):
        say(f"starting {args[0]} ...")  # JAX takes seconds to import
    if args[0] in COMPUTING:
        from clip_jax import processes

        processes.keep_compiled()
    return COMMANDS[args[0]](args[1:])


def _unread() -> bool:
    """Say whether the reader of the output, such as `head`, has exited; if so, drop the rest."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    if left := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _together(code: int) -> int:
    """Return the exit code; with other processes that may wait for this one, exit at once."""
    processes = sys.modules.get("clip_jax.processes")  # not imported: there are no others
    return processes.leave(code) if processes and code not in (0, 3) else code
