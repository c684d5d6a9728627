"""StableHLO programs of captioners, which generate captions token by token."""

import numpy as np

from clip_jax.convert.verify import our_outputs, relative_difference
from clip_jax.export.stablehlo import outputs, spoken, write
from tests.export.conftest import programs, shorter


def test_captions_of_naflex_at_two_lengths_from_one_artifact(tmp_path, families):
    """The decoder attends only to the valid image tokens."""
    family = families("naflex_mean_all")
    config, params = family.weights.config, family.weights.params
    write(family.weights, tmp_path)
    for sample in (family, shorter(family)):
        theirs = outputs(tmp_path, config, sample.images, sample.tokens)
        words = spoken(config, sample.tokens)
        written = our_outputs(config, params, sample.images, words)["caption_logits"]
        ours = sample.ours | {"caption_logits": written}
        for key, x in theirs.items():
            assert relative_difference(x, ours[key]) <= 1e-5


def test_the_readers_compute_what_the_model_does(tmp_path, families, monkeypatch):
    """Each token of a caption after the first is the most probable one after those before it."""
    family = families("coca")
    config, params = family.weights.config, family.weights.params
    for folder in ("program", "captioner"):
        write(family.weights, tmp_path / folder)
    for name in ("images.npy", "digits.npy"):
        np.save(tmp_path / name, family.images)
    np.save(tmp_path / "tokens.npy", family.tokens)
    monkeypatch.chdir(tmp_path)
    names = {}
    towers, captions, _ = programs()
    exec(towers, names)
    exec(captions.replace("15", str(config.text.context_length - 1)), names)
    for name in ("image_features", "text_features"):
        assert relative_difference(names[name], family.ours[name]) <= 1e-5
    begin = np.full((3, 1), config.text.begin_id, np.int32)
    ids = np.concatenate([begin, names["captions"]], axis=1).astype(np.int32)
    assert ids.shape == (3, config.text.context_length)
    logits = our_outputs(config, params, family.images, ids)["caption_logits"]
    np.testing.assert_array_equal(ids[:, 1:], logits.argmax(axis=-1))
