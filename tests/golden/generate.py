"""Write the golden files anew: `python tests/golden/generate.py`. Say in the commit why they moved."""

import json
from pathlib import Path

import jax

HERE = Path(__file__).parent


def parameter_tree() -> None:
    from tests.models.test_clip import TINY

    from clip_jax.models.clip import CLIP

    params = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    tree = {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    (HERE / "parameter_tree.json").write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    parameter_tree()
