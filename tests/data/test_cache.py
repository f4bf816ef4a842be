import logging
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from derain.data import cache
from derain.data.cache import fingerprint, open_cache, read_pair
from derain.data.pairs import Pair, find_pairs
from derain.errors import DerainError
from derain.images import write_image
from tests.factories import make_set


@pytest.fixture
def pairs(tmp_path):
    make_set(tmp_path / "data", "Rain800", "train", count=3)
    make_set(tmp_path / "data", "Rain100L", "test", count=4, size=(33, 47), seed=9)
    data = tmp_path / "data"
    sets = [find_pairs(n, s, data_root=data) for n, s in (("Rain800", "train"), ("Rain100L", "test"))]
    return [pair for one in sets for pair in one.pairs]


def equal(cached, pairs):
    for place, pair in enumerate(pairs):
        for mine, true in zip(cached[place], read_pair(pair), strict=True):
            assert mine.dtype == np.uint8
            np.testing.assert_array_equal(mine, true)
    return True


@pytest.mark.parametrize("mode", ["disk", "ram", "auto"])
def test_holds_what_the_files_hold(pairs, mode, tmp_path):
    cached = open_cache(pairs, mode, folder=tmp_path / "c")
    assert len(cached) == 7
    assert equal(cached, pairs)


def test_off(pairs, tmp_path):
    assert open_cache(pairs, "off", folder=tmp_path / "c") is None
    assert not (tmp_path / "c").exists()


def test_is_made_once_and_again_when_content_changes(pairs, tmp_path, monkeypatch):
    open_cache(pairs, "disk", folder=tmp_path / "c")
    made = []
    decode = cache._decode
    monkeypatch.setattr(cache, "_decode", lambda *args: made.append(1) or decode(*args))
    open_cache(pairs, "disk", folder=tmp_path / "c")
    assert not made
    pixels = read_pair(pairs[-1])[1].copy()
    pixels[0, 0, 0] ^= 1
    write_image(pairs[-1].clean, pixels)
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)
    assert made == [1]


def test_the_size_is_told_first(pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO, "derain")
    open_cache(pairs, "disk", folder=tmp_path / "c")
    assert "7 pairs" in caplog.text
    assert "decoded" in caplog.text


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_travels_to_workers_as_a_reference(pairs, mode, tmp_path):
    cached = open_cache(pairs, mode, folder=tmp_path / "c")
    from multiprocessing.reduction import ForkingPickler

    sent = ForkingPickler.dumps(cached)
    assert len(sent) < 2000
    assert equal(pickle.loads(sent), pairs)


