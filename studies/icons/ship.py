"""Turn a finished run of this study into the bundled model `icons`, with its card.

    python studies/icons/ship.py runs/released clip_jax/bundled/icons \\
        --command 'clip-jax train studies/icons/released.py --workdir runs/released'

The weights are float16. The card's numbers are those of the run: its `result.json`, and its results
for each image, from which the intervals follow.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import jax
from accuracy import by_set, interval, read

import clip_jax

HERE = Path(__file__).parent
PROMPT = "{} icon"  # one of the study's templates
CARD = (HERE / "card.md").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="Directory of the finished run.")
    parser.add_argument("folder", type=Path, help="Model folder to write, or to replace.")
    parser.add_argument("--command", required=True, help="The run's command, for the card.")
    options = parser.parse_args()
    run, folder = options.run, options.folder
    clip_jax.convert_model(
        run, folder, "clip-jax", dtype="float16", template=PROMPT, overwrite=True
    )
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    del facts["config"]["evals"]  # which has paths of the machine
    (folder / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    text = card(run, folder, facts, options.command)
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(run: Path, folder: Path, facts: dict[str, Any], command: str) -> str:
    """Return the model card, from the results of the run."""
    model = clip_jax.load(folder)
    config, result = facts["config"], facts["result"]
    # Each evaluator but the first has a folder of its own in evals/.
    test, validation = (
        read(next(run.glob(f"evals/**/{name}/images.csv"))) for name in ("classes", "val")
    )
    # A class may have no icon in one of the splits.
    classes = len({row[name] for row in test + validation for name in ("class", "predicted")})
    values = {
        f"{prefix}{metric}": interval(*by_set(table, metric))
        for prefix, table in (("", test), ("val_", validation))
        for metric in ("acc1", "acc5")
    }
    rows = [
        f"| `{name}` | {value:.4g} |"
        for name, value in result.items()
        if name.startswith(("test/", "validation/"))
    ]
    return CARD.format(
        parameters=f"{sum(x.size for x in jax.tree.leaves(model.params)):,}",
        megabytes=round((folder / "model.safetensors").stat().st_size / 1e6, 1),
        vision=model.config.vision,
        text=model.config.text,
        embed_dim=model.config.embed_dim,
        classes=classes,
        chance=1 / classes,
        others="\n".join(rows),
        command=command,
        steps=result["step"],
        batch_size=config["batch_size"],
        samples_seen=result["samples_seen"],
        unique_samples=result["unique_samples"],
        optimizer=config["optim"]["optimizer"]["type"],
        learning_rate=config["optim"]["learning_rate"],
        weight_decay=config["optim"]["weight_decay"],
        minutes=result["seconds/total"] / 60,
        **values,
        **kept(HERE / "results/counts.csv"),
    )


def kept(path: Path) -> dict[str, int]:
    """Return the number of icons of each split."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["split"]: int(row["icons"])
            for row in csv.DictReader(file)
            if row["stage"] == "kept"
        }


if __name__ == "__main__":
    main()
