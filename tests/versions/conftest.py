"""The fixtures of the export tests."""

from inference.conftest import exported  # noqa: F401
