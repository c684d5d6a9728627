"""The site that MkDocs builds. Install what it takes with the extra `docs`."""

import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
    collect_ignore_glob = ["*"]
