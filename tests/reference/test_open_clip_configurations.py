"""The page that says which of open_clip's configurations are read is current.

    python -m tests.reference.test_open_clip_configurations

writes docs/reference/open-clip.md.
"""

import importlib.util
import json
import re
import tempfile
from collections import Counter
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clip_jax.convert.open_clip_config import CONFIG_NAME, read_config
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig

PAGE = Path(__file__).parents[2] / "docs/reference/open-clip.md"
COMMAND = "python -m tests.reference.test_open_clip_configurations"
_TEXT = """\
# Configurations of open_clip

Of the {total} model configurations in open_clip_torch {version}, `clip-jax` reads {read}. For each
of the other {others}, the error gives the reason in the last column.

The [settings of the model](settings/model.md) describe the towers, and [Get pretrained
weights](../how-to/pretrained.md) lists released weights. A test generates this table and compares
it with this page. It reads configurations only; `BENCHMARKS.md` has the numerical checks.

| configuration | result | towers and image size (pixels), or the reason |
|---|---|---|
{rows}
"""


def towers(config: CLIPConfig) -> str:
    """Name the classes of a model's towers and its image size."""
    parts = [f"`{type(tower).__name__}`" for tower in (config.vision, config.text)]
    if config.decoder is not None:
        parts.append(f"`{type(config.decoder).__name__}`")
    return f"{', '.join(parts)}, {config.vision.image_spec.side}"


def reason(error: InputError, path: Path) -> str:
    """Shorten an error to its first part, without the path, settings as code."""
    first = str(error).removeprefix(f"{path}: ").split("; ")[0].rstrip(".")
    return re.sub(r"((?:\w+\.)?\w+=[^\s,:]+)", r"`\1`", first)


def model_file(name: str) -> Path:
    """Return the path of open_clip's own configuration of a model."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / f"model_configs/{name}.json"


@cache
def results() -> dict[str, tuple[str, str]]:
    """Read all configurations. Return `read` and the towers of each, or `not read` and why."""
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        for file in model_file("").parent.glob("*.json"):
            content = {"model_cfg": json.loads(file.read_text()), "preprocess_cfg": {}}
            path.write_text(json.dumps(content))
            try:
                answers[file.stem] = "read", towers(read_config(path)[0])
            except InputError as error:
                answers[file.stem] = "not read", reason(error, path)
    return dict(sorted(answers.items(), key=lambda item: item[0].lower()))


def page() -> str:
    """Write the page."""
    answers = results()
    read = sum(result == "read" for result, _ in answers.values())
    rows = (f"| `{name}` | {result} | {why} |" for name, (result, why) in answers.items())
    return _TEXT.format(
        version=version("open_clip_torch").rpartition(".")[0],
        total=len(answers),
        read=read,
        others=len(answers) - read,
        rows="\n".join(rows),
    )


def test_the_page_says_which_configurations_are_read():
    assert PAGE.read_text(encoding="utf-8") == page(), f"run {COMMAND}"


def test_most_configurations_are_read_and_the_others_have_a_reason():
    answers = results()
    assert sum(result == "read" for result, _ in answers.values()) >= 110
    assert answers["MobileCLIP-S1"][0] == "not read"
    assert "FastViT" in answers["MobileCLIP-S1"][1]
    assert not [why for _, why in answers.values() if tempfile.gettempdir() in why]


def test_what_a_configuration_leaves_out_is_open_clips_default():
    """Of ResNets and towers of timm and transformers, most of these settings are refused."""
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME

        def read(content: Any) -> CLIPConfig:
            path.write_text(json.dumps({"model_cfg": content}))
            return read_config(path)[0]

        for name in (name for name, (result, _) in results().items() if result == "read"):
            content = json.loads(model_file(name).read_text())
            vision, text = content["vision_cfg"], content["text_cfg"]
            if "hf_model_name" not in text:
                counts["text"] += 1
                every = {"text_cfg": asdict(CLIPTextCfg()) | text}
                assert read(content | every) == read(content), name
            if "timm_model_name" not in vision and isinstance(vision["layers"], int):
                counts["vision"] += 1
                every = {"vision_cfg": asdict(CLIPVisionCfg()) | vision}
                assert read(content | every) == read(content), name
    assert min(counts["text"], counts["vision"]) > 40


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
