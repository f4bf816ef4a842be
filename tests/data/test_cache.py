import logging
import multiprocessing
import os
import pickle
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import derain.data.pairs
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
    return [pair for pair_set in sets for pair in pair_set.pairs]


def equal(cached, pairs):
    for index, pair in enumerate(pairs):
        for actual, expected in zip(cached[index], read_pair(pair), strict=True):
            assert actual.dtype == np.uint8
            np.testing.assert_array_equal(actual, expected)
    return True


@pytest.mark.parametrize("mode", ["disk", "ram", "auto"])
def test_the_cache_has_the_pixels_of_the_files(pairs, mode, tmp_path):
    cached = open_cache(pairs, mode, folder=tmp_path / "c")
    assert len(cached) == 7
    assert equal(cached, pairs)


def test_no_cache_with_mode_off(pairs, tmp_path):
    assert open_cache(pairs, "off", folder=tmp_path / "c") is None
    assert not (tmp_path / "c").exists()


def test_the_cache_is_rebuilt_only_when_content_changes(pairs, tmp_path, monkeypatch):
    open_cache(pairs, "disk", folder=tmp_path / "c")
    calls = []
    decode = cache._decode
    monkeypatch.setattr(cache, "_decode", lambda *args, **options: calls.append(1) or decode(*args, **options))
    open_cache(pairs, "disk", folder=tmp_path / "c")
    assert not calls
    pixels = read_pair(pairs[-1])[1].copy()
    pixels[0, 0, 0] ^= 1
    write_image(pairs[-1].clean, pixels)
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)
    assert calls == [1]


def test_the_size_is_logged(pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO, "derain")
    open_cache(pairs, "disk", folder=tmp_path / "c")
    assert "7 pairs" in caplog.text


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_workers_get_a_reference(pairs, mode, tmp_path):
    cached = open_cache(pairs, mode, folder=tmp_path / "c")
    from multiprocessing.reduction import ForkingPickler

    sent = ForkingPickler.dumps(cached)
    assert len(sent) < 2000
    assert equal(pickle.loads(sent), pairs)


def test_auto_is_off_without_space(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr(cache, "free_memory", lambda: 10)
    assert open_cache(pairs, "auto", folder=tmp_path / "c") is None
    for mode in ("disk", "ram"):
        with pytest.raises(DerainError, match=f"--data.cache {mode}"):
            open_cache(pairs, mode, folder=tmp_path / "c")


def sizes(monkeypatch, **free):
    """Set the free bytes of shared memory and of all other file systems."""

    def usage(path):
        return type("Usage", (), {"free": free["shared" if path == cache.SHARED_MEMORY else "disk"]})()

    monkeypatch.setattr(cache, "SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(cache.shutil, "disk_usage", usage)


def test_ram_falls_back_to_disk_if_shared_memory_is_too_small(pairs, tmp_path, monkeypatch, caplog):
    sizes(monkeypatch, shared=1000, disk=10**9)
    cached = open_cache(pairs, "ram", folder=tmp_path / "c")
    assert cached.file is not None
    assert equal(cached, pairs)
    assert "using disk" in caplog.text
    sizes(monkeypatch, shared=1000, disk=1000)
    with pytest.raises(DerainError, match=r"--data.cache ram: .* /, .* .*/d/pixels, .*; use off"):
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
def test_only_modes_that_fit_are_suggested(pairs, tmp_path, monkeypatch, mode, memory, shared, disk, advice):
    sizes(monkeypatch, shared=shared, disk=disk)
    monkeypatch.setattr(cache, "free_memory", lambda: memory)
    with pytest.raises(DerainError) as refused:
        open_cache(pairs, mode, folder=tmp_path / "c")
    assert str(refused.value).startswith(f"--data.cache {mode}: ")
    assert str(refused.value).endswith(f"; {advice}")


def test_ram_falls_back_to_disk_if_other_ranks_use_the_shared_memory(pairs, tmp_path, monkeypatch, caplog):
    def share(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    assert open_cache(pairs, "ram", folder=tmp_path / "c").file is not None
    assert "using disk" in caplog.text
    sizes(monkeypatch, shared=10**9, disk=1000)
    assert open_cache(pairs[1:], "auto", folder=tmp_path / "d") is None
    with pytest.raises(DerainError, match=r"--data.cache ram: .*; use off"):
        open_cache(pairs[1:], "ram", folder=tmp_path / "d")


def test_auto_skips_shared_memory_that_is_too_small(pairs, tmp_path, monkeypatch):
    sizes(monkeypatch, shared=1000, disk=1000)
    assert open_cache(pairs, "auto", folder=tmp_path / "c") is None
    sizes(monkeypatch, shared=10**9, disk=1000)
    assert open_cache(pairs, "auto", folder=tmp_path / "c").memory is not None


def test_a_second_start_reads_no_image(pairs, tmp_path, monkeypatch):
    open_cache(pairs, "disk", folder=tmp_path / "c")
    monkeypatch.setattr(derain.data.pairs, "image_size", None)
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)


def _build(pairs, folder, results):
    decode = cache._decode

    def counting(*args, **options):
        results.put(os.getpid())
        decode(*args, **options)

    cache._decode = counting
    equal(open_cache(pairs, "disk", folder=folder), pairs)


def _stall(pairs, folder, results):
    def half(pairs, index, pixels, *, paired):
        pixels[:100] = 7
        results.put("half")
        time.sleep(60)

    cache._decode = half
    open_cache(pairs, "disk", folder=folder)


def test_two_processes_at_once_decode_once(pairs, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_build, args=(pairs, tmp_path / "c", results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    results.get(timeout=5)
    assert results.empty()


def test_a_killed_process_leaves_no_partial_cache(pairs, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_stall, args=(pairs, tmp_path / "c", results))
    process.start()
    assert results.get(timeout=20) == "half"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert equal(open_cache(pairs, "disk", folder=tmp_path / "c"), pairs)
    left = [path.name for path in (tmp_path / "c" / "pixels").iterdir() if not path.name.endswith(".lock")]
    assert sorted(left) == [f"{fingerprint(pairs)}-v{cache.CACHE_VERSION}{ending}" for ending in ("", ".npy")]


def test_the_fingerprint_depends_on_content_and_names(pairs):
    other = [Pair("x" + pairs[0].name, pairs[0].rainy, pairs[0].clean, pairs[0].clean_side), *pairs[1:]]
    assert fingerprint(pairs) == fingerprint(list(pairs))
    assert len({fingerprint(pairs), fingerprint(other), fingerprint(pairs[::-1])}) == 3


def test_pairs_without_clean_image_are_rejected(pairs, tmp_path):
    with pytest.raises(DerainError, match=re.escape(f"{pairs[-1].rainy}: ")):
        open_cache([Pair("a", pairs[-1].rainy)], "disk", folder=tmp_path / "c")
    assert not [p for p in (tmp_path / "c" / "pixels").iterdir() if not p.name.endswith(".lock")]


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_images_without_clean_ones_are_cached(pairs, mode, tmp_path):
    images = [Pair(pair.name, pair.rainy, None, pair.clean_side) for pair in pairs]
    cached = open_cache(images, mode, folder=tmp_path / "c", paired=False)
    cached = pickle.loads(pickle.dumps(cached))
    assert len(cached) == len(pairs)
    for index, pair in enumerate(pairs):
        rainy = read_pair(pair)[0]
        np.testing.assert_array_equal(cached[index][0], rainy)
    size = sum(read_pair(pair)[0].size for pair in pairs)
    assert int(cached.index[-1, 0] + 3 * cached.index[-1, 1] * cached.index[-1, 2]) == size
