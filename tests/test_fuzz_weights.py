"""Damaged and hostile weights files are loaded or refused in one line, within limits of time and memory."""

import os

import pytest

from tests.mutated_weights import run

COUNT = int(os.environ.get("DERAIN_FUZZ", 100))


@pytest.mark.slow
def test_mutated_weights_are_loaded_or_refused(tmp_path):
    failures = []
    figures = run(COUNT, 0, tmp_path, lambda path, change, error: failures.append((path.name, change, repr(error))))
    assert failures == []
    assert figures["outcomes"]["refused"] > COUNT / 2
    seconds, change = figures["slowest"]
    assert seconds < 30, change
    assert figures["growth"] < 1 << 30
