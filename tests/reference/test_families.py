"""MobileCLIP, PE core, EVA, ConvNeXt, BERT, AltCLIP, ChineseCLIP and TIPSv2: the numbers, token ids
and pixels of open_clip and of transformers, in and out, for one small model of each."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2

from clip_jax.convert import bert, hugging_face, image_processor, timm, tokenizer_files
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.open_clip_config import read_config
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.convert.weights import with_input
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies
from tests.reference import families
from tests.reference.parity import random_weights, read_back
from tests.reference.pictures import kinds

LENGTH, VOCAB, EMBED = 16, 500, 24


# ------------------------------------------------------------------ small vocabularies


def ids_of(*tokens):
    return {token: i for i, token in enumerate(tokens)}


@functools.cache
def rules():
    """The normalisation of sentencepiece, which XLM-R's and TIPSv2's vocabularies have."""
    made_at_run_time: Any = sentencepiece_model_pb2
    with tempfile.NamedTemporaryFile() as file:
        data = vocabularies.sentencepiece_model(Path(file.name)).read_bytes()
    return made_at_run_time.ModelProto.FromString(data).normalizer_spec.precompiled_charsmap


@functools.cache
def tokenizer(name):
    """A tokenizer of transformers, of the class that a model's text tower has, trained here."""
    words = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    if name.startswith("roberta"):
        untrained = transformers.RobertaTokenizer(vocab=ids_of(*words))
    elif name == "ChineseCLIP":
        untrained = transformers.BertTokenizer()
    elif name == "TIPSv2":
        untrained = transformers.Tipsv2Tokenizer(_spm_precompiled_charsmap=rules())
    else:
        untrained = transformers.XLMRobertaTokenizer(_spm_precompiled_charsmap=rules())
    trained = untrained.train_new_from_iterator(vocabularies.captions(), 400)
    if name == "TIPSv2":  # with the bytes that unknown letters fall into
        content = json.loads(trained.backend_tokenizer.to_str())["model"]
        pieces = [*content["vocab"], *(f"<0x{i:02X}>" for i in range(256))]
        merges = [tuple(x) for x in content["merges"]]
        return type(trained)(ids_of(*pieces), merges, _spm_precompiled_charsmap=rules())
    return trained


# ------------------------------------------------------------------ small models of open_clip


def smaller(vision, **changes):
    """A narrow tower of a family, with two blocks."""
    if isinstance(vision, ConvNeXtConfig):
        sizes = {"layers": (1, 2, 1, 1), "width": 8, "image_size": 64}
    else:
        patch = 16 if vision.patch_size == 16 else 14
        sizes = {"width": 48, "depth": 2, "num_heads": 3, "patch_size": patch}
        sizes["image_size"] = 3 * patch
    return replace(vision, **sizes | changes)


def timms(create, name, vision, options):
    """timm's tower of a name with the sizes of ours."""
    if isinstance(vision, ConvNeXtConfig):
        return create(name, depths=vision.layers, dims=vision.widths, **options)
    sizes = {
        "img_size": vision.image_size,
        "embed_dim": vision.width,
        "depth": vision.depth,
        "num_heads": vision.num_heads,
    }
    if name != "vit_base_mci_224":
        scale = vision.layer_scale
        sizes |= {"patch_size": vision.patch_size, "mlp_ratio": vision.mlp_ratio}
        return create(name, **sizes, **options | ({"init_values": scale} if scale else {}))
    from timm.models import vision_transformer_hybrid as hybrid  # its name fixes the stem's width

    stem = hybrid.ConvStem(
        channels=vision.stem_widths[1:],
        stride=(4, 2, 2),
        kernel_size=(4, 2, 2),
        padding=0,
        act_layer=torch.nn.GELU,
    )
    del options["pretrained"]
    return hybrid._create_vision_transformer_hybrid(
        name, backbone=stem, embed_args={"proj": False}, no_embed_class=True, **sizes, **options
    )


