import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist uses the cores; small tensors gain nothing by threads

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests never touch the user's cache."""
    os.environ["DERAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data():
    """Folder of the real data sets; tests that ask for it skip where it is absent."""
    root = os.environ.get("DERAIN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("DERAIN_DATA names no folder of real data sets")
    return Path(root)


@pytest.fixture(scope="session")
def authors_weights(real_data):
    """Folder of the authors' PReNet weights, beside the real data."""
    folder = real_data.parent / "weights" / "prenet"
    if not folder.is_dir():
        pytest.skip("the authors' PReNet weights are not beside DERAIN_DATA")
    return folder
