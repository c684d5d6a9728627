"""Same features in, same numbers out as the clip-benchmark package."""

import json
import types
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals.catalog import open_languages
from clip_jax.evals.datasets import Labelled
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.languages import open_babel
from clip_jax.evals.reader import Embedded
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zero_shot import translate
from clip_jax.models.clip import CLIP
from tests.conftest import TINY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip_benchmark.datasets import builder
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval


class Features:
    """A model whose inputs are its features already."""

    def encode_image(self, x):
        return x

    def encode_text(self, x):
        return x


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


MESH = sharding.make_mesh(sharding.MeshConfig())


def test_retrieval_with_several_captions_an_image():
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((203, 32))).astype(np.float32)
    owner = np.repeat(np.arange(203), rng.integers(1, 6, 203))
    texts = unit(images[owner] + 0.3 * rng.standard_normal((len(owner), 32))).astype(np.float32)
    batches = [(torch.tensor(images), [list(texts[owner == i]) for i in range(203)])]
    theirs = zeroshot_retrieval.evaluate(
        Features(),
        batches,
        lambda rows: torch.tensor(np.stack(rows)),
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    ours = retrieval(images, texts, owner, MESH)
    assert 0.1 < theirs["image_retrieval_recall@1"] < 0.9
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def vectors(texts: Sequence[str]) -> np.ndarray:
    """A direction of its own for each text."""
    seeds = (zlib.crc32(text.encode()) for text in texts)
    return unit([np.random.default_rng(seed).standard_normal(16) for seed in seeds])


class Words(Encoder):
    """Features drawn by the text."""

    def texts(self, texts):
        return vectors(texts).astype(np.float32)


ENCODER = Words(CLIP(TINY), {}, MESH, Preprocess(image_size=16), lambda texts: np.zeros((1, 1)))


def rows_of(texts):
    return torch.tensor(vectors(texts), dtype=torch.float32)


def test_recalls_of_each_language(tmp_path, monkeypatch):
    """Their reader of forty captioned pictures in XTD200's layout, ours, and the same features."""
    folder, names = tmp_path / "xtd200", [f"{i:03d}.jpg" for i in range(40)]
    (folder / "images").mkdir(parents=True)
    (folder / "test_image_names.txt").write_text("".join(f"{x}\n" for x in names))
    for language in ("deu_Latn", "eng_Latn"):
        (folder / f"{language}.txt").write_text("".join(f"{language} {x}\n" for x in names))
    for x in names:
        (folder / "images" / x).touch()
    lines = lambda url: (folder / Path(url).name).read_text().splitlines()  # noqa: E731
    monkeypatch.setattr("clip_benchmark.datasets.xtd200._get_lines", lines)  # from the network
    data = open_languages("xtd200", tmp_path)
    assert len(data.languages) == 2
    noise = np.random.default_rng(0).standard_normal((data.count, 16))
    loaded = [data.load(i) for i in range(data.count)]
    seen = vectors([next(iter(answer.values()))[0] for _, answer in loaded])
    features = unit(seen + 0.25 * noise).astype(np.float32)
    images = Embedded(features, np.arange(data.count), [x for _, x in loaded], [])
    ours = translate(data, images, ENCODER)
    # A picture is its path.
    opened = lambda path: types.SimpleNamespace(convert=lambda mode: Path(path))  # noqa: E731
    monkeypatch.setattr("PIL.Image.open", opened)
    for language in data.languages:
        pairs = builder.build_dataset(
            "xtd200", root=str(tmp_path), language=language, task="zeroshot_retrieval"
        )
        images, captions = zip(*pairs, strict=True)
        assert list(images) == [x for x, _ in loaded]
        batches = [(torch.tensor(features), captions)]
        theirs = zeroshot_retrieval.evaluate(
            Features(), batches, rows_of, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        for metric, value in theirs.items():
            assert ours.by_language[language][metric] == pytest.approx(value, abs=1e-6), metric
        assert theirs["image_retrieval_recall@1"] < 1
    first, second = (ours.by_language[x]["image_retrieval_recall@5"] for x in data.languages)
    assert first != second
    assert ours.values["mean/image_retrieval_recall@5"] == pytest.approx((first + second) / 2)


def test_zero_shot_of_a_language(monkeypatch):
    """Babel-ImageNet's names and prompts as they are in their wheel, on images of all classes."""
    # It makes a float of an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    language = "ne"  # of fewer classes
    texts = Path(builder.__file__).parent
    labels = np.random.default_rng(5).integers(0, 1_000, 600)
    imagenet = Labelled(600, lambda i: ("", int(labels[i])), [""] * 1_000, [])
    data = open_babel(imagenet, texts, (language,))
    indices, names = json.loads((texts / "babel_imagenet.json").read_text())[language.upper()]
    prompts_of = json.loads((texts / "nllb_dist13b_prompts.json").read_text())[language.upper()]
    templates = [template.replace("{}", "{c}") for template in prompts_of]
    classifier = zeroshot_classification.zero_shot_classifier(
        Features(), rows_of, names, templates, "cpu", amp=False
    )
    weights = dict(zip(indices, classifier.T.numpy(), strict=True))
    noise = np.random.default_rng(6).standard_normal((600, 16))
    features = np.stack([weights.get(x, np.zeros(16)) for x in labels]) + 1.2 * unit(noise)
    features = unit(features).astype(np.float32)
    images = Embedded(features, np.arange(600), list(labels), [])
    ours = translate(data, images, ENCODER)
    mine = np.flatnonzero(np.isin(labels, indices))

    class Loader(list):
        class dataset:
            classes = tuple(names)

    target = [indices.index(x) for x in labels[mine]]
    batches = Loader([(torch.tensor(features[mine]), torch.tensor(target))])
    logits, target = zeroshot_classification.run_classification(
        Features(), classifier, batches, "cpu", amp=False
    )
    acc1, acc5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
    recall = zeroshot_classification.balanced_accuracy_score(target, logits.argmax(1))
    assert 0.1 < acc1 < acc5 < 1
    assert ours.by_language[language]["acc1"] == pytest.approx(acc1, abs=1e-6)
    assert ours.by_language[language]["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)
    assert ours.values["mean/acc5"] == pytest.approx(acc5, abs=1e-6)
