"""Working directories for tests of the training commands."""

import pytest

from tests.tiny import write_configs


@pytest.fixture
def all_methods(tmp_path, monkeypatch):
    """A working directory with data and a configuration ``METHOD.yaml`` of every method."""
    monkeypatch.chdir(tmp_path)
    for name in ("DERAIN_DATA", "DERAIN_CACHE"):
        monkeypatch.setenv(name, "")  # restored after the test: write_configs sets them
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return write_configs(tmp_path)
