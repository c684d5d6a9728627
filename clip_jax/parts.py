"""Parts of users: classes of modules that a person named, beside those of this package.

A public base class (`losses.Term`, for example) derives from `Part`. A field that takes some of its
subclasses also takes those of users' modules: see `opened`. Such a module is imported because a
person named it, with `--import` or in Python; a file only records the name.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
import traceback
import types
import typing
from collections.abc import Generator, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from clip_jax.errors import InputError

GROUP = "clip_jax.parts"  # group of entry points that give modules short names
_PACKAGE = "clip_jax"
_NAMES: dict[str, str] = {}  # name of each module that was loaded -> what `--import` was passed


class NotImported(InputError):
    """A file needs users' modules that were not imported."""


class Part:
    """Mark a class as a public base, as its direct base class.

    Fields that take subclasses of the public base also take those of users' modules: dataclasses at
    the top level of a module, without abstract methods or a leading underscore in their names.
    """


def load(name: str) -> None:
    """Import a module by what `--import` was passed: an entry point of the group `clip_jax.parts`,
    the path of a Python file, or a module, also of the working directory.

    Raises InputError if there is no such module, or with the line of an error in it.
    """
    if name.endswith(".py"):
        _load_file(Path(name))
        return
    entries = metadata.entry_points(group=GROUP, name=name)
    target = next((entry.module for entry in entries), name)
    if os.getcwd() not in sys.path:  # the console script lacks it
        sys.path.append(os.getcwd())
    package, spec = target.partition(".")[0], None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
    if spec is not None and package != target:
        with blamed_on(spec.origin or package):  # which imports the package
            spec = importlib.util.find_spec(target)
    if spec is None:
        raise InputError(
            f"--import {name}: there is no module {target!r}. Pass a module that Python finds from "
            f"here, the path of a .py file, or a name among the entry points {GROUP!r}."
        )
    with blamed_on(spec.origin or target):
        importlib.import_module(target)
    _NAMES[target] = name


def _load_file(path: Path) -> None:
    file = str(path.absolute())
    if (loaded := sys.modules.get(path.stem)) is None:
        sys.path.append(os.path.dirname(file))  # of modules that the file imports
        run_file(path, registered=True)
    elif (origin := getattr(loaded, "__file__", None)) != file:
        raise InputError(
            f"--import {path}: a module {path.stem!r} was imported already, from "
            f"{origin or 'Python itself'}; rename one of the two files."
        )


def run_file(path: Path, *, registered: bool = False) -> ModuleType:
    """Run a Python file as a module, and remember the path as the name of its parts, if any.

    If it is to be `registered`, Python knows the module by the file's name: worker processes import
    it again, and annotations that are texts are looked up in it. Errors in the file become
    InputErrors that name the line.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    if spec is None or spec.loader is None or not path.is_file():
        problem = "is not a Python file" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}; pass the path of a Python file.")
    module = importlib.util.module_from_spec(spec)
    if registered:
        sys.modules[path.stem] = module
    try:
        with blamed_on(path):
            spec.loader.exec_module(module)
    except BaseException:
        if registered:
            del sys.modules[path.stem]
        raise
    classes = (x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Part))
    if registered or any(kind.__module__ == path.stem for kind in classes):
        _NAMES[path.stem] = str(path)
    return module


def origin(kind: type) -> str | None:
    """Return what to pass to `--import` for a user's class; None for a class of this package."""
    module = kind.__module__
    if module.partition(".")[0] == _PACKAGE:
        return None
    for name, passed in _NAMES.items():
        if f"{module}.".startswith(f"{name}."):
            return passed
    if module == "__main__":
        return getattr(sys.modules[module], "__file__", None) or module
    return module


