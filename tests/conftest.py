"""Configure JAX for all tests, and provide what several test files need: tiny models, tiny runs,
and readers of the files that a run writes."""

import contextlib
import dataclasses
import fcntl
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jax.sharding import Mesh
from PIL import Image
from threadpoolctl import threadpool_limits

from clip_jax import parts, sharding
from clip_jax import step as step_module
from clip_jax import train as training
from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.cli import arguments, commands
from clip_jax.config import Config
from clip_jax.convert.formats import write_weights
from clip_jax.convert.state_dict import unflatten
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.losses import ClassifierConfig, DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.models.bert import BertConfig
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.clip import parameters as boxes
from clip_jax.models.conv_stem import ConvStemConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.image_head import ImageHeadConfig
from clip_jax.models.images import NaFlex, concatenate
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.tips import TipsConfig, TipsTextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.serialize import to_dict
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, State, shapes
from tests import compilations, guard
from tests.golden import artefacts as artefacts_of

# A shell starts background jobs with SIGINT ignored, which processes inherit; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Threefry is unrolled into every initialiser and takes most of a small model's compile time.
jax.config.update("jax_default_prng_impl", "rbg")

# Hypothesis draws the same few examples each time. `--hypothesis-profile long` draws many others.
settings.register_profile("few", deadline=None, derandomize=True, max_examples=5)
settings.register_profile("short", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=2_000, print_blob=True)
settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `tests/compilations.py` describes."""
    parser.addoption("--compilations", type=Path, help="record compiled programs in this file")


def pytest_configure(config: pytest.Config) -> None:
    """Set XLA's flags and the compilation cache before anything is compiled.

    Flags that the environment variable XLA_FLAGS already has take precedence.
    """
    gc.disable()  # until the tests are collected
    threadpool_limits(1)  # BLAS threads busy-wait, which takes the cores from other tests
    flags = [
        # As in `clip_jax.processes`: otherwise simulated devices may deadlock.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # LLVM's optimisations take a third of the compile time, and tests spend more time on
        # compilation than on computation. XLA's own passes still run.
        "--xla_backend_optimization_level=0",
    ]
    if jax.__version_info__ < (0, 11):  # later versions of XLA abort at a flag that was removed
        # Without MLIR's passes for fused loops, a step compiles in half the time. A single LLVM
        # module, since there are no idle cores to compile several in parallel.
        flags.append("--xla_cpu_use_fusion_emitters=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
    # Workers, processes that tests start and later test runs share compiled programs.
    folder = config.rootpath / ".pytest_cache/compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not hasattr(config, "workerinput"):
        for file in folder.glob("*"):  # old programs are mostly of code that has changed since
            if file.stat().st_mtime < time.time() - 7 * 86_400:
                file.unlink(missing_ok=True)
    if path := config.getoption("compilations"):
        config.pluginmanager.register(compilations.Compilations(path))
    guard.install()


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never scan the loaded modules: this took a sixth of the time.

    Without any collection, memory would grow.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Enforce the rules of `tests/guard.py` while a unit test and its fixtures run."""
    guard.is_on = guard.is_unit(item.path, ROOT / "tests")
    try:
        return (yield)
    finally:
        guard.is_on = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a skipped test as failed if NO_TEST_IS_SKIPPED is set, as CI does."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("NO_TEST_IS_SKIPPED"):
        report.outcome = "failed"
        report.longrepr = f"skipped although NO_TEST_IS_SKIPPED is set: {report.longrepr}"
    return report


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object] = lambda _: None
) -> Path:
    """Return a temporary folder that all workers share; the first that needs it fills it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="module", autouse=True)
def parts_of_this_module(request: pytest.FixtureRequest) -> Generator[None]:
    """Hide the parts that other test modules define, by deriving from a public base class.

    Otherwise a test would depend on the test modules that its worker has loaded.
    """
    of_users, current = parts.of_users, request.module.__name__

    def visible(bases: Iterable[type] = (parts.Part,)) -> list[type]:
        kinds = [(kind, kind.__module__) for kind in of_users(bases)]
        return [
            kind
            for kind, module in kinds
            if module == current or not module.rpartition(".")[2].startswith("test_")
        ]

    with mock.patch.object(parts, "of_users", visible):
        yield


@contextlib.contextmanager
def types_unchecked() -> Generator[None]:
    """Turn off the type checks of `.ci/run newest`.

    Users' parts are not in the unions that the package's signatures name, and some test doubles
    have simpler types.
    """
    checked = not jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", not checked)


@pytest.fixture
def unchecked_types() -> Generator[None]:
    """Turn off type checks during a test (see `types_unchecked`)."""
    with types_unchecked():
        yield


# ------------------------------------------------------------------ tiny models

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs/digits.py"

TINY = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=10, width=32, depth=2, num_heads=2),
    dtype="float32",
)
RESNET = dataclasses.replace(
    TINY, vision=ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=8, num_heads=4)
)
COCA = dataclasses.replace(
    TINY,
    embed_dim=32,
    vision=dataclasses.replace(TINY.vision, pool="queries", pool_queries=4, pool_heads=2),
    text=dataclasses.replace(TINY.text, pool="class_token"),
    decoder=CoCaConfig(depth=2, num_heads=4),
)
# Images of any aspect ratio with up to 12 patches. The position embedding has 4 x 4 entries.
NAFLEX = dataclasses.replace(
    TINY, vision=dataclasses.replace(TINY.vision, image_size=32, max_patches=12, pool="map")
)
# SigLIP 2 for native aspect ratios, and a CoCa with a class token for them.
NAFLEX_SIGLIP = dataclasses.replace(
    TINY,
    embed_dim=32,
    vision=dataclasses.replace(
        TINY.vision,
        image_size=32,
        max_patches=24,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
    ),
    text=dataclasses.replace(
        TINY.text, causal=False, pool="last", projection_bias=True, activation="gelu_tanh"
    ),
    init_logit_bias=-10.0,
)
NAFLEX_COCA = dataclasses.replace(
    COCA, vision=dataclasses.replace(COCA.vision, image_size=32, max_patches=24)
)
# Images as rows and columns of patches: some of maximum length, elongated ones, small ones.
GRIDS = ((4, 6), (1, 24), (24, 1), (3, 5), (1, 1), (2, 7))
# Meshes of eight devices for tests that compare several.
MESHES = {
    "8": MeshConfig(),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}
MAMMUT = dataclasses.replace(
    TINY,
    embed_dim=32,
    vision=dataclasses.replace(TINY.vision, pool="mean_all"),
    text=dataclasses.replace(TINY.text, pool="mean", causal=False, projection=False, depth=4),
    decoder=MaMMUTConfig(cross_every=2, first_mlp=False),
)

CAPPA = dataclasses.replace(TINY, decoder=CapPaConfig(width=24, depth=2, num_heads=2))
DECODERS = {"coca": COCA, "mammut": MAMMUT, "cappa": CAPPA}

_VISION = {"image_size": 32, "width": 32, "depth": 2, "num_heads": 2}
_TEXT = {"vocab_size": 520, "context_length": 10, "width": 32, "depth": 2, "num_heads": 2}
# One small model of each family beside CLIP, SigLIP and the captioners.
FAMILIES = {
    "mobileclip": dataclasses.replace(TINY, vision=ConvStemConfig(**_VISION)),
    "pe_core": dataclasses.replace(
        TINY, vision=RotaryConfig(**_VISION | {"patch_size": 8}, pool_heads=4, layer_scale=0.5)
    ),
    "eva02": dataclasses.replace(
        TINY,
        vision=RotaryConfig(
            **_VISION | {"patch_size": 8},
            rotary="rows",
            activation="swiglu",
            inner_norm=True,
            key_bias=False,
            pool="class_token",
            pre_norm=False,
            patch_bias=True,
            projection_bias=True,
            mlp_ratio=2,
        ),
    ),
    "eva_post_norm": dataclasses.replace(
        TINY,
        vision=RotaryConfig(
            **_VISION | {"patch_size": 8},
            rotary="none",
            norm="branch",
            key_bias=False,
            pool="class_token",
            pre_norm=False,
        ),
    ),
    "tips": dataclasses.replace(
        TINY,
        embed_dim=32,
        vision=TipsConfig(**_VISION | {"patch_size": 8}),
        text=TipsTextConfig(**_TEXT),
    ),
    "dinov2": dataclasses.replace(
        TINY,
        embed_dim=32,
        vision=DinoConfig(
            **_VISION | {"patch_size": 8},
            positions="learned",
            resizing="plain",
            registers=0,
            biases="qkv",
        ),
    ),
    "dinov3": dataclasses.replace(
        TINY,
        embed_dim=32,
        vision=DinoConfig(
            **_VISION | {"patch_size": 8}, registers=2, biases="none", activation="swiglu"
        ),
    ),
    "dinotxt": dataclasses.replace(
        TINY,
        embed_dim=64,
        vision=DinoConfig(**_VISION | {"patch_size": 8}, registers=2),
        text=dataclasses.replace(TINY.text, biases="none", activation="gelu"),
        image_head=ImageHeadConfig(layer_scale=0.5),
    ),
    "xlm_roberta": dataclasses.replace(TINY, text=BertConfig(**_TEXT, num_positions=14)),
    "altclip": dataclasses.replace(TINY, text=BertConfig(**_TEXT, head="norm", pool="first")),
    "chinese_clip": dataclasses.replace(
        TINY,
        text=BertConfig(**_TEXT, head="linear", pool="first", first_position=0, token_types=2),
    ),
    "convnext": dataclasses.replace(
        TINY,
        vision=ConvNeXtConfig(
            image_size=64, layers=(1, 2, 1, 1), width=8, layer_scale=0.5, head="mlp"
        ),
    ),
}


def larger(config: CLIPConfig) -> CLIPConfig:
    """Return the same model for twice the resolution and half the context length."""
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=2 * config.vision.image_size),
        text=dataclasses.replace(config.text, context_length=config.text.context_length // 2),
    )


def batch(config: CLIPConfig, size: int = 16) -> dict[str, Any]:
    """Return images and texts that the model accepts; two of the texts are equal."""
    rng = np.random.default_rng(0)
    spec, pixels = config.vision.image_spec, config.vision.image_size
    tokens = rng.integers(1, 517, (size, config.text.context_length), np.int32)
    tokens[:, -2] = 519  # end of text
    tokens[3] = tokens[7]
    if isinstance(spec, NaFlex):
        grids = itertools.islice(itertools.cycle(GRIDS), size)
        shapes = [(1, spec.patch_size * a, spec.patch_size * b, 3) for a, b in grids]
        image = concatenate([spec.pack(rng.integers(0, 256, x, np.uint8)) for x in shapes])
    else:
        image = rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8)
    return {"image": image, "text": tokens}


@functools.cache
def parameter_shapes(config: CLIPConfig) -> Params:
    """Return the shapes of a model's parameters, which each process traces only once."""
    return unflatten({name: box.value for name, box in boxes(config).items()})


