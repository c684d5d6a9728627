"""A person's own file: what is wrong in it is said with its place, and never passes for success."""

import dataclasses
from unittest import mock

import pytest

from clip_jax.checkpoints.resume import check_resumable
from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.config_files import bundled_configs, load_config, with_weights
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.errors import InputError
from clip_jax.losses import ClassifierConfig, SigmoidConfig, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.serialize import to_dict
from tests.conftest import RESNET, ROOT, TINY, write_run, write_tiny_model
from tests.data.conftest import make_pairs

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
        ("import nowhere_at_all\n", ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1\ndef get_config(:\n", ":2: SyntaxError: invalid syntax"),
        ("x = '\x00'\n", ": "),
        ("x = 1\n", "must define get_config()"),
        ("get_config = 3\n", ": TypeError: 'int' object is not callable"),
        ("def get_config():\n    return 1\n", "must return a Config, not int"),
        ("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('B')\n", ":3: no arch"),
    ],
)
def test_an_error_in_a_config_file_is_said_with_its_line(text, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith((f"clip-jax: {path}", f"clip-jax: get_config() in {path}"))
    assert says in line


def test_a_bug_of_ours_under_a_config_file_stays_a_bug(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from clip_jax.models import zoo\ndef get_config():\n    zoo.get('RN50')\n")
    with mock.patch.object(zoo, "ARCHITECTURES", None), pytest.raises(TypeError):
        load_config(path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe{}", b"[]", b'{"steps": "many"}', b'{"steps": 0}', b"[" * 100_000]
)
def test_a_damaged_config_json_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(path)


def test_a_config_that_ships_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a folder configs/
    assert load_config("digits") == load_config(ROOT / "configs/digits.py")
    assert sorted(bundled_configs()) == sorted(x.stem for x in CONFIGS.glob("[!_]*.py"))
    for name in ("vit_b61", "digits.py"):
        with pytest.raises(
            InputError, match=rf"no config file at {name}; .* vit_b16, vit_b16_distilled, vit_b32"
        ):
            load_config(name)
    with pytest.raises(InputError, match=r"no config file at digit; did you mean digits\? Bundled"):
        load_config("digit")
    (tmp_path / "digits").write_text("")  # somebody's own file
    with pytest.raises(InputError, match="digits is not a Python file"):
        load_config("digits")


# How to compute, in settings that differ from those of the weights.
HOW = {"dtype": "bfloat16", "remat": "hidden", "unroll": 2, "attention": "xla"}
OWN = CLIPConfig(**HOW, vision=ViTConfig(patch_dropout=0.5))
assert not HOW.items() & vars(TINY).items()


def test_the_architecture_of_the_initial_weights_keeps_how_to_compute(tmp_path):
    run, folder = str(tmp_path / "run"), str(tmp_path / "folder")
    write_run(dataclasses.replace(TINY, image_mean=(0.1, 0.2, 0.3)), tmp_path / "run")
    write_tiny_model(tmp_path / "folder")
    for path, mean in ((run, (0.1, 0.2, 0.3)), (folder, TINY.image_mean)):
        model = with_weights(Config(model=OWN, init_from=path, init_architecture=True)).model
        expected = dataclasses.replace(
            TINY,
            image_mean=mean,
            **HOW,
            vision=dataclasses.replace(TINY.vision, patch_dropout=0.5),
        )
        assert dataclasses.replace(model, text=TINY.text) == expected
        assert dataclasses.replace(model.text, tokenizer=TINY.text.tokenizer) == TINY.text
    assert with_weights(Config(model=OWN, init_from=run)).model == OWN
    write_tiny_model(tmp_path / "resnet", config=RESNET)
    other = Config(model=OWN, init_from=str(tmp_path / "resnet"), init_architecture=True)
    assert with_weights(other).model.vision == RESNET.vision
    with pytest.raises(InputError, match="set --init-from"):
        Config(init_architecture=True)
    with pytest.raises(InputError, match=f"init_from='{tmp_path}/missing'"):
        with_weights(dataclasses.replace(other, init_from=f"{tmp_path}/missing"))


def test_a_bias_stays_for_a_sigmoid_loss_and_a_softmax_leaves_it_out(tmp_path, capsys):
    siglip = dataclasses.replace(TINY, init_logit_bias=-10.0)
    write_tiny_model(tmp_path / "siglip", config=siglip)
    path = str(tmp_path / "siglip")
    for objective, bias in (
        ((SigmoidConfig(),), -10.0),
        ((SoftmaxConfig(),), None),
        ((ClassifierConfig(classes=("a", "b")),), -10.0),  # so that it averages with its origin
    ):
        config = Config(init_from=path, init_architecture=True, objective=objective)
        model = with_weights(config).model
        assert model.init_logit_bias == bias
        assert ("logit_bias" in starting_params(read_weights(path), model)) == (bias is not None)
        assert ("its logit bias is left out" in capsys.readouterr().err) == (bias is None)


def test_a_classifier_takes_the_classes_of_the_data_once(tmp_path):
    for name in ("tabby_cat", "ant"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(make_pairs(2)[1][1])
    source = FolderConfig(path=str(tmp_path / "pets"), templates=("a {}",))
    config = Config(data=DataConfig(source=source), objective=(ClassifierConfig(),))
    filled = with_weights(config)
    assert filled.objective == (ClassifierConfig(classes=("ant", "tabby cat")),)
    (tmp_path / "pets/bee").mkdir()
    (tmp_path / "pets/bee/0.png").write_bytes(make_pairs(2)[1][1])
    before, now = to_dict(filled), to_dict(with_weights(config))
    with pytest.raises(InputError, match=r"objective\.0\.classes"):
        check_resumable(tmp_path, before, now, config.samples_after)
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert with_weights(filled) == filled  # needs no data any more
    with pytest.raises(InputError, match="there is no folder"):
        with_weights(config)
    plain = FolderConfig(path=str(tmp_path / "moved"))
    with pytest.raises(InputError, match="source has none"):
        with_weights(dataclasses.replace(config, data=DataConfig(source=plain)))
