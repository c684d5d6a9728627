"""The fixture of small models that the tests of the export have."""

from tests.export.conftest import families as families