def test_auto_turns_off_without_room(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr(cache, "free_memory", lambda: 10)
    assert open_cache(pairs, "auto", folder=tmp_path / "c") is None
    for mode in ("disk", "ram"):
        with pytest.raises(DerainError, match=f"--data.cache {mode}"):
            open_cache(pairs, mode, folder=tmp_path / "c")


def sizes(monkeypatch, **free):
    """Lets file systems have so many bytes free: that of shared memory, and all others."""

    def usage(path):
        return type("Usage", (), {"free": free["shared" if path == cache.SHARED_MEMORY else "disk"]})()

    monkeypatch.setattr(cache, "SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(cache.shutil, "disk_usage", usage)


def test_ram_falls_back_to_disk_where_shared_memory_is_too_small(pairs, tmp_path, monkeypatch, caplog):
    sizes(monkeypatch, shared=1000, disk=10**9)
    cached = open_cache(pairs, "ram", folder=tmp_path / "c")
    assert cached.file is not None
    assert equal(cached, pairs)
    assert "/, which has 0.00 GB free; using disk" in caplog.text
    sizes(monkeypatch, shared=1000, disk=1000)
    with pytest.raises(DerainError, match=r"--data.cache ram: .* into /, .* nor into .*/d/pixels, .*; use off"):
        open_cache(pairs[1:], "ram", folder=tmp_path / "d")


@pytest.mark.parametrize(
    ("mode", "memory", "shared", "disk", "advice"),
    [
        ("ram", 10, 10**9, 10**9, "use disk or off"),
        ("ram", 10, 10**9, 10, "use off"),
        ("ram", 10**9, 10, 10, "use off"),
        ("disk", 10**9, 10**9, 10, "use ram or off"),
        ("disk", 10**9, 10, 10, "use off"),
        ("disk", 10, 10**9, 10, "use off"),
    ],
)
def test_only_modes_that_fit_are_advised(pairs, tmp_path, monkeypatch, mode, memory, shared, disk, advice):
    sizes(monkeypatch, shared=shared, disk=disk)
    monkeypatch.setattr(cache, "free_memory", lambda: memory)
    with pytest.raises(DerainError) as refused:
        open_cache(pairs, mode, folder=tmp_path / "c")
    assert str(refused.value).startswith(f"--data.cache {mode}: ")
    assert str(refused.value).endswith(f"; {advice}")


def test_ram_falls_back_to_disk_where_other_ranks_take_the_shared_memory(pairs, tmp_path, monkeypatch, caplog):
    def share(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    assert open_cache(pairs, "ram", folder=tmp_path / "c").file is not None
    assert "using disk" in caplog.text
    sizes(monkeypatch, shared=10**9, disk=1000)
    assert open_cache(pairs[1:], "auto", folder=tmp_path / "d") is None
    with pytest.raises(DerainError, match=r"--data.cache ram: .*; use off"):
        open_cache(pairs[1:], "ram", folder=tmp_path / "d")


def test_auto_takes_no_shared_memory_that_is_too_small(pairs, tmp_path, monkeypatch):
    sizes(monkeypatch, shared=1000, disk=1000)
    assert open_cache(pairs, "auto", folder=tmp_path / "c") is None
    sizes(monkeypatch, shared=10**9, disk=1000)
    assert open_cache(pairs, "auto", folder=tmp_path / "c").memory is not None


def test_a_second_start_reads_no_image(pairs, tmp_path, monkeypatch):
    open_cache(pairs, "disk", folder=tmp_path / "c")
    monkeypatch.setattr(cache, "image_size", None)
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)


def _build(pairs, folder, results):
    decode = cache._decode

    def counting(*args):
        results.put(os.getpid())
        decode(*args)

    cache._decode = counting
    equal(open_cache(pairs, "disk", folder=folder), pairs)


def _stall(pairs, folder, results):
    def half(pairs, index, pixels):
        pixels[:100] = 7
        results.put("half")
        time.sleep(60)

    cache._decode = half
    open_cache(pairs, "disk", folder=folder)


def test_two_processes_at_once_decode_once(pairs, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_build, args=(pairs, tmp_path / "c", results)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    results.get(timeout=5)
    assert results.empty()


def test_a_process_killed_half_way_does_no_harm(pairs, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_stall, args=(pairs, tmp_path / "c", results))
    process.start()
    assert results.get(timeout=20) == "half"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)
    left = [path.name for path in (tmp_path / "c" / "pixels").iterdir() if not path.name.endswith(".lock")]
    assert sorted(left) == [f"{fingerprint(pairs)}-v{cache.FORMAT}{ending}" for ending in ("", ".npy")]


def test_fingerprint_follows_content_and_names(pairs):
    other = [Pair("x" + pairs[0].name, pairs[0].rainy, pairs[0].clean, pairs[0].clean_side), *pairs[1:]]
    assert fingerprint(pairs) == fingerprint(list(pairs))
    assert len({fingerprint(pairs), fingerprint(other), fingerprint(pairs[::-1])}) == 3


def test_pairs_without_clean_image_are_refused(pairs, tmp_path):
    with pytest.raises(DerainError, match="has no clean image"):
        open_cache([Pair("a", pairs[-1].rainy)], "disk", folder=tmp_path / "c")
    assert not [p for p in (tmp_path / "c" / "pixels").iterdir() if not p.name.endswith(".lock")]
