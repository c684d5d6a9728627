"""The notebooks as pages, with the outputs that are saved in them."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks"
# Letters of the few formulas.
TEX = {r"\,": " ", r"\log": "log", r"\alpha": "α", r"\beta": "β", r"\times": "×", r"\cdot": "·"}


def formula(match: re.Match[str]) -> str:
    """Write a formula of a line of text in HTML."""
    text = match[1]
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    return re.sub(r"\^(?:\{(.*?)\}|(\w|α|β))", r"<sup>\1\2</sup>", text).replace("-", "−")


def page(name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's page, and its pictures by file name."""
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"(?<!`)\$([^$\n`]+)\$(?!`)", formula, source))
            continue
        parts.append(f"```py\n{source}\n```")
        parts += outputs(cell["outputs"], name, pictures)
    where = f"This page is `notebooks/{name}.ipynb` with its saved outputs; run it with Jupyter."
    title, _, rest = "\n\n".join(parts).partition("\n\n")
    return f"{title}\n\n{where}\n\n{rest}\n", pictures


def outputs(cells: list[dict[str, Any]], name: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Yield the outputs of a cell; texts that follow each other are one block."""
    lines: list[str] = []
    for output in cells:
        data = output.get("data", {})
        if "image/png" in data:
            if lines:
                yield printed(lines)
            lines = []
            file = f"{name}-{len(pictures) + 1}.png"
            pictures[file] = base64.b64decode(data["image/png"])
            yield f"![output of the code above]({file})"
        else:
            lines.append("".join(output.get("text", data.get("text/plain", ""))))
    if lines:
        yield printed(lines)


def printed(lines: list[str]) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(line.strip("\n") for line in lines))
    return f"```{{ .text .output }}\n{text}\n```"
