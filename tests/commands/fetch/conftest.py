"""A local server, and a folder for data sets."""

import pytest

from derain.data import web_files
from tests.servers import running


@pytest.fixture
def server(monkeypatch):
    """A local server that also stands in for the hub; clients do not wait before they try again."""
    from huggingface_hub import constants

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(web_files, "PAUSE", 0.0)
        yield server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"
