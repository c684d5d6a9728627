"""A model card follows the weights: from a run to a folder, and from folder to folder."""

import json

from clip_jax.cli.commands import main
from tests.conftest import TINY, write_run


def test_what_a_run_was_is_carried_from_folder_to_folder(tmp_path):
    """Weights that say nothing of themselves have a card that says so."""
    workdir, *_ = write_run(TINY, tmp_path / "run")
    result = {"zero_shot/seen/top1": 0.93, "seconds/steps": 12.0, "note": "fast"}
    (workdir / "result.json").write_text(json.dumps(result))
    run, there, back, lost = (str(tmp_path / name) for name in ("run", "there", "back", "lost"))
    assert main(["convert", run, there, "--to", "hugging-face"]) == 0
    assert main(["convert", there, back, "--to", "clip-jax"]) == 0
    for name in ("there", "back"):
        card = (tmp_path / name / "README.md").read_text()
        assert f"# {name}\n" in card
        assert "| steps | 2 |\n" in card
        assert "| batch_size | 1024 |\n" in card
        assert "| optim/learning_rate | " in card
        assert "| image_activation | quick_gelu |" in card
        assert "| zero_shot/seen/top1 | 0.93 |" in card
        assert "seconds/steps" not in card
        assert "license:  # fill in" in card
        facts = json.loads((tmp_path / name / "training.json").read_text())
        assert facts["result"] == result
    assert "AutoModel.from_pretrained" in (tmp_path / "there/README.md").read_text()
    (tmp_path / "back/training.json").unlink()
    assert main(["convert", back, lost, "--to", "clip-jax"]) == 0
    card = (tmp_path / "lost/README.md").read_text()
    assert card.count("Not known.") == 2
    assert not (tmp_path / "lost/training.json").exists()
