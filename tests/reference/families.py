"""Models of open_clip's configurations and of transformers' classes, of little depth."""

import contextlib
import functools
import json
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clip_jax.convert import bert, timm
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnext import ConvNeXtConfig
from tests.reference.parity import lively

SHALLOW = (1, 1, 2, 1)  # blocks per stage of a ConvNeXt
# transformers' classes → names of our architectures
CLASSES = {
    "AltCLIP": "AltCLIPModel",
    "ChineseCLIP-ViT-B-16": "ChineseCLIPModel",
    "ChineseCLIP-ViT-L-14": "ChineseCLIPModel",
    "ChineseCLIP-ViT-L-14-336": "ChineseCLIPModel",
    "ChineseCLIP-ViT-H-14": "ChineseCLIPModel",
    "TIPSv2-B-14": "Tipsv2Model",
    "TIPSv2-L-14": "Tipsv2Model",
    "TIPSv2-SO-14": "Tipsv2Model",
}


def configuration(name: str) -> dict[str, Any]:
    """The content of one of open_clip's files of configurations."""
    import open_clip

    folder = Path(open_clip.__file__).parent / "model_configs"
    return json.loads((folder / f"{name}.json").read_text())


def of_families() -> list[str]:
    """open_clip's configurations with a tower of timm but SigLIP's, or with BERT, that we read."""
    import open_clip

    names = []
    for name in open_clip.list_models():
        settings = configuration(name)
        vision, text = settings["vision_cfg"], settings["text_cfg"]
        tower = vision.get("timm_model_name", "siglip")
        is_bert = text.get("hf_model_name") in bert.KNOWN and "multimodal_cfg" not in settings
        if (tower in timm.TOWERS and "siglip" not in tower) or is_bert:
            names.append(name)
    return names


def cut(config: CLIPConfig, depth: int) -> CLIPConfig:
    """The architecture of that depth."""
    vision, text = config.vision, replace(config.text, depth=depth)
    if isinstance(vision, ConvNeXtConfig):
        return replace(config, vision=replace(vision, layers=SHALLOW), text=text)
    return replace(config, vision=replace(vision, depth=depth), text=text)


def text_settings(name: str) -> Any:
    """The settings that transformers would get from the hub."""
    import transformers

    text = bert.KNOWN[name]
    kind = transformers.XLMRobertaConfig if name.startswith("xlm") else transformers.RobertaConfig
    return kind(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=text.depth,
        num_attention_heads=text.num_heads,
        intermediate_size=text.mlp_width,
        max_position_embeddings=text.num_positions,
        type_vocab_size=text.token_types,
        layer_norm_eps=text.norm_epsilon,
        pad_token_id=1,
    )


@contextlib.contextmanager
def shallow(depth: int | None) -> Generator[None]:
    """Build towers by name with that many blocks, in timm, transformers, and clip_jax (None: with
    all); transformers needs no hub."""
    import open_clip

    library, hub = open_clip.timm_model.timm, open_clip.hf_model.AutoConfig
    create, fetch = library.create_model, hub.from_pretrained
    towers, texts = dict(timm.TOWERS), dict(bert.KNOWN)

    def create_model(name: str, **options: Any) -> Any:
        more = {} if depth is None else {"depth": depth}
        if depth is not None and name.startswith("convnext"):
            more = {"depths": SHALLOW}
        return create(name, **options, **more)

    def settings_of(name: Any, **options: Any) -> Any:
        return text_settings(name) if name in bert.KNOWN else fetch(name, **options)

    try:
        library.create_model, hub.from_pretrained = create_model, settings_of
        if depth is not None:
            for name, tower in towers.items():
                is_convnext = isinstance(tower, ConvNeXtConfig)
                change = {"layers": SHALLOW} if is_convnext else {"depth": depth}
                timm.TOWERS[name] = replace(tower, **change)
            for name, text in texts.items():
                bert.KNOWN[name] = replace(text, depth=depth)
        yield
    finally:
        library.create_model, hub.from_pretrained = create, fetch
        timm.TOWERS.update(towers)
        bert.KNOWN.update(texts)


def open_clips(name: str, depth: int | None) -> tuple[Any, dict[str, Any]]:
    """open_clip's model of one of its configurations and its settings; within `shallow`."""
    import open_clip

    settings = configuration(name)
    if "hf_model_name" in settings["text_cfg"]:
        settings["text_cfg"]["hf_model_pretrained"] = False
    elif depth is not None:
        settings["text_cfg"]["layers"] = depth
    if depth is not None and "layers" in settings["vision_cfg"]:
        settings["vision_cfg"]["layers"] = depth
    is_custom = settings.get("custom_text") or "hf_model_name" in settings["text_cfg"]
    kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    return kind(**{x: value for x, value in settings.items() if x != "custom_text"}), settings


def transformers_model(name: str, config: CLIPConfig) -> Any:
    """transformers' model of an architecture of ours."""
    import transformers

    from clip_jax.convert import hugging_face
    from clip_jax.convert.weights import Weights

    if isinstance(config.text, bert.BertConfig):
        pad = max(config.text.first_position - 1, 0)
        rules = replace(config.text.tokenizer, file="", pad_id=pad)
        config = replace(config, text=replace(config.text, tokenizer=rules))
    content = hugging_face.config_json(Weights(config=config, params={}), "float32")
    kind = getattr(transformers, CLASSES[name])
    settings = kind.config_class(
        **{x: value for x, value in content.items() if x not in ("architectures", "dtype")}
    )
    return kind(settings)


def moved(model: Any) -> Any:
    """The model with parameters that change every number, none of them at rest."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(("temperature", "logit_scale")):
                continue
            if x.ndim < 2 or "embed" in name or "token" in name or "latent" in name:
                mean = x.ndim == 1 and name.endswith("weight")
                mean = mean or any(part in name for part in ("gamma", "lambda"))
                x.normal_(float(mean), 0.1)
            elif name.endswith(("weight", "proj")):  # at fresh ones, attention is nearly uniform
                x.normal_(0, x[0].numel() ** -0.5)
    return lively(model)


@functools.cache
def whole(name: str) -> int:
    """The number of parameters of the whole model, of ours."""
    import jax

    from clip_jax.models.clip import CLIP, count

    return count(jax.eval_shape(CLIP(zoo.get(name)).init, jax.random.key(0)))


def counted(make: Callable[[], Any]) -> int:
    """The number of parameters of a PyTorch model, of which nothing is allocated."""
    with torch.device("meta"):
        return sum(x.numel() for x in make().parameters())
