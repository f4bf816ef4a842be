import json
import logging
import os
import time

import pytest

from derain.data import file_hashes as module
from derain.data.cache import fingerprint
from derain.data.file_hashes import file_hashes
from derain.data.pairs import Pair
from derain.folders import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    """Two folders of settled files."""
    made = [tmp_path / name for name in ("a/1.png", "a/caf\udce9.png", "b/1.png")]
    for file in made:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(os.fsencode(file))
    settle()
    return made


def settle():
    """Wait until the times of new files are trusted."""
    time.sleep(module.SETTLED_AGE / 1e9 + 0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SETTLED_AGE", 50_000_000)


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose content is read."""
    names = []
    hashed = module._hash
    monkeypatch.setattr(module, "_hash", lambda file: names.append(file.name) or hashed(file))
    return names


def test_a_file_is_read_once_until_it_changes(files, read):
    first = file_hashes(files)
    assert len(set(first)) == 3
    assert sorted(read) == sorted(file.name for file in files)
    read.clear()
    assert file_hashes(files[::-1]) == first[::-1]
    assert read == []
    files[0].write_bytes(b"other")
    assert file_hashes(files)[1:] == first[1:]
    assert file_hashes(files)[0] != first[0]
    assert set(read) == {"1.png"}


@pytest.mark.parametrize("how", ["rewritten", "replaced"])
def test_changed_content_of_equal_size_and_time_is_read(files, read, how):
    (first,) = file_hashes(files[:1])
    times = files[0].stat()
    changed = bytes(len(files[0].read_bytes()))
    if how == "rewritten":
        files[0].write_bytes(changed)
    else:
        files[1].write_bytes(changed)
        files[1].replace(files[0])
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files[0].stat().st_mtime_ns == times.st_mtime_ns
    assert file_hashes(files[:1]) != [first]


def test_the_hash_of_a_file_that_has_just_changed_is_not_cached(files, read, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_AGE", 3600 * 10**9)
    file_hashes(files)
    file_hashes(files)
    assert len(read) == 6


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"[1]", b"\xff", b'{"1.png": 5}', b'{"1.png": [["x"], 3]}', b'{"1.png": [STATE, 3]}'),
        *(b'{"1.png": [STATE, "zz"]}', b'{"1.png": [STATE, "aa"]}', b'{"1.png": [[1e999, 1, 1, 1], "aa"]}'),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b"9" * 5000, id="long"),
    ],
)
def test_a_damaged_cache_counts_as_empty(files, read, damage):
    first = file_hashes(files)
    for file in (cache_folder() / "digests").iterdir():
        assert json.loads(file.read_text())
        state = json.dumps(json.loads(file.read_text())["1.png"][0])
        file.write_bytes(damage.replace(b"STATE", state.encode()))
    assert file_hashes(files) == first


def test_links_are_resolved(files, read):
    link = files[0].with_name("link.png")
    link.symlink_to(files[2])
    (first,) = file_hashes([link])
    link.unlink()
    link.symlink_to(files[1])
    assert file_hashes([link]) != [first]


def test_the_fingerprint_depends_on_content_alone(tmp_path, read, caplog):
    """The value is fixed: results are cited by it, and equal images must have equal fingerprints everywhere."""
    caplog.set_level(logging.INFO, "derain")
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        files = [folder / name for name in ("r.png", "c.png", "both.png")]
        for file, content in zip(files, (b"one", b"two", b"three"), strict=True):
            file.write_bytes(content)
        settle()
        pairs = [Pair("rain-1", files[0], files[1]), Pair("2", files[2], files[2], "left")]
        for again in (False, True):
            read.clear()
            assert fingerprint(pairs) == "494230a0cdaedaac"
            assert read == [] if again else len(read) == 3
    assert caplog.text.count("reading 3 ") == 2
