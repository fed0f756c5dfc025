"""Whatever runs here needs the tools of the PTX interpreter."""

from ptx.conftest import pytest_configure, pytest_runtest_setup  # noqa: F401
