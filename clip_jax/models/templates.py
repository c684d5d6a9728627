"""Prompt templates: sentences in which {} or {c} stands for the name of a class."""

import re

from clip_jax.errors import InputError

PLACEHOLDER = re.compile(r"\{c?\}")
DEFAULT = "a photo of a {}."  # for models that record no template of their own
_LONGEST = 3  # characters of a placeholder


def fill(template: str, name: str, most: int | None = None) -> str:
    """Replace every placeholder of a template with the name of a class.

    With `most`, only the first `most` characters are returned, and at most six times as many are
    built, however long both texts are. The name must not be empty then.
    """
    if most is None:
        return PLACEHOLDER.sub(lambda _: name, template)
    name = name[:most]
    enough = most // max(len(name), 1) + 1  # as many names are longer than `most`
    return PLACEHOLDER.sub(lambda _: name, template[: _LONGEST * most], enough)[:most]


def check_template(template: str, where: str) -> None:
    """Raise InputError, which begins with `where`, for a template without a placeholder."""
    if not PLACEHOLDER.search(template):
        raise InputError(
            f"{where}={template!r:.200} has no {{}} for the name of the class; put {{}} where the "
            "name goes, as in 'a photo of a {}.'"
        )
