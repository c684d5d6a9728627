"""Names of models: the bundled one, and released ones of a library that pretends to download."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import clip_jax
from clip_jax.convert import hub
from clip_jax.convert.weight_files import located
from clip_jax.errors import InputError


def library(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))


def test_a_name_is_a_repository_and_weights_without_code_are_preferred(tmp_path, monkeypatch):
    fetched = []

    def download(repository, *, allow_patterns):
        fetched.append((repository, allow_patterns[-1]))
        (tmp_path / f"weights{allow_patterns[-1][1:]}").touch()
        return str(tmp_path)

    library(monkeypatch, download)
    (tmp_path / "model.safetensors").touch()
    assert hub.fetch("ViT-L/14@336px") == tmp_path
    assert fetched == [("openai/clip-vit-large-patch14-336", "*.npz")]
    for file in tmp_path.iterdir():
        file.unlink()
    fetched.clear()
    monkeypatch.setattr(hub, "_WEIGHTS", (["*.safetensors"], ["*.bin"]))
    library(
        monkeypatch, lambda name, allow_patterns: fetched.append(allow_patterns[-1]) or tmp_path
    )
    assert hub.fetch("hf:laion/some") == tmp_path
    assert fetched == ["*.safetensors", "*.bin"]


def test_the_bundled_model_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = clip_jax.load("icons")
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"float32"}
    assert model.config.text.vocab_size == model.tokenizer.vocab_size == 8_192
    folder = hub.BUNDLED / "icons"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000


@pytest.mark.parametrize(
    ("file", "is_model"),
    [
        ("train/00000.tar", False),
        ("counts.csv", False),
        ("model.safetensors", True),
        ("checkpoints/10/params", True),
    ],
)
def test_only_a_model_comes_before_the_bundled_one_of_its_name(
    file, is_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert located(Path("icons")) == hub.BUNDLED / "icons"
    for path in (Path("icons", file), Path("icons/config.json")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert located(Path("icons")) == (Path("icons") if is_model else hub.BUNDLED / "icons")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", r"there is no nowhere; .* icons .* hf:OWNER/NAME .* ViT-B/32"),
        ("RN50", "there is no RN50"),
        (
            "ViT-B/32",
            r"openai/clip-vit-base-patch32 could not be downloaded: no network\. .*folder",
        ),
    ],
)
def test_what_cannot_be_fetched_is_one_message(name, says, monkeypatch):
    def download(repository, *, allow_patterns):
        raise ConnectionError("no network\nand more")

    library(monkeypatch, download)
    with pytest.raises(InputError, match=says):
        clip_jax.load(name)


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"clip-jax-pods\[hub\].*huggingface.co/openai"):
        hub.fetch("ViT-B/32")
