"""Build the wheel and the sdist of the last commit, and test the wheel as its users install it.

    pip install build
    python release/build.py OUTPUT [--tag TAG] [--only-build]

1. Builds from two clean clones: a `build/` folder of a checkout would add modules that were deleted
   since. The first wheel is made from the first sdist, the second from the second clone, and the
   bytes of wheels and sdists must be equal. OUTPUT gets one of each.
2. Installs the wheel with the extra `test` into an empty environment, and runs the unit tests, in a
   folder that has the repository without the package.
3. Runs the README's commands in that environment and folder, and compares their outputs.

It stops at the first failure. `--tag` also checks that the version is that of a tag such as v0.2.0.
Two cores take a quarter of an hour.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"clip_jax": "clip_jax", "clip_jax/configs": "configs"}  # in the wheel → in the tree
# What the folder lacks in which the wheel is tested, and the one file of tests that reads this.
ABSENT = ("clip_jax", "clip_jax_pods.py")
OF_THE_REPOSITORY = "tests/test_house.py"
README = """\
import sys
from pathlib import Path
from tests import pages
python = Path(sys.executable)
problems = pages.run(pages.ROOT / "README.md", Path.cwd(), by_hand=True, python=python)
sys.exit("\\n".join(problems) or None)
"""


def run(*command: object, folder: Path = ROOT, **environment: str) -> str:
    """Print a command and run it; return its output, or stop with it if the command fails."""
    words = [str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nrelease: the command above ended with {done.returncode}.")
    return done.stdout


def version_of(root: Path) -> str:
    """Return the version of a tree's package."""
    text = (root / "clip_jax/__init__.py").read_text()
    return re.findall(r'^__version__ = "(.*)"$', text, re.M)[0]


def check_tree(tag: str | None) -> str:
    """Return the version, after checks of the tree that is released."""
    version = version_of(ROOT)
    if changed := run("git", "status", "--porcelain"):
        sys.exit(f"release: commit or remove these changes first:\n{changed}")
    if tag not in (None, f"v{version}"):
        sys.exit(f"release: the tag {tag} is not v{version}, the version of the package.")
    heading = re.search(
        rf"^## {re.escape(version)}\b.*$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    if heading is None:
        sys.exit(f"release: CHANGELOG.md has no heading for {version}.")
    if tag and "not yet published" in heading[0]:
        sys.exit(f"release: CHANGELOG.md says {heading[0]!r}; state the date of the release.")
    return version


def normalised(sdist: bytes, epoch: int) -> bytes:
    """Return a .tar.gz with sorted members, whose times, owners and modes depend on nothing."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(sdist)) as source,
        gzip.GzipFile("", "wb", fileobj=packed, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as target,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime = member.type, member.size, epoch
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(plain, source.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


def build(folder: Path, output: Path) -> None:
    """Build wheel and sdist twice; write them to `output` if their bytes are equal."""
    epoch = run("git", "log", "-1", "--format=%ct").strip()
    os.umask(0o022)
    results: list[dict[str, bytes]] = []
    # Without options, `build` makes the wheel from the sdist.
    for name, options in (("first", ()), ("second", ("--sdist", "--wheel"))):
        run("git", "clone", "--quiet", "--no-hardlinks", ROOT, folder / name)
        command = (sys.executable, "-m", "build", *options, "--outdir", folder / f"{name}-built")
        run(*command, folder=folder / name, SOURCE_DATE_EPOCH=epoch)
        files = sorted((folder / f"{name}-built").iterdir())
        built = {path.name: path.read_bytes() for path in files}
        for file in built:
            if file.endswith(".tar.gz"):
                built[file] = normalised(built[file], int(epoch))
        results.append(built)
    first, second = results
    for file in sorted(first.keys() | second.keys()):
        digests = [hashlib.sha256(x.get(file, b"")).hexdigest() for x in results]
        print(
            f"{file}: {len(first.get(file, b'')):,} bytes, sha256\n  {digests[0]}\n  {digests[1]}"
        )
    if first != second:
        sys.exit("release: the two builds differ.")
    print("The two builds are equal.")
    check_content(first)
    output.mkdir(parents=True, exist_ok=True)
    for file, content in first.items():
        (output / file).write_bytes(content)


def check_content(built: Mapping[str, bytes]) -> None:
    """Stop unless the wheel has the package's files of the last commit, and no others."""
    tracked = run("git", "ls-files", *PACKAGES.values(), "clip_jax_pods.py").splitlines()
    expected = {re.sub("^configs/", "clip_jax/configs/", name) for name in tracked}
    (wheel,) = (content for name, content in built.items() if name.endswith(".whl"))
    names = zipfile.ZipFile(io.BytesIO(wheel)).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    if packed != expected:
        sys.exit(
            f"release: the wheel lacks {sorted(expected - packed)} and has besides "
            f"{sorted(packed - expected)}; see package-data in pyproject.toml."
        )
    print(f"The wheel has the package's {len(packed)} files, and no others.")


def install(folder: Path, wheel: Path) -> Path:
    """Return the `bin` folder of an empty environment with the wheel and the extra `test`."""
    venv.create(folder / "environment", clear=True, with_pip=True)
    python = folder / "environment/bin/python"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel.resolve()}[test]", folder=folder)
    return python.parent


def without_package(folder: Path) -> Path:
    """Return a folder with the repository's last commit, but without the package.

    Its README does not install the checkout, and does not run the tests.
    """
    tested = folder / "without_package"
    run("git", "clone", "--quiet", ROOT, tested)
    for name in (".git", *ABSENT):
        path = tested / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    readme = tested / "README.md"
    text = re.sub(r"^pip install -e .* && pytest .*\n", "", readme.read_text(), flags=re.M)
    readme.write_text(text.replace("pip install -e . && ", ""))
    return tested


def test(folder: Path, programs: Path) -> None:
    """Run the unit tests and the README's commands with the wheel of an environment."""
    tested = without_package(folder)
    variables = {"PYTHONPATH": "", "JAX_PLATFORMS": "cpu", "NO_TEST_IS_SKIPPED": "1"}
    variables["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    where = "import clip_jax; print(clip_jax.__version__, clip_jax.__file__)"
    place = run(programs / "python", "-c", where, folder=tested, **variables)
    print(place, end="")
    if str(programs.parent) not in place:
        sys.exit("release: this is not the wheel's clip_jax.")
    tests = (programs / "pytest", "-q", "-n", "2", "--ignore", OF_THE_REPOSITORY)
    print(run(*tests, folder=tested, **variables))
    print("README.md:")
    print(run(programs / "python", "-c", README, folder=tested, **variables))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the wheel and the sdist")
    parser.add_argument("--tag", help="the tag that is released, such as v0.2.0")
    parser.add_argument("--only-build", action="store_true", help="do not test the wheel")
    options = parser.parse_args()
    version = check_tree(options.tag)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder, options.output)
        if not options.only_build:
            (wheel,) = options.output.glob(f"clip_jax_pods-{version}-*.whl")
            test(folder, install(folder, wheel))
    print(f"clip_jax {version} is ready in {options.output}.")


if __name__ == "__main__":
    main()
