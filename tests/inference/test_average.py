"""`clip-jax average`: sums, soups and curves, and what cannot be averaged."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.weights import Head, Weights, default_preprocess
from clip_jax.errors import InputError
from clip_jax.inference import average
from clip_jax.inference.average import AverageConfig, combine, fitting
from clip_jax.inference.loading import model_of, prompt_head
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.optim import OptimConfig
from clip_jax.optim.wrappers import AverageState
from tests.conftest import parameter_shapes, write_states
from tests.evals.conftest import SMALL, png

CLASSES = ("bright", "dark", "grey")
SIGLIP = replace(SMALL, init_logit_bias=-10.0)  # with every kind of array: a bias, too


def drawn(seed: int, config: CLIPConfig = SIGLIP, *, head: bool = True) -> Weights:
    """A small model, with a classifier of CLASSES."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(config)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    kernel = rng.normal(0, 0.5, (len(CLASSES), config.embed_dim)).astype(np.float32)
    own = Head(CLASSES, ("a {}",), kernel) if head else None
    return Weights(config=config, params=params, preprocess=default_preprocess(config), head=own)


def arrays(weights: Weights) -> dict[str, np.ndarray]:
    """All arrays that are averaged, by name."""
    assert weights.head is not None
    return flatten(weights.params) | {"head": weights.head.kernel}


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert (x.dtype, x.shape) == (np.float32, other[name].shape)
        assert x.tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `a`, `b` and `c`, of which `c` has no classifier, and a data set `set`."""
    path, rng = tmp_path_factory.mktemp("average"), np.random.default_rng(0)
    for seed, name in enumerate("abc"):
        write_weights(drawn(seed, head=name != "c"), path / name, "clip-jax")
    for name, mean in zip(CLASSES, (200, 50, 128), strict=True):
        (path / "set" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(rng.normal(mean, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
            (path / "set" / name / f"{i}.png").write_bytes(png(pixels))
    return path


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.3, 0.5, 1.7), (1e-3, 2.0, 30.0)])
def test_an_average_is_the_sum_from_left_to_right_in_float32(weights: tuple[float, ...]):
    models = [drawn(seed) for seed in range(3)]
    result = arrays(combine(models, weights))
    shares = np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))
    expected = {}
    for name in result:
        first, second, third = (arrays(x)[name] for x in models)
        w = shares.astype(np.float32)
        expected[name] = np.asarray((w[0] * first + w[1] * second) + w[2] * third)
    assert_same_bits(result, expected)
    assert result["logit_scale"] == expected["logit_scale"]  # of logarithms
    assert {"logit_bias", "head"} <= result.keys()


def test_task_vectors_are_added_to_the_base_and_subtracted():
    models, base = [drawn(1), drawn(2)], drawn(3)
    result = arrays(combine(models, (0.5, -1.25), base))
    start = arrays(base)
    expected = {
        name: np.asarray(
            (x + np.float32(0.5) * (arrays(models[0])[name] - x))
            + np.float32(-1.25) * (arrays(models[1])[name] - x)
        )
        for name, x in start.items()
    }
    assert_same_bits(result, expected)


def test_a_weight_of_zero_leaves_the_other_as_it_is():
    """Negative zeros stay, and what a file has in bfloat16 is exact in float32."""
    one, other = drawn(1), drawn(2)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), one.params)
    rounded["text"]["positional_embedding"][0, :3] = -0.0
    one = replace(one, params=rounded)
    exact = {name: np.asarray(x, np.float32) for name, x in arrays(one).items()}
    assert np.signbit(exact["text/positional_embedding"][0, :3]).all()
    assert_same_bits(arrays(combine([one, other], (1, 0))), exact)
    assert_same_bits(arrays(combine([one, other], (0, 3))), arrays(other))


# ------------------------------------------------------------------ the command


def test_the_command_writes_a_model_that_predicts_its_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The model without a classifier has the zero-shot one of these classes."""
    paths = [str(folder / name) for name in "abc"]
    command = ["average", *paths, str(tmp_path / "soup")]
    assert main([*command, "--weights", "3", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:6]] == [
        [paths[0], "3.0000"],
        [paths[1], "1.0000"],
        [paths[2], "2.0000"],
    ]
    models = [read_weights(folder / name) for name in "abc"]
    zero_shot = prompt_head(model_of(models[2]), CLASSES, ("a {}",))
    models[2] = replace(models[2], head=zero_shot)
    soup = read_weights(tmp_path / "soup")
    assert_same_bits(arrays(soup), arrays(combine(models, (3, 1, 2))))
    assert soup.head is not None
    assert soup.head.classes == CLASSES
    image = folder / "set/dark/0.png"
    assert main(["predict", str(tmp_path / "soup"), "--images", str(image), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {x["label"] for x in result["labels"]} == set(CLASSES)
    assert main(command) == 2
    assert "use --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_curve_ends_at_its_models(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = ["--dataset", f"folder:{folder / 'set'}"]
    command = ["average", str(folder / "a"), str(folder / "b"), str(tmp_path / "curve")]
    assert main([*command, *data, "--curve", "1", "0.25", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["alpha", "set/classifier/acc1"]
    rows = json.loads((tmp_path / "curve/curve.json").read_text())
    assert [row.pop("alpha") for row in rows] == [0, 0.25, 1]
    for name, row in (("a", rows[0]), ("b", rows[2])):
        assert main(["evaluate", str(folder / name), *data, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == row
    assert (tmp_path / "curve/curve.png").read_bytes().startswith(b"\x89PNG")
    values = [row["set/classifier/acc1"] for row in rows]
    best = (0, 0.25, 1)[values.index(max(values))]
    assert f"best_alpha: {float(best)}" in printed


def test_a_greedy_soup_keeps_what_does_not_lower_the_metric(tmp_path: Path):
    """Models 0, 1, 2 and 3 are tried in the order 2, 0, 3, 1: ties as they are named."""
    alone = {0: 0.5, 1: 0.25, 2: 0.75, 3: 0.5}
    soups = {(2,): 0.75, (2, 0): 0.75, (2, 0, 3): 0.5, (2, 0, 1): 0.875}
    tried: list[tuple[int, ...]] = []

    def measure(metric: str | None, evaluator: Any, x: Any) -> tuple[str, dict[str, float]]:
        names = x if isinstance(x, tuple) else (x,)
        tried.append(names)
        value = soups[names] if len(names) > 1 else alone[names[0]]
        return "set/acc1", {"set/acc1": value}

    def soup(models: Sequence[Any], weights: Sequence[float], base: Any = None) -> Any:
        assert set(weights) == {1.0}
        return tuple(models)

    config = AverageConfig(
        models=tuple(tmp_path / str(i) for i in range(4)),
        output=tmp_path / "out",
        greedy=True,
        dataset=("folder:x",),
    )
    with (
        mock.patch.multiple(
            average,
            _measure=measure,
            combine=soup,
            data_sets=mock.Mock(return_value={}),
            read_weights=lambda path, ema: int(path.name),
            fitting=lambda models, paths: models,
            card=mock.Mock(FACTS_NAME="training.json"),
        ),
        mock.patch.object(average, "write_weights") as write,
    ):
        result = average.average(config)
    assert write.call_args.args[0] == (2, 0, 1)
    assert tried == [(0,), (1,), (2,), (3,), (2,), (2, 0), (2, 0, 3), (2, 0, 1)]
    assert [(row["alone"], row["kept"]) for row in result["rows"]] == [
        (0.75, True),
        (0.5, True),
        (0.5, False),
        (0.25, True),
    ]


def test_a_run_gives_its_moving_average_or_its_last_weights(tmp_path: Path):
    config = Config(model=SMALL, steps=2, optim=OptimConfig(warmup_steps=1, ema_decay=0.5))
    (tmp_path / "run").mkdir()
    state = write_states(config, tmp_path / "run")
    run, base = tmp_path / "run", tmp_path / "base"
    write_weights(drawn(0, SMALL, head=False), base, "clip-jax")
    assert isinstance(state.opt_state, AverageState)
    for flags, params in (([], state.opt_state.ema), (["--no-ema"], state.params)):
        out = [str(tmp_path / f"out{len(flags)}"), "--weights", "1", "0"]
        assert main(["average", str(run), str(base), *out, *flags]) == 0
        expected = {name: np.asarray(x) for name, x in flatten(params).items()}
        result = read_weights(Path(out[0]))
        assert_same_bits(flatten(result.params), expected)


def test_models_of_a_sigmoid_and_of_a_softmax_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The average had no bias, and its probabilities were those of a softmax."""
    write_weights(drawn(5, SMALL), tmp_path / "clip", "clip-jax")
    for pair in (folder / "a", tmp_path / "clip"), (tmp_path / "clip", folder / "a"):
        assert main(["average", *map(str, pair), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"{folder / 'a'} has a logit bias" in error
        assert f"{tmp_path / 'clip'} has none" in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["A", "OUT"], "needs two models, not 1"),
        (["OUT"], "needs two models, not 0"),
        (["A", "B", "OUT", "--weights", "1"], "are not 2, one for each"),
        (["A", "B", "OUT", "--weights", "1", "-1"], "nor negative without --base"),
        (["A", "B", "OUT", "--weights", "0", "0"], "must not be all 0"),
        (["A", "B", "OUT", "--weights", "1", "nan"], "weights=(1.0, nan) must be at least"),
        (["A", "B", "C", "OUT", "--curve", "0.5", "DATA"], "curve joins two models, not 3"),
        (["A", "B", "OUT", "--curve", "1.5", "DATA"], "curve=(1.5,) must be at least 0"),
        (["A", "B", "OUT", "--curve", "0.5"], "need --dataset"),
        (["A", "B", "OUT", "--greedy"], "need --dataset"),
        (["A", "B", "OUT", "DATA"], "dataset would be ignored, since nothing is evaluated"),
        (
            ["A", "B", "OUT", "--metric", "x", "--data-dir", "y", "--images", "3"],
            "metric, data_dir, images would be ignored",
        ),
        (["A", "B", "OUT", "--tasks", "probe"], "tasks would be ignored"),
        (["A", "B", "OUT", "--greedy", "DATA", "--weights", "1", "2"], "no --weights or --base"),
        (["A", "B", "OUT", "--greedy", "--dataset", "folder:nowhere"], "no folder nowhere"),
        (["A", "B", "OUT", "--greedy", "DATA", "--metric", "set/x"], "set/classifier/acc1"),
        (
            ["A", "B", "OUT", "--greedy", "DATA", "--metric", "set/lambda"],
            "must be a result that is better if higher",
        ),
        (["A", "B", "B", "--overwrite"], "is both source and destination"),
        (["A", "nowhere", "OUT"], "there is no nowhere"),
        (["A", "B", "/proc/new"], "choose another OUTPUT."),
    ],
)
def test_wrong_use_is_one_message(
    args: list[str],
    says: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    places = {name.upper(): [str(folder / name)] for name in "abc"}
    places |= {"OUT": ["out"], "DATA": ["--dataset", f"folder:{folder / 'set'}"]}
    command = ["average", *(x for arg in args for x in places.get(arg, [arg]))]
    try:
        code = main(command)
    except SystemExit as stopped:  # tyro, which prints what a dataclass raises
        code = stopped.code
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (code, "Traceback" in error) == (2, False)
    assert says in error
    assert not Path("out").exists()


def changed(name: str) -> Weights:
    """The model `a`, with one difference."""
    own = drawn(0)
    match name:
        case "depth":
            text = replace(SMALL.text, depth=2)
            return drawn(0, replace(SIGLIP, text=text))
        case "shape":
            vision = replace(SMALL.vision, mlp_ratio=2.0)
            return drawn(0, replace(SIGLIP, vision=vision))
        case "tokenizer":
            tokenizer = replace(SMALL.text.tokenizer, clean="lower")
            text = replace(SMALL.text, tokenizer=tokenizer)
            return replace(own, config=replace(SIGLIP, text=text))
        case "preprocess":
            return replace(own, preprocess=replace(own.preprocess, resize_mode="squash"))
        case "classes":
            assert own.head is not None
            return replace(own, head=own.head._replace(classes=("bright", "cat", "grey")))
        case "nan":
            return replace(
                own, params=own.params | {"logit_scale": np.full((), np.nan, np.float32)}
            )
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("depth", "model.text.depth is 1 and 2"),
        ("shape", "mlp/c_fc/bias is (1, 128) and (1, 64)"),
        ("tokenizer", "model.text.tokenizer.clean is clip and lower"),
        ("preprocess", "preprocess.resize_mode is shortest and squash"),
        ("classes", "class.1 is dark and cat"),
        ("nan", "logit_scale has 1 values of 1 that are NaN"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    name: str, says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_weights(changed(name), tmp_path / "other", "clip-jax")
    assert main(["average", str(folder / "a"), str(tmp_path / "other"), str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(tmp_path / "other") in error
    assert not (tmp_path / "x").exists()


def test_models_of_different_vocabularies_are_refused(tmp_path: Path):
    """Of one size, nothing else tells that the average's rows of tokens mix other words."""
    files = {name: tmp_path / f"{name}.json" for name in ("own", "copy", "other")}
    for name, path in files.items():
        path.write_text("other words" if name == "other" else "words")

    def tokenizing(name: str) -> Weights:
        tokenizer = replace(SMALL.text.tokenizer, file=str(files.get(name, name)))
        config = replace(SIGLIP, text=replace(SMALL.text, tokenizer=tokenizer))
        return replace(drawn(0, head=False), config=config)

    def average_of(*names: str) -> list[Weights]:
        return fitting([tokenizing(x) for x in names], [Path(x) for x in names])

    assert len(average_of("own", "copy", "own")) == 3
    assert len(average_of("clip", "clip")) == 2
    for names in (("own", "copy", "other"), ("clip", "other")):
        with pytest.raises(InputError, match=r"^other was trained with other token ids: its text"):
            average_of(*names)


def test_a_resnet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    vision = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=2)
    config = replace(SMALL, vision=vision)
    for seed, name in enumerate("ab"):
        write_weights(drawn(seed, config, head=False), tmp_path / name, "clip-jax")
    assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "x")]) == 2
    assert "a has BatchNorm, whose statistics cannot be averaged" in capsys.readouterr().err
