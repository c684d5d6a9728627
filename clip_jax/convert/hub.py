"""Find models by name: the bundled one, and released weights of the Hugging Face hub."""

from pathlib import Path

from clip_jax.errors import InputError, needing

# Models of the package, by the names of their folders.
BUNDLED = Path(__file__).parents[1] / "bundled"
BUNDLED_NAMES = ("icons",)
_OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
_FILES = ["*.json", "*.txt", "*.model"]
_WEIGHTS = (["*.safetensors", "*.npz"], ["*.bin"])  # the second only where the first are missing


def fetch(name: str) -> Path:
    """Return the folder of a bundled model, or download `hf:OWNER/NAME` or a model of OpenAI's.

    Files that were downloaded before are not downloaded again. Raises InputError, which says how
    to get the weights by hand, without `huggingface_hub`, a network or such a repository.
    """
    if name in BUNDLED_NAMES:
        return BUNDLED / name
    repository = _OPENAI.get(name, name.removeprefix("hf:"))
    if repository == name:
        raise InputError(
            f"there is no {name}; give a run directory, a file (.pt, .bin, .safetensors, .npz), a "
            f"folder, {', '.join(BUNDLED_NAMES)} for the model that comes with clip_jax, "
            f"hf:OWNER/NAME for weights of the Hugging Face hub, or one of {', '.join(_OPENAI)}."
        )
    advice = (
        f"Or download huggingface.co/{repository} on another machine and give the folder "
        "(docs/how-to/pretrained.md)."
    )
    with needing(f"{name} is downloaded by an extra: pip install 'clip-jax-pods[hub]'. {advice}"):
        from huggingface_hub import snapshot_download
    try:
        for endings in _WEIGHTS:
            folder = Path(snapshot_download(repository, allow_patterns=[*_FILES, *endings]))
            if any(file for ending in endings for file in folder.glob(ending)):
                break
    except (OSError, ValueError) as error:  # among them all errors of huggingface_hub
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"{repository} could not be downloaded: {reason}. {advice}") from error
    return folder
