"""Every number that a person can give, out of its range; a bug stays a bug; former names warn."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from unittest import mock

import pytest
from matplotlib.backend_bases import FigureCanvasBase
from packaging.version import Version

import clip_jax
from clip_jax import bench, errors
from clip_jax.cli import commands
from clip_jax.cli.completion import CompletionConfig
from clip_jax.config import Config
from clip_jax.convert.conversion import ConvertConfig
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.order.mixture import MemberConfig
from clip_jax.data.shapes import SampleDataConfig
from clip_jax.errors import (
    InputError,
    check_picture,
    check_ranges,
    former_fields,
    read_worker,
    renamed_fields,
)
from clip_jax.evals import suite
from clip_jax.evals.evaluator import Encoder
from clip_jax.export import ExportConfig
from clip_jax.inference import average, embed, evaluate, predict, search
from clip_jax.models.clip import CLIPConfig
from clip_jax.pods.plan import PlanConfig
from clip_jax.pods.topology import Topology
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.scaling import climb, collect, fit, html_report, ladder
from clip_jax.scaling.chinchilla import DivideConfig
from clip_jax.scaling.choose import ChooseConfig
from clip_jax.scaling.downstream import RelateConfig
from clip_jax.scaling.planning import ScalePlanConfig
from clip_jax.scaling.rank_correlation import RanksConfig
from clip_jax.serialize import from_dict
from clip_jax.serve.demo import DemoConfig
from clip_jax.serve.service import ServeConfig

COMMANDS = (
    Config, evaluate.EvaluateConfig, predict.PredictConfig, embed.EmbedConfig,
    search.SearchConfig, DemoConfig, ConvertConfig, PrepareConfig, PlanConfig,
    collect.CollectConfig, fit.FitCommand, climb.LadderCommand, ladder.LadderConfig,
    html_report.ReportConfig, bench.InputBench, bench.StepBench, ExportConfig, ServeConfig,
    average.AverageConfig, SampleDataConfig, ScalePlanConfig, ChooseConfig, RelateConfig,
    DivideConfig, RanksConfig, CompletionConfig,
)  # fmt: skip
GIVEN = {
    "TextLengths.tokens": (4, 8),
    "TextLengths.shares": (0.5, 0.5),  # where there is no default, or none that can stand alone
    "PredictConfig.labels": ("cat",),
    "AverageConfig.models": (Path("a"), Path("b")),
    "SearchConfig.text": "a cat",
    "ConvertConfig.to": "openai",
    "ExportConfig.format": "onnx",
    "LadderConfig.base": Config(),
    "LadderConfig.models": {"one": CLIPConfig()},
    "LadderConfig.samples": (4096,),
    "MemberConfig.source": DigitsConfig(),
    "MixtureConfig.members": (MemberConfig(source=DigitsConfig()),),
    "PhaseConfig.from_sample": 0,
    "PhaseConfig.weights": (1.0,),
    "DataConfig.crop_scale": (0.9, 1.0),
    "StageConfig.begin": 0.5,
}


def names(**fields: str) -> set[str]:
    """`Config.seed` and so on, from fields by dataclass."""
    return {f"{kind}.{name}" for kind, listed in fields.items() for name in listed.split()}


# What zero, a negative number or infinity stands for is said beside the field.
NEGATIVE = names(
    MeshConfig="data fsdp tensor",
    CLIPConfig="init_logit_bias image_mean",
    Preprocess="mean",
    ViTConfig="layer_scale",
    RotaryConfig="layer_scale",
    TipsConfig="layer_scale",
    DinoConfig="layer_scale",
    ImageHeadConfig="layer_scale",
    ConvStemConfig="layer_scale",
    ConvNeXtConfig="layer_scale",
    PrepareConfig="min_score max_score",
    RulesConfig="batch_exponent width_exponent",
    LiveTeacher="logit_bias",
    StoredTeacher="logit_bias",
)
INFINITE = {"PrepareConfig.min_score": -math.inf, "PrepareConfig.max_score": math.inf}
ZERO = names(
    TokenizerConfig="begin_id end_id pad_id zeroed_id",
    ConvertConfig="kept_positions",
    SuiteEvalConfig="seed memory_mib",
    SegmentationConfig="first_class ignored pictures",
    Config="seed",
    DataConfig="seed workers threads max_bad_share synthetic_ratio",
    DigitsConfig="split_seed",
    SampleDataConfig="seed",
    MemberConfig="weight",
    PhaseConfig="from_sample weights",
    EvaluateConfig="seed",
    AverageConfig="seed curve",
    ClassifierConfig="weight label_smoothing",
    SelfDistillationConfig="weight warmup center_decay flip color_jitter grayscale",
    MaskedPredictionConfig="weight warmup center_decay flip color_jitter grayscale",
    KoLeoConfig="weight",
    LadderConfig="seeds",
    LadderCommand="jobs",
    PlanConfig="chip_hour_price",
    PrepareConfig="threads resize min_side min_caption min_words near_distance samples_per_task "
    "seed",
    HardwareConfig="start_seconds",
    RulesConfig="max_warmup_share",
    InputBench="warmup",
    StepBench="warmup",
    ViTConfig="patch_dropout",
    RotaryConfig="patch_dropout",
    TipsConfig="patch_dropout registers",
    DinoConfig="patch_dropout registers",
    ConvStemConfig="patch_dropout",
    BertConfig="eos_token_id first_position kept_positions",
    TipsTextConfig="eos_token_id kept_positions",
    SigLIP2Lengths="fixed_share",
    GenerationConfig="seed length_penalty",
    Preprocess="fill",
    CaptionConfig="weight",
    CapPaConfig="parallel",
    StageConfig="begin weights",
    FitCommand="chance",
    TextConfig="eos_token_id kept_positions",
    SoftmaxConfig="weight budget_mib label_smoothing",
    SigmoidConfig="weight budget_mib label_smoothing",
    Muon="momentum adam_learning_rate_scale",
    OptimConfig="learning_rate final_learning_rate warmup_steps weight_decay b1 b2 "
    "image_learning_rate_scale text_learning_rate_scale ema_decay",
    SweepConfig="warmups weight_decays",
    AugmentConfig="flip color_jitter brightness contrast saturation hue grayscale operations",
    AugmentationsConfig="flip operations",
    DistillationConfig="weight budget_mib similarity_weight features_weight",
    Jitter="rotation scale stretch shear shift elastic thickness fade drift shade tint noise",
)


def parts(kind: typing.Any) -> list[typing.Any]:
    """The kinds inside of an annotation: of a union, a tuple, a mapping."""
    inside = [part for one in typing.get_args(kind) for part in parts(one)]
    return inside or [kind]


def numbers() -> dict[str, tuple[type, str, type]]:
    """Every field that takes a number, through all commands: its dataclass, name and type."""
    found, ahead = {}, list(COMMANDS)
    while ahead:
        kind = ahead.pop()
        hints = typing.get_type_hints(kind)
        inherited = typing.get_type_hints(Config) if kind is not Config else {}
        for field in dataclasses.fields(kind):
            if issubclass(kind, Config) and field.name in inherited:
                continue
            for part in parts(hints[field.name]):
                if part is Topology:  # is read from its name, which checks it
                    continue
                if dataclasses.is_dataclass(part):
                    ahead.append(part)
                elif part in (int, float):
                    found[f"{kind.__name__}.{field.name}"] = (kind, field.name, part)
    return found


def example(kind: type) -> typing.Any:
    """An instance of defaults, and of GIVEN where there are none."""
    values, hints = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if (name := f"{kind.__name__}.{field.name}") in GIVEN:
            values[field.name] = GIVEN[name]
        elif field.default is field.default_factory is dataclasses.MISSING:
            kind_of = parts(hints[field.name])[0]
            values[field.name] = 1 if kind_of in (int, float) else kind_of("x")
    return kind(**values)


def test_each_commands_config_is_listed():
    source = Path(commands.__file__).read_text()
    read = set(re.findall(r"\b[A-Z]\w*(?:Config|Command)\b", source)) - {"ProcessesConfig"}
    assert read <= {kind.__name__ for kind in COMMANDS}
    assert {kind for kind, *_ in bench.BENCHES.values()} <= {*COMMANDS}


FIELDS = numbers()
assert {*NEGATIVE, *INFINITE, *ZERO} <= FIELDS.keys()


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_number_out_of_range_is_refused_by_name(field):
    kind, name, number = FIELDS[field]
    hint = typing.get_type_hints(kind)[name]
    several = any(typing.get_origin(k) is tuple for k in (hint, *typing.get_args(hint)))
    length = len(getattr(example(kind), name) or (0,)) if several else 1
    wrong = [1 << 70] if number is int else [math.nan, math.inf, -math.inf]
    wrong = [x for x in wrong if x != INFINITE.get(field)]
    wrong += [] if field in NEGATIVE else [number(-2)]
    wrong += [] if field in ZERO | NEGATIVE else [number(0)]
    for value in wrong:
        with pytest.raises(InputError, match=name):
            dataclasses.replace(example(kind), **{name: (value,) * length if several else value})


@pytest.mark.parametrize(
    ("given", "needed", "says"),
    [
        (0, "[1, inf)", "at least 1"),
        (math.nan, "(0, inf)", "more than 0"),
        (2, "[0, 1)", "at least 0 and less than 1"),
        (0, "(0, 1]", "more than 0 and at most 1"),
        (2, "(0, 1)", "more than 0 and less than 1"),
        (9, "(-inf, 8]", "at most 8"),
        (9, "(-inf, 8)", "less than 8"),
        (math.inf, "(-inf, inf)", "a finite number"),
        ((3, 0), "[1, 5]", "at least 1 and at most 5"),
        (1 << 64, "[0, inf)", "within 64 bits"),
        ("many", "[0, 0.5]", "at least 0 and at most 0.5"),
    ],
)
def test_a_range_is_said_in_words(given, needed, says):
    config = types.SimpleNamespace(x=given)
    with pytest.raises(InputError, match=f"^part.x=.* must be {says}\\.$"):
        check_ranges(config, "part.", x=needed)


def test_parts_are_counted_from_one():
    assert [read_worker(text) for text in ("1/1", "1/4", "4/4")] == [(0, 1), (0, 4), (3, 4)]
    for text in ("", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/4", "a/b", "²/4", f"1/{'9' * 5000}"):
        with pytest.raises(InputError, match="must be i/n"):
            read_worker(text)


def test_pictures_have_a_format_that_matplotlib_writes_and_people_use():
    for ending in ("png", "jpg", "jpeg", "webp", "tif", "tiff", "svg", "pdf"):
        assert ending in FigureCanvasBase.get_supported_filetypes()
        check_picture(f"a.{ending}", "--plot")
        check_picture(Path(f"a.b.{ending.upper()}"), "--plot")
    check_picture(None, "--plot")
    for path in ("a", "a.pn", "a.png.txt", "apng", "a.png "):
        with pytest.raises(InputError, match=rf"--plot='{path}' must end in one of \.png"):
            check_picture(path, "--plot")


def planted(*_: object) -> None:
    list(zip([1], [1, 2], strict=True))  # a ValueError, as `InputError` is


def test_a_bug_in_the_check_of_flags_is_none_of_the_users():
    with (
        mock.patch.object(predict, "check_labels", autospec=True, side_effect=planted),
        pytest.raises(ValueError, match="zip"),
    ):
        commands.main(["predict", "model", "--labels", "cat"])


def test_a_bug_in_one_data_set_does_not_leave_it_out(tmp_path):
    config = evaluate.EvaluateConfig(model=tmp_path)
    evaluator = suite.SuiteEvaluator(config, dict.fromkeys("ab", planted))
    with pytest.raises(ValueError, match="zip"):
        list(evaluator.run(mock.Mock(spec=Encoder)))


@renamed_fields("99.0.0", window="buffer")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed:
    """A dataclass one of whose fields had another name."""

    buffer: int = 8


BY_FORMER_NAME: dict[str, typing.Any] = {"window": 3}


def test_a_former_name_of_a_field_warns_and_names_the_present_one():
    with pytest.warns(
        DeprecationWarning, match="Renamed: window is now buffer. .* clip_jax 99.0.0"
    ):
        assert Renamed(**BY_FORMER_NAME) == Renamed(buffer=3)
    assert dataclasses.replace(Renamed(), buffer=2).buffer == 2
    assert from_dict(Renamed, {"window": 5}) == Renamed(buffer=5)
    both = "window is the former name of buffer; set buffer alone"
    with pytest.raises(InputError, match=both):
        from_dict(Renamed, {"window": 5, "buffer": 5})
    with pytest.warns(DeprecationWarning, match="window"), pytest.raises(InputError, match=both):
        Renamed(**BY_FORMER_NAME, buffer=3)


def test_former_names_end_with_the_version_that_they_name_and_lead_to_a_present_one():
    this = Version(clip_jax.__version__)
    kinds = [kind for kind in errors._FORMER_FIELDS if kind is not Renamed]
    assert kinds
    for kind in kinds:
        fields = {field.name for field in dataclasses.fields(kind)}
        for name, (present, until) in former_fields(kind).items():
            assert present in fields
            assert name not in fields
            assert this < Version(until), f"remove {name} of {kind.__name__}"


def test_a_former_public_name_warns_and_is_the_present_one(monkeypatch):
    name = "load_model"
    monkeypatch.setitem(vars(clip_jax)["_FORMER_NAMES"], name, ("load", "99.0.0"))
    with pytest.warns(DeprecationWarning, match="clip_jax: load_model is now load. The former"):
        assert getattr(clip_jax, name) is clip_jax.load
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(clip_jax, "non" + "sense")
