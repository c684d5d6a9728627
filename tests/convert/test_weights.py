"""Models for images of another size, or of any aspect ratio."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.convert.conversion import ConvertConfig
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.weights import Head, Weights, cut_to, read_all, with_context, with_input
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, l2_normalize
from clip_jax.models.images import Images, NaFlex, Square
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from tests.conftest import COCA, FAMILIES, MAMMUT, TINY, parameters, write_run
from tests.convert.conftest import assert_same, make_weights


@pytest.mark.parametrize("name", ["vit", "siglip"])  # with a class token, and without
def test_positions_are_resized_bicubically(name):
    """That keeps a quadratic function away from the border. The class token's position stays."""
    weights = make_weights(name)  # 4 x 4 patches
    positions = weights.params["visual"]["positional_embedding"].copy()
    positions[-16:] = np.repeat(np.arange(4.0) ** 2, 4)[:, None]
    visual = weights.params["visual"] | {"positional_embedding": positions}
    after = with_input(replace(weights, params=weights.params | {"visual": visual}), image_size=64)
    assert after.config.vision.image_size == after.preprocess.image_size == 64
    resized = after.params["visual"]["positional_embedding"]
    np.testing.assert_array_equal(resized[:-64], positions[:-16])
    middle = resized[-64:].reshape(8, 8, -1)[3:5, 3:5, 0]
    np.testing.assert_allclose(middle, [[1.25**2] * 2, [1.75**2] * 2], rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "siglip"])  # with a class token, and without
def test_a_model_of_fixed_resolution_becomes_naflex(name):
    """With the same weights, and the same embeddings of images of its grid."""
    weights = make_weights(name)
    naflex = with_input(weights, tokens=20)
    assert naflex.config.vision.image_spec == naflex.preprocess.image_spec == NaFlex(20, 8)
    assert naflex.params is weights.params
    flexible = {"resize_mode": "naflex", "max_patches": 20, "patch_size": 8}
    assert naflex.preprocess == replace(weights.preprocess, **flexible)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(
        embed(naflex, NaFlex(20, 8).pack(pixels)), embed(weights, pixels), rtol=0, atol=1e-5
    )


# With a class token, and without; 2 x 2, 7 x 7 and the table's own 4 x 4 patches.
@pytest.mark.parametrize(("name", "size"), [("vit", 16), ("siglip", 56), ("siglip", 32)])
def test_a_naflex_model_becomes_one_of_fixed_resolution(name, size):
    """Its embeddings are those of the NaFlex model for images of that grid."""
    naflex = with_input(make_weights(name), tokens=50)
    square = with_input(naflex, image_size=size)
    assert square.config.vision.image_spec == square.preprocess.image_spec == Square(size)
    assert square.preprocess.resize_mode == "squash"
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    np.testing.assert_allclose(
        embed(square, pixels), embed(naflex, NaFlex(50, 8).pack(pixels)), rtol=0, atol=1e-5
    )


def embed(weights: Weights, images: Images) -> np.ndarray:
    """Unit embeddings in float32."""
    clip = CLIP(replace(weights.config, dtype="float32"))
    return np.asarray(l2_normalize(jax.jit(clip.encode_image)(weights.params, images)))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("resnet", {"tokens": 9}, "tokens=9 needs a ViT"),
        ("vit", {"tokens": 0}, "vision.max_patches=0 must be at least 1"),
        ("vit", {"tokens": 9, "image_size": 16}, "exclude each other"),
        ("naflex", {"image_size": 30}, "image_size=30 is not a multiple of vision.patch_size=8"),
    ],
)
def test_impossible_inputs_are_errors(name, sizes, message):
    with pytest.raises(InputError, match=message):
        with_input(make_weights(name), **sizes)


class Positionless(ViTConfig):
    """Somebody's own tower, which has no position embeddings."""

    positions_path: Any = None