def parameters(config: CLIPConfig, seed: int = 1) -> Params:
    """Draw parameters with NumPy, so that they are the same in every version of jax."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, np.float32)
        if path[-1].key == "logit_scale":
            return np.asarray(np.log(10), np.float32)
        if path[-1].key == "logit_bias":  # near 0, gradients of negatives and positives cancel
            return np.asarray(-3, np.float32)
        scale = 0.2
        if path[-1].key == "kernel":
            # With smaller ones, gradients of captions and of attention to the image are near 0.
            factor = {"out_proj": 4, "q": 8}.get(path[-2].key, 1)
            scale = factor * np.prod(x.shape[:-1]) ** -0.5
        return (scale * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


# Adam divides by |gradient| + ε. With the paper's ε of 1e-6, differences between meshes would be
# those of rounding.
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-3)
GOLDEN_LOSS = SoftmaxConfig(mask_same_caption=True)


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    return {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def decode_text(model: CLIP, params: Params, tokens: Any, image_tokens: Any) -> Any:
    """Return the logits of all next tokens, computed in one forward pass."""
    _, states = model.encode_text_and_write(params, tokens, image_tokens)
    return model.vocabulary_logits(params, states)


def sums_of_step(params: Params, metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what the golden step records: metrics, and each parameter's sum of absolute values."""
    sums = {name: float(np.abs(x).sum(dtype=np.float64)) for name, x in by_path(params).items()}
    return {"metrics": {name: float(x) for name, x in metrics.items()}, "parameters": sums}


