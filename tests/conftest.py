"""Eight simulated devices for every test, and a generator that compiles quickly."""

import importlib.util
import os

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Threefry's rounds, unrolled into every initialiser, take most of a small model's compile time.
jax.config.update("jax_default_prng_impl", "rbg")


def pytest_configure(config: pytest.Config) -> None:
    """Ask XLA for what the tests need, before anything is compiled. A flag given wins."""
    # As `clip_jax.processes` does: or simulated devices may wait for each other in a circle.
    flags = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if config.option.markexpr == "not slow":
        # LLVM's optimisations take a third of the compile time, and tests compile more than they
        # compute. XLA's own passes stay; the slow tests run all as users do.
        flags.append("--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were left out for want of an extra, and how to get it."""
    if importlib.util.find_spec("torch") is None:
        terminalreporter.write_line(
            "left out: tests/peers (comparisons with the PyTorch CLIPs); "
            "pip install -e '.[test,peers]' on Python 3.11 brings them"
        )
    if importlib.util.find_spec("libtpu") is None:
        terminalreporter.write_line(
            "left out: compiling for TPUs (a flag test, slow ones of plan and loss memory); "
            "pip install -e '.[test,tpu]' brings them"
        )
    if any(importlib.util.find_spec(name) is None for name in ("gradio", "playwright")):
        terminalreporter.write_line(
            "left out: tests/browser (the page of `clip-jax demo` in a headless Chromium); "
            "pip install -e '.[test,browser]' and a Chromium bring them"
        )