def test_a_tower_without_positions_takes_another_size():
    """Whatever its class: it has nothing to resize."""
    config = replace(TINY, vision=Positionless(**vars(TINY.vision)))
    weights = Weights(config=config, params={"visual": {}})
    larger = with_input(weights, image_size=32)
    assert larger.config.vision.image_size == larger.preprocess.image_size == 32
    assert larger.params is weights.params


def numbered(config: Any) -> Weights:
    """A model whose text positions are their numbers from 0."""
    table = np.arange(config.text.num_positions, dtype=np.float32)[:, None]
    params = {"text": {"positional_embedding": np.repeat(table, config.text.width, 1)}}
    return Weights(config=config, params=params, path="M")


def positions(weights: Weights) -> np.ndarray:
    return weights.params["text"]["positional_embedding"][:, 0]


@pytest.mark.parametrize("kept", [0, 4, 8])
@pytest.mark.parametrize("config", [TINY, COCA], ids=["clip", "coca"])
def test_positions_of_texts_are_stretched_and_cut(config, kept):
    """A class token, behind the text, keeps its own. The last position is beyond the table's."""
    weights = numbered(config)  # 10 tokens
    longer = with_context(weights, 17, kept)
    expected = np.arange(17) * 1.0
    expected[kept:] = kept + np.arange(17 - kept) * (10 - kept) / (17 - kept)
    assert expected[-1] > 9
    last = [10] if config is COCA else []
    np.testing.assert_allclose(positions(longer), [*expected, *last], rtol=1e-6)
    assert (longer.config.text.kept_positions, longer.config.text.stretched_from) == (kept, 10)
    shorter = with_context(longer, 3)
    np.testing.assert_array_equal(positions(shorter), [*positions(longer)[:3], *last])
    assert shorter.config.text == replace(longer.config.text, context_length=3)  # with the record
    assert with_context(weights, None) is with_context(weights, 10) is weights


@pytest.mark.parametrize("name", ["tips", "xlm_roberta"])
def test_positions_that_a_tower_has_already_are_not_stretched(name):
    weights = Weights(config=FAMILIES[name], params={"text": {}})
    longer = with_context(weights, 12)
    assert longer.params is weights.params
    assert longer.config.text == replace(FAMILIES[name].text, context_length=12)


class OwnPositions(TextConfig):
    """Somebody's own text tower, whose positions are not ours."""

    positions_path: Any = None


@pytest.mark.parametrize(
    ("config", "length", "kept", "message"),
    [
        (make_weights("siglip").config, 64, 4, "M: context_length=64 does not fit a text tower"),
        (MAMMUT, 5, 4, r"depend on the padding \(pool='mean'\).* texts padded to 10 tokens"),
        (TINY, 20, 9, "M: kept_positions=9 must be from 0 to 8, so that two of the 10 positions"),
        (FAMILIES["xlm_roberta"], 13, 4, "and at most 12 tokens"),
        (TINY, 100_000, 4, "text.context_length=100000 must be at least 2 and at most 65536"),
        (
            replace(TINY, text=OwnPositions(**vars(TINY.text))),
            *(20, 4, r"context_length=20: text/positional_embedding has shape \(10, 32\), and a"),
        ),
    ],
    ids=["siglip", "mammut", "kept", "bert", "longest", "own"],
)
def test_other_lengths_of_texts_that_are_impossible_are_errors(config, length, kept, message):
    with pytest.raises(InputError, match=message):
        with_context(numbered(config), length, kept)


def test_convert_changes_the_length_of_texts(tmp_path, capsys):
    workdir, *_ = write_run(TINY, tmp_path / "run")
    longer = [str(workdir), str(tmp_path / "new"), "--to", "clip-jax", "--context-length", "20"]
    assert main(["convert", *longer]) == 2  # 20 positions are kept, of 10
    assert "kept_positions=20 must be from 0 to 8" in capsys.readouterr().err
    assert main(["convert", *longer, "--kept-positions", "4"]) == 0
    expected = with_context(read_weights(workdir), 20, 4)
    assert_same(read_weights(tmp_path / "new"), read_all(expected))
    card = (tmp_path / "new/README.md").read_text()
    for row in ("context_length | 20", "text_positions_stretched_from | 10"):
        assert f"| {row} |" in card
    assert "| text_positions_kept | 4 |" in card
    with pytest.raises(InputError, match="kept_positions=-1 must be at least 0"):
        ConvertConfig(source=workdir, destination=tmp_path, to="clip-jax", kept_positions=-1)