def parameter_tree(config: CLIPConfig = TINY) -> dict[str, list[int]]:
    """Return the paths and shapes of a tiny model's parameters, which are a public format."""
    return {name: list(x.shape) for name, x in by_path(parameter_shapes(config)).items()}


def assert_close(expected: Any, got: Any, key_bias: float = 1e-6) -> None:
    """Check that each tensor's largest difference is at most 1e-5 of its largest expected value.

    The exact gradient of an attention's key bias is zero, so it has an absolute tolerance.
    """
    for (name, a), b in zip(by_path(expected).items(), jax.tree.leaves(got), strict=True):
        if name.endswith("attn/in_proj/bias"):
            np.testing.assert_allclose(b[:, 1], a[:, 1], rtol=0, atol=key_bias, err_msg=name)
            a, b = a[:, ::2], b[:, ::2]
        if name.endswith("attn/kv/bias"):
            np.testing.assert_allclose(b[..., 0, :, :], a[..., 0, :, :], rtol=0, atol=key_bias)
            a, b = a[..., 1, :, :], b[..., 1, :, :]
        if name.endswith("k_proj/bias"):
            np.testing.assert_allclose(b, a, rtol=0, atol=key_bias, err_msg=name)
            continue
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), name


def write_tiny_model(folder: Path, seed: int = 0, config: CLIPConfig = TINY) -> None:
    """Write a model folder with random weights."""
    params = jax.tree.map(np.asarray, parameters(config, seed))
    weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
    write_weights(weights, folder, "clip-jax")


