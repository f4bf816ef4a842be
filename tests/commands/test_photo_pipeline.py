import errno
import signal
import threading
import time

import numpy as np
import pytest
import torch

from derain.cli import main
from derain.commands import photo_pipeline
from derain.commands.photo_pipeline import PhotoPipeline
from derain.errors import DerainError
from derain.images import Photo, read_rgb, write_image
from derain.methods import PReNetModule
from derain.restoration import Explanation, Restorer
from tests.runs import start, wait_for


@pytest.fixture(scope="module")
def restorer():
    torch.manual_seed(0)
    return Restorer(PReNetModule(stages=1, variant="PRN"), device="cpu")


def photo_of(index, side=8):
    return Photo(np.full((side, side, 3), index / 100, np.float32))


def index_of(path):
    return int(path.stem)


def pipeline_of(restorer, jobs, *, read=lambda path: photo_of(index_of(path)), restore=None, write=None):
    def unchanged(photos, sources):
        return [Explanation(photo.rgb, {}, {}) for photo in photos]

    return PhotoPipeline(restorer, read, restore or unchanged, write or (lambda photo, result, target: False))


def jobs_of(folder, count):
    return {folder / "in" / f"{index}.png": folder / "out" / f"{index}.png" for index in range(count)}


def test_outcomes_keep_the_order_under_failures(restorer, tmp_path):
    """Reading, restoring and writing fail in the middle; slow threads do not change the order."""
    jobs = jobs_of(tmp_path, 12)

    def read(path):
        time.sleep(0.02 * (index_of(path) % 3))
        if index_of(path) in (0, 3):
            raise DerainError(f"read {path.name}")
        return photo_of(index_of(path))

    def restore(photos, sources):
        failed = [index_of(source) == 5 for source in sources]
        return [
            DerainError(f"restore {source.name}") if fails else Explanation(photo.rgb, {}, {})
            for photo, source, fails in zip(photos, sources, failed, strict=True)
        ]

    def write(photo, result, target):
        time.sleep(0.02 * (index_of(target) % 2))
        if index_of(target) == 7:
            raise OSError(f"write {target.name}")
        return index_of(target) == 8

    outcomes = list(pipeline_of(restorer, jobs, read=read, restore=restore, write=write).run(jobs))
    expected = {0: "read 0.png", 3: "read 3.png", 5: "restore 5.png", 7: "write 7.png", 8: "True"}
    assert [str(outcome) for outcome in outcomes] == [expected.get(index, "False") for index in range(12)]


def test_photos_that_are_ready_are_restored_together(restorer, tmp_path, monkeypatch):
    jobs, groups = jobs_of(tmp_path, 20), []
    monkeypatch.setattr(restorer, "images_at_once", lambda height, width: 2)

    def restore(photos, sources):
        time.sleep(0.4)  # long enough to read eight photos
        groups.append(len(photos))
        return [Explanation(photo.rgb, {}, {}) for photo in photos]

    assert list(pipeline_of(restorer, jobs, restore=restore).run(jobs)) == [False] * 20
    assert sum(groups) == 20
    assert 4 <= max(groups) <= 8  # fewer if a busy machine reads slowly


@pytest.mark.parametrize("first_side", [2, 40])
def test_pixels_in_memory_are_bounded(restorer, tmp_path, monkeypatch, first_side):
    """Slow writing stops reading, also if the first photo is smaller than the others; one may exceed the limit."""
    limit = 10 * 8 * 8
    sides = [first_side] + [8] * 39
    monkeypatch.setattr(photo_pipeline, "PIXELS_AHEAD", limit)
    monkeypatch.setattr(photo_pipeline, "image_size", lambda path: (sides[index_of(path)],) * 2)
    monkeypatch.setattr(restorer, "images_at_once", lambda height, width: 8)
    jobs, lock, held, most = jobs_of(tmp_path, 40), threading.Lock(), 0, 0

    def read(path):
        nonlocal held, most
        with lock:
            held += sides[index_of(path)] ** 2
            most = max(most, held)
        return photo_of(index_of(path), sides[index_of(path)])

    def write(photo, result, target):
        nonlocal held
        time.sleep(0.005)
        with lock:
            held -= sides[index_of(target)] ** 2
        return False

    assert len(list(pipeline_of(restorer, jobs, read=read, write=write).run(jobs))) == 40
    assert most <= max(limit, first_side**2 + limit // 2)


def test_memory_that_does_not_suffice_fails_single_photos(restorer, tmp_path):
    """Photos are restored one by one if memory does not suffice for several."""
    jobs = jobs_of(tmp_path, 6)

    def read(path):
        if index_of(path) == 1:
            raise MemoryError
        return photo_of(index_of(path))

    def restore(photos, sources):
        if len(photos) > 1 or index_of(sources[0]) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return [Explanation(photo.rgb, {}, {}) for photo in photos]

    def write(photo, result, target):
        if index_of(target) == 5:
            raise MemoryError
        return False

    outcomes = list(pipeline_of(restorer, jobs, read=read, restore=restore, write=write).run(jobs))
    assert [isinstance(outcome, DerainError) for outcome in outcomes] == [index in (1, 3, 5) for index in range(6)]
    assert all(f"{index}.png" in str(outcomes[index]) for index in (1, 3, 5))


def test_a_full_disk_ends_the_run(restorer, tmp_path):
    jobs, written = jobs_of(tmp_path, 200), []

    def write(photo, result, target):
        written.append(index_of(target))
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with pytest.raises(OSError, match="No space left"):
        list(pipeline_of(restorer, jobs, write=write).run(jobs))
    assert len(written) < 200


def test_an_interrupt_completes_the_files_that_are_being_written(restorer, tmp_path):
    jobs, written = jobs_of(tmp_path, 10), []

    def restore(photos, sources):
        if index_of(sources[-1]) >= 4:
            raise KeyboardInterrupt
        return [Explanation(photo.rgb, {}, {}) for photo in photos]

    def write(photo, result, target):
        time.sleep(0.1)
        written.append(index_of(target))
        return False

    outcomes = []
    with pytest.raises(KeyboardInterrupt):
        outcomes.extend(pipeline_of(restorer, jobs, restore=restore, write=write).run(jobs))
    assert sorted(written) == list(range(len(outcomes)))


PAUSED = """
import sys, time
from pathlib import Path
from PIL import Image
from derain.cli import main

save, saved = Image.Image.save, []


def slow(self, path, **options):
    save(self, path, **options)
    saved.append(path)
    Path(__file__).with_name(f"saved-{len(saved)}").touch()
    time.sleep(0.5)


Image.Image.save = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_folder_has_whole_files_only(tmp_path, number):
    rng = np.random.default_rng(0)
    for index in range(8):
        write_image(tmp_path / "in" / f"{index}.png", rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    PReNetModule(stages=1).save_weights(tmp_path / "w.safetensors")
    arguments = ["restore", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", str(tmp_path / "w.safetensors")]
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    process = start(*arguments, "--device", "cpu", program=(str(script),))
    wait_for(tmp_path / "saved-3", process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    files = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert all(read_rgb(path).shape == (40, 50, 3) for path in files)
    if number != signal.SIGKILL:
        assert len(files) == len(list((tmp_path / "out").iterdir())) < 8
        assert f"restored {len(files)} of 8" in text
    written = {path: path.stat().st_mtime_ns for path in files}
    assert main([*arguments, "--device", "cpu"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{index}.png" for index in range(8)]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
