import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist uses all cores, and small tensors gain nothing

import numpy as np
import pytest

gc.disable()  # until all tests are imported: a collection of so many objects takes half a second, and finds nothing

LONGEST_FILES = (
    "test_train_resume.py",
    "test_experiments.py",
    "test_onnx_model.py",
    "test_networks.py",
    "test_train_daclip.py",
    "test_gpu_benchmarks.py",
    "test_ranks.py",
    "test_train_divergence.py",
    "test_contract.py",
    "test_app.py",
    "test_bench.py",
    "test_drsformer.py",
    "test_bench_networks.py",
    "test_train_plnlingan.py",
    "test_evaluation.py",
    "test_caption.py",
    "test_training_speed.py",
    "test_verify.py",
)
"""Files that take more than half a minute, the longest first."""


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that no process of pytest-xdist is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """Exempt the imported modules from garbage collection, also in processes that tests fork."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    """Undo the pause of garbage collection if no test was collected here, as in the controller of parallel tests."""
    gc.enable()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def _temporary_cache(tmp_path_factory):
    """Keep tests out of the user's cache."""
    os.environ["DERAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _default_signals():
    """Let signals end the programs that tests start, even if the tests run under nohup or in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _forget_named_methods():
    """Forget the methods that a test names: commands that run in the test's process keep them."""
    yield
    registry = sys.modules.get("derain.methods.registry")
    if registry is not None:
        registry._named.clear()


@pytest.fixture(scope="session")
def real_data():
    """Return the folder of the real data sets; skip the test if there is none."""
    root = os.environ.get("DERAIN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("DERAIN_DATA names no folder of real data sets")
    return Path(root)


@pytest.fixture(scope="session")
def authors_weights(real_data):
    """Return the folder of the authors' PReNet weights, beside the real data; skip the test if there is none."""
    folder = real_data.parent / "weights" / "prenet"
    if not folder.is_dir():
        pytest.skip("the authors' PReNet weights are not beside DERAIN_DATA")
    return folder


def escaped(text: str) -> str:
    """Return the text with surrogates, which represent bytes that are not UTF-8, as escape sequences."""
    return text.encode(errors="backslashreplace").decode()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape captured output that is not UTF-8: pytest-xdist cannot send it and would stop."""
    report = yield
    report.sections = [(title, escaped(text)) for title, text in report.sections]
    if report.longrepr is not None and escaped(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = escaped(str(report.longrepr))
    return report
