"""Compare the families of open_clip and transformers beside CLIP, SigLIP and CoCa, at full width.

    PYTHONPATH=. python benchmarks/families.py [NAME ...]

For each of open_clip's configurations with a tower of MobileCLIP, PE core, EVA, ConvNeXt or BERT,
and of each published size of AltCLIP, ChineseCLIP and TIPSv2: a model of random weights, of full
width and with two blocks (a ConvNeXt: five), is built by the library and read by clip_jax, which
writes it again; the library loads that. Embeddings and logits of both directions are compared, in
float32, and the numbers of parameters of the whole models. It needs the extra `peers` and 16 GiB,
and takes about 12 minutes.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from clip_jax.convert.formats import TARGETS, read_weights, verify, write_weights
from clip_jax.convert.verify import BOUND, our_outputs, random_inputs, relative_difference
from clip_jax.models import zoo

sys.path.insert(0, str(Path(__file__).parent.parent))  # for what the tests compare by

from tests.reference import families

DEPTH = 2


def compare(name: str, folder: Path) -> tuple[float, float]:
    """Return the largest relative difference of a model that is read, and of it written again."""
    if name in families.CLASSES:
        to = "hugging-face"
        config = families.cut(zoo.get(name), DEPTH)
        families.moved(families.transformers_model(name, config)).save_pretrained(folder / "in")
    else:
        to = "open-clip"
        model, settings = families.open_clips(name, DEPTH)
        (folder / "in").mkdir()
        content = {"model_cfg": settings, "preprocess_cfg": {}}
        (folder / "in/open_clip_config.json").write_text(json.dumps(content))
        state = families.moved(model).state_dict()
        torch.save(state, folder / "in/open_clip_pytorch_model.bin")
        del model, state
    weights = read_weights(folder / "in")
    inputs = random_inputs(weights.config)
    ours = our_outputs(weights.config, weights.params, *inputs)
    theirs = TARGETS[to].outputs(weights, folder / "in", inputs)
    read = max(relative_difference(ours[x], theirs[x]) for x in ours)
    write_weights(weights, folder / "out", to)
    return read, verify(weights, folder / "out", to).max_relative_difference


def count(name: str) -> int:
    """Return the number of parameters of the library's whole model."""
    if name in families.CLASSES:
        return families.counted(lambda: families.transformers_model(name, zoo.get(name)))
    return families.counted(lambda: families.open_clips(name, None)[0])


def main() -> None:
    warnings.simplefilter("ignore")
    failed = []
    names = sys.argv[1:] or [*families.of_families(), *families.CLASSES]
    for name in names:
        with families.shallow(None):
            theirs, ours = count(name), families.whole(name)
        # TIPSv2 has the mask token of pre-training beside what we keep.
        more = zoo.get(name).vision.width if name.startswith("TIPS") else 0
        with families.shallow(DEPTH), tempfile.TemporaryDirectory() as folder:
            read, written = compare(name, Path(folder))
        passed = max(read, written) <= BOUND and theirs == ours + more
        failed += [] if passed else [name]
        print(
            f"{name:28} {ours:>13,} parameters ({theirs - ours:+d}), read {read:.1e}, "
            f"written {written:.1e}",
            "" if passed else "FAILED",
            flush=True,
        )
    print(f"{len(names) - len(failed)} of {len(names)} within {BOUND:.0e}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
