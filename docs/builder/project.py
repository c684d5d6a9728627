"""Write the repository's address and the version of `clip_jax/__init__.py` into other files.

pyproject.toml has the address, and takes the version from the package.

    python docs/builder/project.py [--address ADDRESS] [--version VERSION]

With an option, the script changes these two files first.
"""

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATED = {  # where each file states them
    "pyproject.toml": (
        'Repository = "{address}"',
        'Issues = "{address}/issues"',
        'Changelog = "{address}/blob/main/CHANGELOG.md"',
    ),
    "clip_jax/__init__.py": ('__version__ = "{version}"',),
    "CITATION.cff": ("\nversion: {version}", "\nrepository-code: {address}"),
    "mkdocs.yml": ("\nrepo_url: {address}",),
    "README.md": ("git clone {address}",),
    "docs/index.md": ("git clone {address}",),
    ".github/ISSUE_TEMPLATE/config.yml": ("url: {address}/security/policy",),
    "notebooks/free_tpu.py": ('REPOSITORY = "{address}"',),
    "docs/install.md": (
        "git clone {address}",
        "\n{version}\n[CpuDevice",
        "dist/clip_jax_pods-{version}-py3-none-any.whl",
    ),
}
VALUES = {"address": r"https://[\w.-]+/[\w.-]+/[\w.-]+", "version": r"\d+(?:\.\d+)+"}


def read(root: Path = ROOT) -> dict[str, str]:
    """Return the address that pyproject.toml has, and the version that the package has."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    package = (root / "clip_jax/__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', package, re.M)
    return {"address": project["urls"]["Repository"], "version": version}


def written(name: str, values: dict[str, str], root: Path = ROOT) -> str:
    """Return a file's text with these values; raise ValueError where it does not state one."""
    text = (root / name).read_text()
    for template in STATED[name]:
        line = re.escape(template.format(**{value: f"<{value}>" for value in values}))
        for value, pattern in VALUES.items():
            line = line.replace(f"<{value}>", pattern)
        now = template.format(**values).replace("\\", r"\\")
        text, count = re.subn(line, now, text)
        if not count:
            raise ValueError(f"{name} does not contain {template.strip()!r}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="such as https://github.com/OWNER/NAME")
    parser.add_argument("--version")
    options = {key: value for key, value in vars(parser.parse_args()).items() if value}
    earlier = read()
    values = earlier | options
    for name in STATED:
        (ROOT / name).write_text(written(name, values))
    for page in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*")]:
        text = page.read_text()
        if earlier["address"] in text:
            page.write_text(text.replace(earlier["address"], values["address"]))


if __name__ == "__main__":
    main()
