"""Same features in, same numbers out as the clip-benchmark package."""

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.evals import measure, zero_shot
from clip_jax.evals.compositions import composition
from clip_jax.evals.datasets import Contrasted, Labelled
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.languages import open_babel, open_languages
from clip_jax.evals.retrieval import retrieval
from clip_jax.models.clip import CLIP
from tests.conftest import TINY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip_benchmark.datasets import builder
    from clip_benchmark.metrics import (
        image_caption_selection,
        zeroshot_classification,
        zeroshot_retrieval,
    )

pytestmark = pytest.mark.filterwarnings("ignore")  # of clip-benchmark, about its own calls


class Features:
    """A model whose inputs are its features already."""

    def encode_image(self, x):
        return x

    def encode_text(self, x):
        return x


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig())


def test_retrieval_with_several_captions_an_image(mesh):
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((203, 32))).astype(np.float32)
    owner = np.repeat(np.arange(203), rng.integers(1, 6, 203))
    texts = unit(images[owner] + 0.3 * rng.standard_normal((len(owner), 32))).astype(np.float32)
    batches = [
        (torch.tensor(images[some]), [list(texts[owner == i]) for i in some])
        for some in np.array_split(np.arange(203), 7)
    ]
    theirs = zeroshot_retrieval.evaluate(
        Features(), batches, lambda rows: torch.tensor(np.stack(rows)), "cpu", amp=False,
        recall_k_list=[1, 5, 10],
    )  # fmt: skip
    ours = retrieval(images, texts, owner, mesh)
    assert 0.1 < theirs["image_retrieval_recall@1"] < 0.9
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_zero_shot_classification(monkeypatch):
    # It makes a float of an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    rng = np.random.default_rng(1)
    labels = np.minimum(rng.geometric(0.15, 1_009) - 1, 29)  # classes of very different sizes
    weights = unit(rng.standard_normal((30, 24))).astype(np.float32)
    images = unit(weights[labels] + 0.4 * rng.standard_normal((1_009, 24))).astype(np.float32)

    class Loader(list):
        class dataset:
            classes = tuple(range(30))

    batches = Loader(
        (torch.tensor(images[part]), torch.tensor(labels[part]))
        for part in np.array_split(np.arange(1_009), 5)
    )
    logits, target = zeroshot_classification.run_classification(
        Features(), torch.tensor(weights.T), batches, "cpu", amp=False
    )
    acc1, acc5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
    recall = zeroshot_classification.balanced_accuracy_score(target, logits.argmax(1))
    ours = zero_shot.classification(images @ weights.T, labels)
    assert 0.2 < acc1 < acc5 < 0.99
    assert ours["acc1"] == pytest.approx(acc1, abs=1e-6)
    assert ours["acc5"] == pytest.approx(acc5, abs=1e-6)
    assert ours["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)


def test_average_precision():
    rng = np.random.default_rng(3)
    truth = rng.random((400, 11)) < 0.2
    scores = truth + rng.standard_normal((400, 11)).astype(np.float32)
    theirs = zeroshot_classification.average_precision_per_class(
        torch.tensor(scores), torch.tensor(truth)
    ).numpy()
    ours = [zero_shot.average_precision(scores[:, c], truth[:, c]) for c in range(11)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_right_caption_against_the_wrong_one():
    rng = np.random.default_rng(4)
    images = unit(rng.standard_normal((307, 16))).astype(np.float32)
    right, wrong = (
        unit(images + noise * rng.standard_normal((307, 16))).astype(np.float32)
        for noise in (0.9, 1.0)
    )
    pairs = list(zip(right, wrong, strict=True))
    batches = [  # images are [B, C, H, W]: the features are one pixel's channels
        (torch.tensor(images[part])[:, :, None, None], [pairs[i] for i in part])
        for part in np.array_split(np.arange(307), 4)
    ]

    class Flat(Features):
        def encode_image(self, x):
            return x[:, :, 0, 0]

    theirs = image_caption_selection.evaluate(
        Flat(), batches, lambda rows: torch.tensor(np.stack(rows)), "cpu", amp=False
    )
    data = Contrasted(307, lambda i: ("", ("", "")), ["all"] * 307, lambda *_: True)
    won = (images * right).sum(axis=1) > (images * wrong).sum(axis=1)
    assert 0.4 < theirs["text_acc"] < 0.9
    assert composition(won, data.groups, data)["acc"] == pytest.approx(theirs["text_acc"], abs=1e-6)


def vector(word: str) -> np.ndarray:
    """A direction of its own for each text or file."""
    return unit(np.random.default_rng(zlib.crc32(word.encode())).standard_normal(16))


class Words(Encoder):
    """Features drawn by the text."""

    def texts(self, texts):
        return np.stack([vector(text) for text in texts]).astype(np.float32)


@pytest.fixture
def encoder(mesh):
    return Words(CLIP(TINY), {}, mesh, Preprocess(image_size=16), lambda texts: np.zeros((1, 1)))


def rows_of(texts):
    return torch.tensor(np.stack([vector(text) for text in texts]), dtype=torch.float32)


def multilingual(folder: Path) -> None:
    """Forty captioned pictures in two languages, in XTD200's layout (tests/evals has them all)."""
    (folder / "images").mkdir(parents=True)
    names = [f"{i:03d}" for i in range(40)]
    (folder / "test_image_names.txt").write_text("".join(f"{x}.jpg\n" for x in names))
    for language in ("deu_Latn", "eng_Latn"):
        (folder / f"{language}.txt").write_text("".join(f"{language} {x}\n" for x in names))
    for x in names:
        (folder / "images" / f"{x}.jpg").touch()


def test_recalls_of_each_language(encoder, tmp_path, monkeypatch):
    """Their reader of the files, ours, and the same features for both."""
    multilingual(tmp_path / "xtd200")
    lines = lambda url: (tmp_path / "xtd200" / Path(url).name).read_text().splitlines()  # noqa: E731
    monkeypatch.setattr("clip_benchmark.datasets.xtd200._get_lines", lines)  # from the network
    data = open_languages("xtd200", tmp_path)
    assert len(data.languages) == 2
    noise = np.random.default_rng(0).standard_normal((data.count, 16))
    loaded = [data.load(i) for i in range(data.count)]
    seen = [vector(next(iter(answer.values()))[0]) for _, answer in loaded]
    features = unit(np.stack(seen) + 0.25 * noise).astype(np.float32)
    images = measure.Embedded(features, np.arange(data.count), [x for _, x in loaded], [])
    ours = measure.translate(data, images, encoder)
    monkeypatch.setattr("PIL.Image.open", lambda path: Named(path))
    for language in data.languages:
        pairs = builder.build_dataset(
            "xtd200", root=str(tmp_path), language=language, task="zeroshot_retrieval"
        )
        assert [Path(image.path).name for image, _ in pairs] == [
            Path(str(x)).name for x, _ in loaded
        ]
        batches = [
            (torch.tensor(features[part]), [pairs[i][1] for i in part])
            for part in np.array_split(np.arange(data.count), 3)
        ]
        theirs = zeroshot_retrieval.evaluate(
            Features(), batches, rows_of, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        for metric, value in theirs.items():
            assert ours.by_language[language][metric] == pytest.approx(value, abs=1e-6), metric
        assert theirs["image_retrieval_recall@1"] < 1
    first, second = (ours.by_language[x]["image_retrieval_recall@5"] for x in data.languages)
    assert first != second
    assert ours.values["mean/image_retrieval_recall@5"] == pytest.approx((first + second) / 2)


class Named:
    """A picture that knows where it lies."""

    def __init__(self, path):
        self.path = path

    def convert(self, mode):
        return self


def test_zero_shot_of_a_language(encoder, monkeypatch):
    """Babel-ImageNet's names and prompts as they are in their wheel, on images of all classes."""
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    language = "ne"  # of fewer classes
    texts = Path(builder.__file__).parent
    labels = np.random.default_rng(5).integers(0, 1_000, 600)
    imagenet = Labelled([""] * 1_000, [], 600, lambda i: ("", int(labels[i])))
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
    ours = measure.translate(
        data, measure.Embedded(features, np.arange(600), list(labels), []), encoder
    )
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
    assert 0.1 < acc1 < acc5 < 1
    assert ours.by_language[language]["acc1"] == pytest.approx(acc1, abs=1e-6)
    assert ours.values["mean/acc5"] == pytest.approx(acc5, abs=1e-6)
