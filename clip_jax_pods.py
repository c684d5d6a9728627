"""The console script `clip-jax`, which begins outside of the package `clip_jax`.

The package `clip-jax` on PyPI, of another project, is imported as `clip_jax`, too. If both are
installed, `import clip_jax` imports a mixture of them: this module looks for the other one first.
"""

import contextlib
import sys
from importlib import metadata

OTHER = "clip-jax"


def main() -> int:
    """Run the command; exit with code 2 if the other project's package is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        other = metadata.distribution(OTHER)
        print(
            f"clip-jax: version {other.version} of the package {OTHER}, of another project, is "
            f"installed in {other.locate_file('')}. It is imported as clip_jax, as this one is, "
            f"and Python mixes the two. Remove it, then install this one again: "
            f"pip uninstall {OTHER} && pip install --force-reinstall --no-deps clip-jax-pods",
            file=sys.stderr,
        )
        return 2
    from clip_jax.__main__ import main as run

    return run()