def test_a_tower_without_texts_has_no_length_of_texts():
    weights = replace(make_weights("vit"), only_tower="image")
    with pytest.raises(InputError, match="context_length=20 needs a text tower; omit it"):
        with_context(weights, 20)


def test_tokens_are_read_for_naflex_models_alone(tmp_path):
    write_weights(make_weights("naflex"), tmp_path / "naflex", "clip-jax")
    assert read_weights(tmp_path / "naflex", tokens=7).config.vision.image_spec == NaFlex(7, 8)
    write_weights(make_weights("siglip"), tmp_path / "fixed", "clip-jax")
    with pytest.raises(InputError, match="fixed resolution of 32 pixels"):
        read_weights(tmp_path / "fixed", tokens=7)


def test_convert_makes_naflex_models_and_back(tmp_path, capsys):
    workdir, *_ = write_run(TINY, tmp_path / "run")
    run, naflex, longer, back = (str(tmp_path / name) for name in ("run", "naflex", "64", "back"))
    to = ["--to", "clip-jax"]
    assert main(["convert", run, naflex, *to, "--tokens", "20"]) == 0
    assert main(["convert", naflex, longer, *to, "--tokens", "64"]) == 0
    assert read_weights(tmp_path / "64").preprocess.max_patches == 64
    card = (tmp_path / "64/README.md").read_text()
    assert "| max_patches | 64 |" in card
    assert "(NaFlex); `tokens=N` sets the patches per image." in card
    size = str(TINY.vision.image_size)
    assert main(["convert", longer, back, *to, "--image-size", size]) == 0
    before, after = read_weights(workdir), read_weights(tmp_path / "back")
    squashed = replace(before.preprocess, resize_mode="squash")
    assert_same(after, replace(before, preprocess=squashed))
    capsys.readouterr()
    both = ["--tokens", "20", "--image-size", size]
    assert main(["convert", run, str(tmp_path / "x"), *to, *both]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Projections with a bias and without; none, which are added; ResNet's attention pooling.
@pytest.mark.parametrize("name", ["vit", "resnet", "siglip", "tips"])
def test_embeddings_are_cut_to_their_first_channels(name):
    config = FAMILIES["tips"] if name == "tips" else make_weights(name).config
    params = jax.tree.map(np.asarray, parameters(config))
    head = Head(("ant", "bee"), (), np.full((2, config.embed_dim), 3.0, np.float32))
    weights = Weights(config=config, params=params, head=head)
    short = read_all(cut_to(weights, 6, "M"))
    assert short.config.embed_dim == 6
    pixels = np.random.default_rng(0).random((2, *[config.vision.image_size] * 2, 3), np.float32)
    ids = np.random.default_rng(1).integers(1, 40, (2, config.text.context_length))
    for method, inputs in (("encode_image", pixels), ("encode_text", ids)):
        expected = jax.jit(getattr(CLIP(config), method))(params, inputs)[:, :6]
        got = jax.jit(getattr(CLIP(short.config), method))(short.params, inputs)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(short.head.kernel, axis=1), np.linalg.norm(head.kernel, axis=1), rtol=1e-6
    )
    assert cut_to(weights, None, "M") is cut_to(weights, config.embed_dim, "M") is weights


def test_widths_that_embeddings_cannot_have_are_refused():
    with pytest.raises(InputError, match="dim=99, but the embeddings of M have 16 channels"):
        cut_to(Weights(config=TINY, params={}), 99, "M")
    coca = Weights(config=COCA, params=jax.tree.map(np.asarray, parameters(COCA)))
    with pytest.raises(InputError, match="of M cannot be cut to dim=8: CoCa's decoder needs"):
        cut_to(coca, 8, "M")