def version() -> str:
    """Return a hash of the source of users' parts, with the other modules of their packages."""
    digest = hashlib.sha256()
    for name in sorted({kind.__module__.partition(".")[0] for kind in of_users()}):
        for path in _sources(name):
            digest.update(f"{name} {path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(name: str) -> list[Path]:
    """List the files of a module at the top level."""
    if _NAMES.get(name, "").endswith(".py"):
        return [Path(_NAMES[name])]
    module = sys.modules.get(name)
    folders = getattr(module, "__path__", ())
    if paths := [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]:
        return paths
    file = getattr(module, "__file__", None)
    return [Path(file)] if file else []


def opened(hint: Any) -> Any:
    """Return a field's type that also takes users' parts, wherever it takes one of their base.

    Raises InputError if two of these classes have one name.
    """
    if isinstance(hint, type) and not dataclasses.is_dataclass(hint):
        return hint
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _union((hint,)) if Part in hint.__bases__ else hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _union(arguments)
    if typing.get_origin(hint) in (tuple, list):
        return typing.get_origin(hint)[tuple(map(opened, arguments))]
    return hint


def _union(kinds: Sequence[Any]) -> Any:
    bases = {base for kind in kinds for base in getattr(kind, "__mro__", ()) if _is_base(base)}
    every = dict.fromkeys([*kinds, *of_users(bases)])
    owners: dict[str, Any] = {}
    for kind in (kind for kind in every if _is_part(kind)):
        other = owners.setdefault(kind.__name__, kind)
        if other is not kind:
            raise InputError(
                f"{kind.__module__} and {other.__module__} both define {kind.__name__}, of which "
                "configs could only name one; rename the class, or import only one of the modules."
            )
    return functools.reduce(operator.or_, every)


def _is_base(kind: type) -> bool:
    return Part in kind.__bases__


def of_users(bases: Iterable[type] = (Part,)) -> list[type]:
    """List users' parts with these bases. Of a class that was defined again, the newest counts."""
    newest = {
        (kind.__module__, kind.__qualname__): kind
        for base in bases
        for kind in _subclasses(base)
        if origin(kind) and _is_part(kind)
    }
    return list(newest.values())


def _is_part(kind: Any) -> bool:
    if "__dataclass_fields__" not in vars(kind) or inspect.isabstract(kind):
        return False
    return not kind.__name__.startswith("_") and "<locals>" not in kind.__qualname__


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@contextlib.contextmanager
def fields_opened(kind: Any) -> Generator[None]:
    """Open the fields of a dataclass, and of all that it contains, for a parser that reads them."""
    with contextlib.ExitStack() as restored:
        for contained in _contained(kind) if of_users() else ():
            for base in contained.__mro__:
                annotations = inspect.get_annotations(base)
                changed = {
                    name: opened(hint)
                    for name, hint in annotations.items()
                    if not isinstance(hint, str) and opened(hint) != hint
                }
                if changed:
                    restored.callback(setattr, base, "__annotations__", annotations)
                    base.__annotations__ = annotations | changed
        yield


def _contained(kind: Any) -> dict[Any, None]:
    """Return a dataclass and all in the types of its fields, users' parts included, each once."""
    every = {kind: None}
    for each in (queue := [kind]):
        for hint in typing.get_type_hints(each).values():
            new = [x for x in _dataclasses_in(opened(hint)) if x not in every]
            every |= dict.fromkeys(new)
            queue += new
    return every


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def flags(content: Any) -> list[str]:
    """Return the flags of a command that reads the content of a JSON file."""
    return [text for name in needed(content) for text in ("--import", name)]


def needed(content: Any) -> tuple[str, ...]:
    """List what to pass to `--import` for the parts in the content of a JSON file, each once."""
    return tuple(dict.fromkeys(name for name, _ in _recorded(content)))


def check(content: Any, where: Any) -> None:
    """Raise InputError if the content of a JSON file needs parts that no imported module has:
    NotImported if a module is missing."""
    names = {kind.__name__ for kind in of_users()}
    missing: dict[str, list[str]] = {}
    for name, kind in _recorded(content):
        if kind not in names:
            missing.setdefault(name, []).append(kind)
    if missing:
        kinds = ", ".join(dict.fromkeys(kind for kinds in missing.values() for kind in kinds))
        passed = " ".join(f"--import {name}" for name in missing)
        if missing.keys() <= set(_NAMES.values()):
            raise InputError(
                f"{where} needs {kinds}, which {', '.join(missing)} does not define; import the "
                "version of the module that the file was written with."
            )
        raise NotImported(
            f"{where} needs {kinds} of {', '.join(missing)}, not imported: a file imports nothing "
            f"by itself. Pass {passed}, or in Python import the module first."
        )


def _recorded(content: Any) -> Iterator[tuple[str, str]]:
    """Yield the module's name and the class of each user's part in the content of a JSON file."""
    if isinstance(content, dict):
        if isinstance(content.get("import"), str):
            yield content["import"], str(content.get("type"))
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _recorded(value)


@contextlib.contextmanager
def blamed_on(path: str | Path) -> Generator[None]:
    """Turn errors of a user's file into InputErrors with the line; bugs of this package pass."""
    try:
        yield
    except (Exception, SystemExit) as error:
        every, file = traceback.extract_tb(error.__traceback__), os.path.abspath(path)
        frames = [frame for frame in every if frame.filename != __file__]
        lines = [frame.lineno for frame in frames if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        is_ours = Path(__file__).parent in Path(frames[-1].filename).parents
        is_input = isinstance(error, InputError)
        if is_ours and len(frames) > 1 and not is_input:  # one: the call of what the file defined
            raise
        where = f"{path}:{lines[-1]}" if lines else str(path)
        what = "" if is_input else f"{type(error).__name__}: "
        message = f"{where}: {what}{getattr(error, 'msg', error)}"
        if isinstance(error, ModuleNotFoundError) and error.name:
            message += _advice(Path(path).parent, error.name.partition(".")[0])
        raise InputError(message) from error


def _advice(folder: Path, name: str) -> str:
    """Return what to pass for a missing module that is a file beside a user's, or here."""
    if any(Path(path).exists() for path in (f"{name}.py", f"{name}/__init__.py")):
        return f"; pass --import {name}."
    if (file := folder / f"{name}.py").exists():
        return f"; pass --import {file}."
    return ""
