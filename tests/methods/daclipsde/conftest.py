import pytest

from tests.factories import make_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder of a tiny CLIP whose vision tower has 49 patches."""
    return make_clip(tmp_path_factory.mktemp("clip"), seed=1, size=8, num_hidden_layers=3)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("DERAIN_CLIP", "DERAIN_CONTROLLER"):
        monkeypatch.delenv(name, raising=False)
