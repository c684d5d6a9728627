"""The fixture that runs a command, from tests/inference."""

from tests.inference.conftest import run as run
