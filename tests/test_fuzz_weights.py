"""Weights files that are damaged or hostile are loaded or refused in one line, within bounds of time and memory."""

import os

import pytest

from tests.mutated_weights import run

COUNT = int(os.environ.get("DERAIN_FUZZ", 100))


@pytest.mark.slow
def test_mutated_weights_are_loaded_or_refused(tmp_path):
    wrong = []
    figures = run(COUNT, 0, tmp_path, lambda path, done, error: wrong.append((path.name, done, repr(error))))
    assert wrong == []
    assert figures["outcomes"]["refused"] > COUNT / 2
    seconds, slowest = figures["slowest"]
    assert seconds < 30, slowest
    assert figures["growth"] < 1 << 30
