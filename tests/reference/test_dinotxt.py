"""dino.txt's own files: a forward pass by PyTorch under Meta's names, and where they can go."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights
from clip_jax.convert.verify import our_outputs, random_inputs, relative_difference
from clip_jax.errors import InputError

WIDTH, HEADS, EXTRA, EMBED, TEXT = 48, 3, 3, 96, 128


def drawn(**shapes):
    """Random tensors by name; norms and gains near 1."""
    torch.manual_seed(2)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) < 2 else shape[-1] ** -0.5
        is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        is_gain |= name.endswith("ln_final.weight")
        tensors[name] = torch.randn(shape) * scale + float(is_gain)
    return tensors


def linear(name, out, width, bias=True):
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def of_head(name, hidden=128):
    """Shapes of the head, two blocks; the hidden width is 8/3 of 48, rounded up to 64."""
    shapes = norm(f"{name}ln_final", WIDTH)
    for i in range(2):
        block = f"{name}blocks.{i}."
        shapes |= norm(f"{block}norm1", WIDTH) | norm(f"{block}norm2", WIDTH)
        shapes |= linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH, bias=False)
        shapes |= linear(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= {f"{block}ls1.gamma": (WIDTH,), f"{block}ls2.gamma": (WIDTH,)}
        shapes |= linear(f"{block}mlp.w1", hidden, WIDTH) | linear(f"{block}mlp.w2", hidden, WIDTH)
        shapes |= linear(f"{block}mlp.w3", WIDTH, hidden)
    if EMBED != 2 * WIDTH:
        shapes |= linear(f"{name}linear_projection", EMBED // 2, WIDTH, bias=False)
    return shapes


def of_text(name):
    shapes = {f"{name}backbone.token_embedding.weight": (520, TEXT)}
    shapes |= {f"{name}backbone.positional_embedding": (12, TEXT)}
    shapes |= norm(f"{name}backbone.ln_final", TEXT)
    for i in range(3):
        block = f"{name}backbone.blocks.{i}."
        shapes |= norm(f"{block}attention_norm", TEXT) | norm(f"{block}ffn_norm", TEXT)
        shapes |= linear(f"{block}attention.qkv", 3 * TEXT, TEXT, bias=False)
        shapes |= linear(f"{block}attention.proj", TEXT, TEXT)
        shapes |= linear(f"{block}feed_forward.fc1", 4 * TEXT, TEXT)
        shapes |= linear(f"{block}feed_forward.fc2", TEXT, 4 * TEXT)
    return shapes | linear(f"{name}head.linear_projection", EMBED, TEXT, bias=False)


TENSORS = drawn(**of_head("visual_model.head."), **of_text("text_model."), logit_scale=(1,))


class Reference:
    """Forward passes that look up tensors by Meta's names."""

    def apply(self, name, x):
        return functional.linear(x, TENSORS[f"{name}.weight"], TENSORS.get(f"{name}.bias"))

    def norm(self, name, x):
        return functional.layer_norm(
            x, x.shape[-1:], TENSORS[f"{name}.weight"], TENSORS[f"{name}.bias"]
        )

    def attend(self, name, x, heads, causal):
        q, k, v = self.apply(f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.apply(f"{name}.proj", y.transpose(1, 2).flatten(2))

    def image(self, tokens):
        x = tokens
        for i in range(2):
            block = f"visual_model.head.blocks.{i}"
            y = self.attend(f"{block}.attn", self.norm(f"{block}.norm1", x), HEADS, False)
            x = x + TENSORS[f"{block}.ls1.gamma"] * y
            y = self.norm(f"{block}.norm2", x)
            y = functional.silu(self.apply(f"{block}.mlp.w1", y)) * self.apply(f"{block}.mlp.w2", y)
            x = x + TENSORS[f"{block}.ls2.gamma"] * self.apply(f"{block}.mlp.w3", y)
        x = self.norm("visual_model.head.ln_final", x)
        return torch.cat([x[:, 0], x[:, EXTRA:].mean(1)], dim=-1)

    def text(self, ids):
        name = "text_model.backbone"
        x = TENSORS[f"{name}.token_embedding.weight"][ids]
        x = x + TENSORS[f"{name}.positional_embedding"][: ids.shape[1]]
        for i in range(3):
            block = f"{name}.blocks.{i}"
            y = self.norm(f"{block}.attention_norm", x)
            x = x + self.attend(f"{block}.attention", y, TEXT // 64, True)
            y = self.apply(f"{block}.feed_forward.fc1", self.norm(f"{block}.ffn_norm", x))
            x = x + self.apply(f"{block}.feed_forward.fc2", functional.gelu(y))
        x = self.apply("text_model.head.linear_projection", self.norm(f"{name}.ln_final", x))
        return x[torch.arange(len(x)), ids.argmax(-1)]


SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
TOWERS = {
    "dinov3": ("DINOv3ViT", {"image_size": 64, "patch_size": 16, "intermediate_size": 96}),
    "dinov2": ("Dinov2WithRegisters", {"image_size": 70, "patch_size": 14}),
}


def save_tower(kind, folder):
    name, options = TOWERS[kind]
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **options, num_register_tokens=EXTRA - 1
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    model.save_pretrained(folder)
    return model


def save_head(kind, folder):
    """Write one file as DINOv3 has it, or two as DINOv2 has them; return the path to read."""
    if kind == "dinov3":
        torch.save(TENSORS, folder / "head.pth")
        return folder / "head.pth"
    folder = folder / "head"
    folder.mkdir()
    parts = {"vision_head": "visual_model.head.", "text_encoder": "text_model."}
    for name, prefix in parts.items():
        own = {n.removeprefix(prefix): x for n, x in TENSORS.items() if n.startswith(prefix)}
        own = {
            n.replace("blocks.", "block_list.", n.startswith("blocks.")): x for n, x in own.items()
        }
        torch.save(own, folder / f"dinov2_dinotxt_{name}.pth")
    return folder


@pytest.mark.parametrize("kind", TOWERS)
def test_metas_files_upon_a_tower_of_transformers(tmp_path, kind):
    tower = save_tower(kind, tmp_path / "tower")
    source, base = save_head(kind, tmp_path), str(tmp_path / "tower")
    weights = read_weights(source, base=base)
    images, ids = random_inputs(weights.config)
    ours = our_outputs(weights.config, weights.params, images, ids)
    with torch.no_grad():
        tokens = tower(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state
        theirs = {"image_features": Reference().image(tokens)}
        theirs["text_features"] = Reference().text(torch.from_numpy(ids).long())
    for name, x in theirs.items():
        assert relative_difference(ours[name], x.numpy()) < 1e-5
    scale = TENSORS["logit_scale"].item() if kind == "dinov3" else np.log(1 / 0.07)
    assert weights.params["logit_scale"] == pytest.approx(scale)
    assert weights.preprocess.shorter_side == round(weights.preprocess.image_size / 0.875)

    options = {"source": source, "base": base}
    convert(ConvertConfig(**options, destination=tmp_path / "model", to="clip-jax"))
    again = read_weights(tmp_path / "model")
    assert again.config.image_head == weights.config.image_head
    card = (tmp_path / "model/README.md").read_text()
    assert "| image head | dino.txt's, 2 blocks on all tokens |" in card
    for to in ("hugging-face", "open-clip"):
        with pytest.raises(InputError, match=r"image_head.*no other library has dino.txt's head"):
            convert(ConvertConfig(**options, destination=tmp_path / "no", to=to))


def test_the_tower_alone_and_what_is_refused(tmp_path):
    model = save_tower("dinov3", tmp_path / "tower")
    source, base = save_head("dinov3", tmp_path), str(tmp_path / "tower")
    out = tmp_path / "out"
    options = {"source": source, "base": base, "to": "clip-jax"}
    convert(ConvertConfig(**options, destination=tmp_path / "model"))
    convert(
        ConvertConfig(source=tmp_path / "model", destination=out, to="hugging-face", tower="image")
    )
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = (
            x(pixels).pooler_output
            for x in (model, transformers.DINOv3ViTModel.from_pretrained(out).eval())
        )
    np.testing.assert_array_equal(before, after)
    with pytest.raises(InputError, match="and no image tower: set --base"):
        read_weights(source)
    narrow = transformers.DINOv3ViTConfig(**SIZES | {"hidden_size": 24}, image_size=32)
    transformers.DINOv3ViTModel(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="for an image tower of width 48"):
        read_weights(source, base=str(tmp_path / "narrow"))
    with pytest.raises(InputError, match="so it has no base"):
        read_weights(tmp_path / "model", base=base)