@pytest.fixture
def small(monkeypatch, open_clip):
    """Let timm, transformers and clip_jax build small towers by the names of large ones."""
    create = open_clip.timm_model.timm.create_model

    def create_model(name, **options):
        return timms(create, name, timm.TOWERS[name], options)

    def tower(name, **changes):
        monkeypatch.setitem(timm.TOWERS, name, smaller(timm.TOWERS[name], **changes))

    monkeypatch.setattr(open_clip.timm_model.timm, "create_model", create_model)
    fetch = open_clip.hf_model.AutoConfig.from_pretrained

    def settings_of(name, **options):
        return families.text_settings(name) if name in bert.KNOWN else fetch(name, **options)

    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", settings_of)
    for name, text in bert.KNOWN.items():
        sizes = {"vocab_size": VOCAB, "width": 32, "depth": 2, "num_heads": 2, "num_positions": 80}
        monkeypatch.setitem(bert.KNOWN, name, replace(text, **sizes))
    return tower


def settings_of(name, **more):
    """A configuration of open_clip with small sizes; `more` are settings of its text tower."""
    content = families.configuration(name)
    content["embed_dim"] = EMBED
    vision, text = content["vision_cfg"], content["text_cfg"]
    if "timm_model_name" in vision:
        vision["image_size"] = timm.TOWERS[vision["timm_model_name"]].image_size
    else:
        vision |= {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    if "hf_model_name" in text:
        more = {"hf_model_pretrained": False, **more}
    else:
        more = {"width": 32, "heads": 2, "layers": 2, **more}
    text |= {"context_length": LENGTH, **more}
    return content


def save(open_clip, folder, content, dtype=torch.float32, pixels=None):
    """Write a model of random weights as open_clip does; return the file's tensors."""
    folder.mkdir()
    kind = {x: content[x] for x in content if x != "custom_text"}
    is_custom = content.get("custom_text") or "hf_model_name" in content["text_cfg"]
    torch.manual_seed(0)
    model = families.moved((open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**kind))
    state = {n: x.to(dtype) if x.is_floating_point() else x for n, x in model.state_dict().items()}
    path = folder / "open_clip_model.safetensors"
    safetensors.torch.save_file({n: x.contiguous() for n, x in state.items()}, path)
    whole = {"model_cfg": content, "preprocess_cfg": pixels or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    if "hf_model_name" in content["text_cfg"]:
        tokenizer(content["text_cfg"]["hf_model_name"]).save_pretrained(folder)
    tensors = read_tensors(path)
    if is_custom:
        return tensors
    # ConvNeXts are released as `open_clip.CLIP`, which has timm's towers, too; we write the other.
    return {
        n if n.startswith(("visual.", "logit_")) else f"text.{n}": x for n, x in tensors.items()
    }


IMAGES = {
    "MobileCLIP-B": {},
    "MobileCLIP2-L-14": {},
    "PE-Core-B-16": {},
    "PE-Core-bigG-14-448": {"layer_scale": 0.1},  # and no class token
    "EVA01-g-14": {},
    "EVA02-B-16": {},
    "EVA02-E-14": {},
    "convnext_base": {},
    "convnext_large_d": {},  # an MLP for the projection
    "convnext_xxlarge": {},
}


def unnamed(config):
    """The model without the path of its vocabulary."""
    rules = replace(config.text.tokenizer, file="")
    return replace(config, text=replace(config.text, tokenizer=rules))


def check_there_and_back(open_clip, folder, content):
    """Numbers of open_clip's own folder and of ours; the same bits, of float16, too."""
    original = save(open_clip, folder / "in", content)
    weights = read_weights(folder / "in")
    assert verify(weights, folder / "in", "open-clip").passed
    read_back(weights, folder / "out", "open-clip", original)
    assert verify(weights, folder / "out", "open-clip").passed
    again = read_weights(folder / "out")
    assert unnamed(again.config) == unnamed(weights.config)
    assert again.preprocess == weights.preprocess
    half = save(open_clip, folder / "half", content, torch.float16)
    assert any(x.dtype == np.float16 for x in half.values())
    read_back(read_weights(folder / "half"), folder / "half again", "open-clip", half)
    return weights.config


@pytest.mark.parametrize("name", IMAGES)
def test_open_clips_image_towers(tmp_path, open_clip, small, name):
    timm_name = families.configuration(name)["vision_cfg"]["timm_model_name"]
    small(timm_name, **IMAGES[name])
    config = check_there_and_back(open_clip, tmp_path, settings_of(name))
    head = "mlp" if name == "convnext_large_d" else "linear"
    assert getattr(config.vision, "head", head) == head
    assert config.text.causal == (name != "MobileCLIP2-L-14")


@pytest.mark.parametrize(
    ("name", "head", "pooler"),
    [
        ("roberta-ViT-B-32", "mlp", "mean_pooler"),
        ("xlm-roberta-base-ViT-B-32", "linear", "mean_pooler"),
        ("xlm-roberta-large-ViT-H-14", "mlp", "cls_last_hidden_state_pooler"),
    ],
)
def test_open_clips_text_towers(tmp_path, open_clip, small, name, head, pooler):
    content = settings_of(name, hf_proj_type=head, hf_pooler_type=pooler)
    config = check_there_and_back(open_clip, tmp_path, content)
    pool = "mean" if pooler == "mean_pooler" else "first"
    assert (config.text.head, config.text.pool) == (head, pool)


def test_timms_names_have_the_sizes_that_we_say():
    import timm as reference

    others = ("siglip", "dino")
    towers = {x: y for x, y in timm.TOWERS.items() if not any(other in x for other in others)}
    assert len(towers) == 18
    for name, vision in towers.items():
        with torch.device("meta"):
            model = reference.create_model(name, pretrained=False, num_classes=0)
        if isinstance(vision, ConvNeXtConfig):
            stages = [(len(x.blocks), x.blocks[0].conv_dw.in_channels) for x in model.stages]
            assert stages == [*zip(vision.layers, vision.widths, strict=True)], name
            assert model.stages[0].blocks[0].norm.eps == vision.norm_epsilon, name
            continue
        block, table = model.blocks[0], model.pos_embed.shape
        positions = vision.num_patches + (vision.class_token and vision.class_position)
        assert table == (1, positions, vision.width), name
        assert (model.cls_token is not None) == vision.class_token, name
        assert (len(model.blocks), block.attn.num_heads) == (vision.depth, vision.num_heads), name
        assert block.mlp.fc2.in_features == vision.mlp_width, name
        assert block.norm1.eps == vision.norm_epsilon, name
        if isinstance(vision, RotaryConfig):
            grid = [vision.reference_grid] * 2 if vision.rotary != "none" else None
            assert (list(model.rope.ref_feat_shape) if model.rope else None) == grid, name


# ------------------------------------------------------------------ small models of transformers

VISION = {
    "image_size": 42,
    "patch_size": 14,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP = {"vision_config": VISION | {"intermediate_size": 100}, "projection_dim": EMBED}
BERT = TEXT | {"max_position_embeddings": 80}
CLASSES = {
    "AltCLIP": CLIP | {"text_config": BERT | {"project_dim": EMBED}},
    "ChineseCLIP": CLIP | {"text_config": BERT},
    "TIPSv2": {
        "vision_config": VISION | {"mlp_ratio": 3.6, "num_register_tokens": 2},
        "text_config": TEXT | {"max_position_embeddings": LENGTH},
    },
}


def save_class(folder, name, dtype=torch.float32, **changes):
    """Write a model of random weights and its processor as transformers does; return the tensors
    as we write them."""
    prefix = name.replace("TIPS", "Tips")
    kind = getattr(transformers, f"{prefix}Model")
    torch.manual_seed(0)
    settings = kind.config_class(**CLASSES[name] | changes)
    families.moved(kind(settings)).to(dtype).save_pretrained(folder)
    size = {"height": 42, "width": 42}
    if name == "TIPSv2":
        pixels = transformers.Tipsv2ImageProcessor(size=size)
    else:
        processor = "ChineseCLIP" if name == "ChineseCLIP" else "CLIP"
        pixels = getattr(transformers, f"{processor}ImageProcessor")
        pixels = pixels(size={"shortest_edge": 42}, crop_size=size)
    words = tokenizer(name)
    words.model_max_length = LENGTH
    getattr(transformers, f"{prefix}Processor")(pixels, words).save_pretrained(folder)
    tensors = read_tensors(folder / "model.safetensors")
    # transformers 5 writes another name than released files have.
    new, old = "vision_model.encoder.layer.", "vision_model.encoder.layers."
    tensors = {n.replace(new, old) if name == "AltCLIP" else n: x for n, x in tensors.items()}
    if name == "TIPSv2":  # pre-training's mask token is not kept; of the temperature, the logarithm
        mask, value = tensors["vision_encoder.mask_token"], tensors["temperature"]
        written = np.exp(np.log(value.astype(np.float32)))
        np.testing.assert_allclose(written, value, rtol=1e-6 if value.dtype == np.float32 else 1e-3)
        tensors |= {"vision_encoder.mask_token": np.zeros_like(mask), "temperature": written}
    return tensors


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_classes(tmp_path, name):
    original = save_class(tmp_path / "in", name)
    weights = read_weights(tmp_path / "in")
    assert verify(weights, tmp_path / "in", "hugging-face").passed
    read_back(weights, tmp_path / "out", "hugging-face", original)
    assert verify(weights, tmp_path / "out", "hugging-face").passed
    again = read_weights(tmp_path / "out")
    assert unnamed(again.config) == unnamed(weights.config)
    assert again.preprocess == weights.preprocess
    half = save_class(tmp_path / "half", name, torch.float16)
    assert any(x.dtype == np.float16 for x in half.values())
    read_back(read_weights(tmp_path / "half"), tmp_path / "half again", "hugging-face", half)


def test_tipsv2_at_another_size(tmp_path):
    """Its own interpolation of positions, bilinear and antialiased, to other grids."""
    save_class(tmp_path, "TIPSv2")
    weights = read_weights(tmp_path)
    reference = transformers.Tipsv2Model.from_pretrained(tmp_path).eval()
    for size in (28, 70):
        resized = with_input(weights, image_size=size)
        images, ids = random_inputs(resized.config)
        with torch.no_grad():
            given = torch.from_numpy(images).permute(0, 3, 1, 2)
            theirs = reference.get_image_features(given).pooler_output.numpy()
        ours = our_outputs(resized.config, resized.params, images, ids)["image_features"]
        assert relative_difference(ours, theirs) < 1e-5


def test_a_padding_id_that_no_file_names(tmp_path):
    """As in XLM-R's own folders: the published id, not 0, with which texts begin."""
    text = zoo.get("AltCLIP").text
    default = tokenizer_files.missing(text, "none")
    tokenizer("AltCLIP").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    read = tokenizer_files.read(tmp_path, text, default)
    assert (read.begin_id, read.pad_id, read.end_id) == (0, 1, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_no_temperature(tmp_path, dtype):
    """Nor does transformers' table of sinusoids, in the comparison."""
    save_class(tmp_path / "in", "TIPSv2")
    weights = read_weights(tmp_path / "in")
    write_weights(weights, tmp_path / "out", "hugging-face", dtype=dtype)
    assert verify(weights, tmp_path / "out", "hugging-face", dtype=dtype).passed
    scale = read_weights(tmp_path / "out").params["logit_scale"]
    np.testing.assert_allclose(scale, weights.params["logit_scale"], rtol=1e-6)


def test_a_temperature_in_the_configuration(tmp_path):
    """Where published files have it: they have no tensor."""
    save_class(tmp_path, "TIPSv2", temperature_init_value=0.02)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["temperature"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    weights = read_weights(tmp_path)
    np.testing.assert_allclose(np.exp(weights.params["logit_scale"]), 50, rtol=1e-5)
    assert verify(weights, tmp_path, "hugging-face").passed


# ------------------------------------------------------------------ token ids and pixels

# Markers are tokens wherever they come from. Not here: a padding token in a caption, to which
# RoBERTa's classes give no position of its own.
MARKED = ["a </s> photo", "<mask> of a <unk>", "[SEP] the [MASK] [CLS]", "cat<s>dog", "", " \n\t "]
STRINGS = [*MARKED, *vocabularies.captions(394), *vocabularies.odd_strings(600)]


def check_inputs(weights, tokenize, transform, bound=0.0):
    """1,000 strings and 28 kinds of pictures; `bound` is a number of 255 steps."""
    assert weights.config.text.context_length == LENGTH
    ids = make_tokenizer(weights.config.text)(STRINGS, LENGTH, True)
    np.testing.assert_array_equal(ids, tokenize(STRINGS))
    assert len(np.unique(ids)) > 50
    images = kinds()
    assert (len(STRINGS), len(images)) == (1000, 28)
    largest = bound / 255 / min(weights.preprocess.std) + 1e-6
    for image in images:
        np.testing.assert_allclose(weights.preprocess(image), transform(image), 0, largest)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_processors(tmp_path, name):
    """From a folder of transformers, and from ours, which it loads."""
    save_class(tmp_path / "in", name)
    weights = read_weights(tmp_path / "in")
    write_weights(weights, tmp_path / "out", "hugging-face")
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    for folder in (tmp_path / "in", tmp_path / "out"):
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        assert type(processor).__name__ == name.replace("TIPS", "Tips") + "Processor"

        def tokenize(texts, processor=processor):
            return processor(text=texts, return_tensors="np", **options)["input_ids"]

        def transform(image, processor=processor):
            (x,) = processor(images=image, return_tensors="np")["pixel_values"]
            return x.transpose(1, 2, 0)

        check_inputs(weights, tokenize, transform, 2)  # torchvision rounds in its own way
        if name != "TIPSv2":  # which has no other
            kind = type(processor.image_processor).__name__
            processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder)
            check_inputs(weights, tokenize, functools.partial(transform, processor=processor))


@pytest.mark.parametrize("family", hugging_face.FAMILIES, ids=lambda family: family.model_type)
def test_defaults_of_classes(tmp_path, family):
    """Of a file with nothing but the model's type."""
    kind = getattr(transformers, family.class_name)
    every = json.loads(kind.config_class().to_json_string(use_diff=False))
    few = {"model_type": family.model_type}
    assert family.read(few, tmp_path / "x") == family.read(every, tmp_path / "x")


@pytest.mark.parametrize(("kind", "size"), [("Tipsv2", 448), ("ChineseCLIP", 224)])
def test_defaults_of_image_processors(tmp_path, kind, size):
    """Of a file with nothing but the class."""
    name = f"{kind}ImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name}))
    ours = image_processor.read(tmp_path, size)
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    for image in kinds()[:8]:
        (x,) = theirs(images=image, return_tensors="np")["pixel_values"]
        bound = 2 / 255 / min(ours.std) + 1e-6
        np.testing.assert_allclose(ours(image), x.transpose(1, 2, 0), 0, bound)


PIXELS = {
    "PE-Core-B-16": {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
    "MobileCLIP-B": {
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    },
    "roberta-ViT-B-32": {},
    "xlm-roberta-base-ViT-B-32": {},
}


@pytest.mark.parametrize("name", PIXELS)
def test_open_clips_inputs(tmp_path, open_clip, small, name):
    """From a folder of open_clip, and from ours, which it loads."""
    from open_clip.push_to_hf_hub import save_config_for_hf

    content = settings_of(name)
    if timm_name := content["vision_cfg"].get("timm_model_name"):
        small(timm_name)
        content = settings_of(name)
    save(open_clip, tmp_path / "in", content, pixels=PIXELS[name])
    model = open_clip.create_model(f"local-dir:{tmp_path / 'in'}")
    save_config_for_hf(model, tmp_path / "in/open_clip_config.json", content)
    weights = read_weights(tmp_path / "in")
    mode = PIXELS[name].get("resize_mode", "shortest")
    assert (weights.preprocess.resize_mode, weights.preprocess.rules) == (mode, "openai")
    write_weights(weights, tmp_path / "out", "open-clip")
    for folder in (tmp_path / "in", tmp_path / "out"):
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        check_inputs(
            weights,
            lambda x, f=tokenizer: f(x).numpy(),
            lambda x, f=transform: f(x).numpy().transpose(1, 2, 0),
        )


# ------------------------------------------------------------------ invalid input

OTHERS = {
    "MobileCLIP-S1": r"vision_cfg.timm_model_name='fastvit_mci1'.*no FastViT",
    "ViTamin-S": r"vision_cfg.timm_model_name='vitamin_small_224'.*no ViTamin",
    "swin_base_patch4_window7_224": r"timm_model_name='swin_.*no Swin, of attention in windows",
    "vit_relpos_medium_patch16_cls_224": r"timm_model_name='vit_relpos_.*no ViT with relative pos",
    "vit_medium_patch16_gap_256": r"timm_model_name='vit_medium_.*no ViT without a class token",
    "nllb-clip-base": r"hf_model_name='facebook/nllb-.*no NLLB, the encoder of a transl",
    "nllb-clip-base-siglip": r"hf_model_name='facebook/nllb-.*no NLLB",
    "mt5-base-ViT-B-32": r"hf_model_name='google/mt5-base'.*no mT5.*relative positions",
    "coca_roberta-ViT-B-32": r"text_cfg.hf_model_name is not supported with multimodal_cfg",
}


def config_of(folder, content):
    """Read a file of open_clip."""
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": content}))
    return read_config(path)[0]


def test_open_clips_other_families(tmp_path, open_clip):
    """All of its configurations are read but those of the families above."""
    not_read = set()
    for name in open_clip.list_models():
        try:
            config_of(tmp_path, families.configuration(name))
        except InputError:
            not_read.add(name)
    kinds_of = ("MobileCLIP-S", "MobileCLIP2-S", "ViTamin", "nllb", "mt5", *OTHERS)
    assert not_read == {name for name in open_clip.list_models() if name.startswith(kinds_of)}
    for name, message in OTHERS.items():
        with pytest.raises(InputError, match=message):
            config_of(tmp_path, families.configuration(name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("PE-Core-B-16", {"timm_pool": "avg"}, r"timm_pool='avg'.*vit_pe_core.*needs 'map', None"),
        ("MobileCLIP-B", {"timm_proj": "mlp"}, r"timm_proj='mlp'.*vit_base_mci.*'token', None"),
        ("EVA02-B-16", {"image_size": 256}, r"image_size=256 of a eva02_base.*'token', None, 224"),
        ("convnext_base", {"timm_pool": "abs_attn"}, r"timm_pool='abs_attn'.*needs '', 'linear'"),
        ("convnext_base", {"timm_proj": "none"}, r"timm_proj='none'.*convnext_base"),
        ("convnext_base", {"timm_model_name": "resnet50"}, r"'resnet50'.*use one of vit_base"),
        ("roberta-ViT-B-32", {"hf_pooler_type": "max_pooler"}, r"hf_pooler_type='max_pooler'"),
        ("roberta-ViT-B-32", {"hf_proj_type": "none"}, r"hf_proj_type='none'.*linear or mlp"),
        (
            "roberta-ViT-B-32",
            {"hf_model_name": "bert-base"},
            r"'bert-base'.*supported are roberta-",
        ),
    ],
)
def test_open_clips_other_settings(tmp_path, name, change, message):
    content = families.configuration(name)
    content["text_cfg" if next(iter(change)).startswith("hf_") else "vision_cfg"] |= change
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("AltCLIP", "text", {"project_dim": 32}, r"text_config.project_dim=32 .*must be 24"),
        ("AltCLIP", "text", {"pad_token_id": 0}, r"text_config.pad_token_id=0 .*must be 1"),
        ("AltCLIP", "text", {"hidden_act": "silu"}, r"text_config.hidden_act='silu'"),
        (
            "TIPSv2",
            "vision",
            {"use_swiglu_ffn": True},
            r"vision_config.use_swiglu_ffn=True .*must be False",
        ),
        ("TIPSv2", "vision", {"qkv_bias": False}, r"vision_config.qkv_bias=False .*must be True"),
        ("TIPSv2", "text", {"scale_sqrt_depth": False}, r"text_config.scale_sqrt_depth=False"),
        ("TIPSv2", "text", {"hidden_act": "gelu"}, r"text_config.hidden_act='gelu'.*'relu'"),
    ],
)
def test_transformers_other_settings(tmp_path, name, section, change, message):
    settings = CLASSES[name][f"{section}_config"] | change
    save_class(tmp_path, name, **{f"{section}_config": settings})
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("PE-Core-B-16", {
            "openai": r"vision=RotaryConfig \(needs ViTConfig or ResNetConfig\)",
            "hugging-face": r"CLIPModel.*vision=RotaryConfig \(needs ViTConfig\).*--to clip-jax",
            "big-vision": r"vision=RotaryConfig \(needs ViTConfig\)",
            "open-clip": r"only by timm's names.*patches of 16 pixels.*; .*choose --to clip-jax",
        }),
        ("MobileCLIP-B", {
            "openai": r"vision=ConvStemConfig", "hugging-face": r"vision=ConvStemConfig",
        }),
        ("convnext_base", {
            "openai": r"vision=ConvNeXtConfig", "hugging-face": r"vision=ConvNeXtConfig",
            "open-clip": r"none is a ConvNeXt.*64 pixels; .*choose --to clip-jax",
        }),
        ("roberta-ViT-B-32", {
            "openai": r"text=BertConfig \(needs TextConfig\)",
            "hugging-face": r"ChineseCLIPModel .*text.head='mlp' .*text.pool='mean'",
            "open-clip": r"only by the names of published models.*text.width=48",
        }),
        ("AltCLIP", {"open-clip": r"text.head='norm' \(needs 'linear' or 'mlp'\)"}),
        ("ChineseCLIP-ViT-B-16", {"open-clip": r"only by the names of published.*text.width=48"}),
        ("TIPSv2-B-14", {
            "openai": r"vision=TipsConfig", "open-clip": r"vision=TipsConfig.*text=TipsTextConfig",
        }),
    ],
)  # fmt: skip
def test_formats_without_a_family(tmp_path, name, messages):
    config = zoo.get(name)
    sizes: dict[str, Any] = {"width": 48, "depth": 1, "num_heads": 3, "vocab_size": VOCAB}
    tokenizer = TokenizerConfig() if type(config.text) is TextConfig else TokenizerConfig(file="")
    text = replace(config.text, tokenizer=tokenizer, **sizes)
    config = replace(config, embed_dim=48, vision=smaller(config.vision), text=text)
    weights = random_weights(config)
    for to, message in messages.items():
        with pytest.raises(InputError, match=message):
            write_weights(weights, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
