"""Compare the StableHLO operations of the lowered training step between two source trees.

    python benchmarks/operations.py OLD_TREE NEW_TREE [CONFIG ...]

For each config, at its own batch size on a mesh of 2 x 2 x 2 simulated CPU devices, the script
prints the operations whose number differs. Nothing is compiled or computed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter

CONFIGS = ("vit_b16", "siglip_b16")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def histogram(config: str) -> dict[str, int]:
    """Count the operations of a config's step by name, with this process's package."""
    import clip_jax
    from clip_jax.config_files import load_config
    from clip_jax.sharding import MeshConfig, make_mesh
    from clip_jax.step import Program

    assert clip_jax.__file__.startswith(os.getcwd()), clip_jax.__file__
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    program = Program(load_config(f"configs/{config}.py").recipe, mesh)
    text = program.step.lower(program.state, program.batch).as_text()
    return Counter(
        re.findall(r"^ *(?:%\S+ = )?\"?((?:stablehlo|func|sdy)\.\w+)", text, re.MULTILINE)
    )


def lowered(tree: str, config: str) -> Counter[str]:
    """Count the operations in a process that imports the package of a source tree."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.path.abspath(tree)}
    command = [sys.executable, os.path.abspath(__file__), "--histogram", config]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return Counter(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_tree", help="source tree to compare with")
    parser.add_argument("new_tree", help="source tree to check")
    parser.add_argument("configs", nargs="*", help="names of configs (default: vit_b16 siglip_b16)")
    args = parser.parse_args()
    for config in args.configs or CONFIGS:
        old, new = lowered(args.old_tree, config), lowered(args.new_tree, config)
        print(f"{config}: {old.total():,} operations before, {new.total():,} after", flush=True)
        for name in sorted(old | new, key=lambda name: -abs(new[name] - old[name])):
            if new[name] != old[name]:
                print(f"  {name}: {old[name]:,} before, {new[name]:,} after")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--histogram"]:
        print(json.dumps(histogram(sys.argv[2])))
    else:
        main()
