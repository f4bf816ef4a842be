import pytest

from tests.factories import make_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder of a tiny CLIP."""
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DERAIN_CLIP", raising=False)
