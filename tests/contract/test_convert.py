"""A model folder in a bucket: its vocabulary goes with it, and tokenizers read a local copy."""

from dataclasses import replace

import numpy as np

from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.vocabulary import keep
from clip_jax.models.text import TokenizerConfig
from clip_jax.storage import files
from tests import vocabularies
from tests.convert.conftest import make_weights


def test_a_vocabulary_goes_with_a_folder_in_a_bucket(gs, tmp_path):
    words = vocabularies.unigram(tmp_path / "words.json")
    weights = make_weights("vit")
    tokenizer = TokenizerConfig(file=str(words), clean="lower", begin_id=0, end_id=2, pad_id=1)
    text = replace(weights.config.text, pool="last", tokenizer=tokenizer)
    weights = replace(weights, config=replace(weights.config, text=text))
    url = f"{gs.url}/model"
    write_weights(weights, files.as_path(url), "clip-jax")
    again = read_weights(files.as_path(url))
    assert again.config.text.tokenizer == replace(tokenizer, file=f"{url}/tokenizer.json")
    ids = make_tokenizer(again.config.text)("a photo", 12)
    np.testing.assert_array_equal(ids, make_tokenizer(text)("a photo", 12))
    keep(again.config.text.tokenizer, str(tmp_path / "run"))  # as a run that is given it does
    assert (tmp_path / "run/tokenizer.json").read_bytes() == words.read_bytes()