# ------------------------------------------------------------------ tiny runs

STARTS = ("fine-tuning", "LoRA", "LoRA with a classifier", "a live teacher")


def starting_from(weights: str, kind: str, images: Path) -> Config:
    """Return a tiny run of one of STARTS from weights. A classifier's data go into `images`."""
    classes, teachers = ClassifierConfig(classes=("ant", "bee")), (LiveTeacher(weights=weights),)
    changes: dict[str, Any] = {"init_from": weights, "init_architecture": True}
    if kind == "a live teacher":
        term = DistillationConfig(teachers=teachers, features_weight=1.0)
        changes = {"objective": (SoftmaxConfig(), term)}
    elif kind != "fine-tuning":
        changes["lora"] = LoRAConfig(rank=2)
    if kind == "LoRA with a classifier":
        for name in classes.classes:
            (images / name).mkdir(parents=True)
            for number in range(8):
                image = Image.new("RGB", (32, 32), (30 * number, 0, 0))
                image.save(images / name / f"{number}.png")
        source = FolderConfig(path=str(images), templates=("a {}",))
        changes |= {"objective": (classes,), "data": DataConfig(source=source, threads=1)}
    return tiny_digits(steps=1, evals=(), **changes)


FLAGS = [
    "--steps", "24", "--batch-size", "16", "--report-every", "1",
    "--model.embed-dim", "16",
    "--model.vision.width", "16", "--model.vision.depth", "1", "--model.vision.num-heads", "2",
    "--model.text.width", "16", "--model.text.depth", "1", "--model.text.vocab-size", "600",
    "--optim.warmup-steps", "2", "--checkpoint.every-steps", "3",
    "--evals.0.per-number", "1", "--evals.0.every-steps", "12",
]  # fmt: skip


