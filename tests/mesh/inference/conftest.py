"""What a command prints, as in tests/inference."""

from tests.inference.conftest import run as run
