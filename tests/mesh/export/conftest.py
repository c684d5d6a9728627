"""The fixture of small models that tests/export has, too."""

from tests.export.conftest import families as families