@functools.cache
def _read_flags() -> Config:
    return arguments.read_run(Config, [str(DIGITS), *FLAGS], commands.train, "train")


def tiny_digits(**changes: Any) -> Config:
    """Return the config of a run of seconds: configs/digits.py with FLAGS and `changes`."""
    return dataclasses.replace(_read_flags(), **changes)


class ProgramCompiledOnce(Program):
    """A program that compiles once, however many runs share it."""

    _is_compiled = False

    def compile(self) -> None:
        if not self._is_compiled:
            super().compile()
            self._is_compiled = True


shared_program = functools.cache(ProgramCompiledOnce)  # of a recipe on a mesh


def train_shared(config: Config, workdir: Path) -> dict[str, Any]:
    """Train with a program that all runs of the same recipe share."""
    with mock.patch.object(training, "Program", shared_program):
        return training.train(config, workdir)


def small_step(
    state: State, batch: dict[str, Any], *, recipe: Recipe, mesh: Mesh
) -> tuple[State, dict[str, Any]]:
    """Replace the training step in tests of what a run saves, restores and reports.

    Every trained array changes, depending on its value, the batch and the frozen arrays.
    """
    inputs = jax.tree.leaves((batch, state.frozen))
    mean = sum(jnp.mean(x, dtype=jnp.float32) for x in inputs) / len(inputs)
    params, opt_state = jax.tree.map(
        lambda x: (0.75 * x + mean).astype(x.dtype), (state.params, state.opt_state)
    )
    metrics = {
        "loss": jnp.log(jnp.float32(recipe.batch_size)),  # an untrained model's
        "grad_norm": mean,
        "logit_scale": jnp.float32(1),
        "learning_rate": batch["learning_rate"],
    }
    state = State(state.step + 1, params, opt_state, state.carried, state.frozen)
    return state, metrics


@pytest.fixture
def small_steps() -> Generator[None]:
    """Replace the training step by `small_step`; the rest of a program stays real."""
    with mock.patch.object(step_module, "train_step", small_step):
        yield


def write_states(config: Config, workdir: Path) -> State:
    """Write a config and a checkpoint of random numbers for every step; return the last state."""
    state, _ = shapes(config.recipe, make_mesh(MeshConfig()))
    rng = np.random.default_rng(0)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
    for step in range(1, config.steps + 1):
        state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), state)
        checkpoints.save(step, state.saved(), {"samples": step})
    checkpoints.close()
    return state


def write_run(model: CLIPConfig, workdir: Path) -> tuple[Path, CLIPConfig, Params]:
    """Write a run directory as `train` does, with steps 1 and 2; return it, the model and the
    parameters of step 2."""
    trained = dataclasses.replace(model, dtype="float32", remat="hidden")
    workdir.mkdir()
    config = Config(model=trained, steps=2, optim=OptimConfig(warmup_steps=1))
    return workdir, model, write_states(config, workdir).params


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Return the complete lines of a run's JSONL file; the last may be half written."""
    lines = (workdir / name).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir: Path) -> dict[int, float]:
    """Return a run's losses by step."""
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


# ------------------------------------------------------------------ stored artefacts


@pytest.fixture(params=artefacts_of.VERSIONS)
def artefacts(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the current folder, which has the artefacts of an earlier version."""
    artefacts_of.unpack(request.param, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ notebooks


def execute_notebook(name: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    """Run a notebook in a folder; return what it prints, and the outputs that are pictures."""
    import nbclient
    import nbformat

    # The kernel is a process in another directory, and must import this checkout.
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JAX_DEFAULT_PRNG_IMPL", "rbg")  # compiles quickly, as here
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    nbclient.execute(notebook, cwd=folder, timeout=300, kernel_name="python3")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    return printed, [output for output in outputs if "image/png" in output.get("data", {})]
