"""The page in a headless Chromium. Install what it takes with the extra `browser`."""

import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("gradio", "playwright")):
    collect_ignore_glob = ["*"]
