"""Write the golden files anew: `python -m tests.golden.generate`. Say why in the commit."""

import json
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")

from tests import test_step  # noqa: E402
from tests.models.test_clip import parameter_tree  # noqa: E402

HERE = Path(__file__).parent

if __name__ == "__main__":
    for name, value in {"parameter_tree": parameter_tree(), "step": test_step.golden()}.items():
        (HERE / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
