"""The public names: examples in their docstrings, and what joins several parts of the package."""

import doctest
import inspect

import pytest

import clip_jax

EXAMPLES = [
    test
    for name in sorted(clip_jax.__all__)
    for test in doctest.DocTestFinder(recurse=False).find(getattr(clip_jax, name), name, globs={})
    if test.examples
]


def test_dir_lists_the_public_names_and_each_exists():
    assert {"load", "tokenize", "train_model", "Program"} < {*clip_jax.__all__}
    assert {*clip_jax.__all__} == {x for x in dir(clip_jax) if not x.startswith("_")}
    for name in clip_jax.__all__:
        assert inspect.getdoc(getattr(clip_jax, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(clip_jax, "no_such_name")  # noqa: B009


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_in_docstrings_print_what_they_show(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert result.attempted
    assert not result.failed
