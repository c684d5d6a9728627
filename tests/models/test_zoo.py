"""Architectures as data: SigLIP's sizes are the released models'."""

from math import prod

import pytest

from clip_jax.convert.state_dict import param_shapes
from clip_jax.models import zoo

# Parameters of the released models, from big_vision's files and Hugging Face's.
SIGLIP = {
    "ViT-B-16-SigLIP": 203_155_970,
    "ViT-B-16-SigLIP-256": 203_202_050,
    "ViT-B-16-SigLIP-384": 203_447_810,
    "ViT-B-16-SigLIP-512": 203_791_874,
    "ViT-B-16-SigLIP-i18n-256": 370_626_050,
    "ViT-L-16-SigLIP-256": 652_150_786,
    "ViT-L-16-SigLIP-384": 652_478_466,
    "ViT-SO400M-14-SigLIP": 877_360_306,
    "ViT-SO400M-14-SigLIP-384": 877_960_498,
    "ViT-SO400M-14-SigLIP-378": 877_960_498,
    "ViT-SO400M-16-SigLIP-i18n-256": 1_127_430_706,
    "ViT-B-32-SigLIP2-256": 376_856_066,
    "ViT-B-16-SigLIP2": 375_187_970,
    "ViT-B-16-SigLIP2-256": 375_234_050,
    "ViT-B-16-SigLIP2-384": 375_479_810,
    "ViT-B-16-SigLIP2-512": 375_823_874,
    "ViT-L-16-SigLIP2-256": 881_526_786,
    "ViT-L-16-SigLIP2-384": 881_854_466,
    "ViT-L-16-SigLIP2-512": 882_313_218,
    "ViT-SO400M-14-SigLIP2": 1_135_463_602,
    "ViT-SO400M-14-SigLIP2-384": 1_136_008_498,
    "ViT-SO400M-14-SigLIP2-378": 1_136_008_498,
    "ViT-SO400M-16-SigLIP2-256": 1_135_670_962,
    "ViT-SO400M-16-SigLIP2-384": 1_136_039_602,
    "ViT-SO400M-16-SigLIP2-512": 1_136_555_698,
    "ViT-gopt-16-SigLIP2-256": 1_871_393_906,
    "ViT-gopt-16-SigLIP2-384": 1_871_885_426,
}


def test_siglips_are_all_there():
    assert {name for name in zoo.ARCHITECTURES if "SigLIP" in name} == set(SIGLIP)


@pytest.mark.parametrize("name", SIGLIP)
def test_parameters_of_siglip(name):
    shapes = param_shapes(zoo.get(name))
    assert sum(prod(shape) for shape in shapes.values()) == SIGLIP[name]
