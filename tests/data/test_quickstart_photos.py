import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from derain.data.backgrounds import compute_signature, find_matches
from derain.data.quickstart_photos import PHOTOS, write_photos
from derain.errors import DerainError
from derain.images import read_rgb
from derain.listing import image_files

needs_photos = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")


@needs_photos
def test_photos_are_written_with_their_licences(tmp_path):
    written = write_photos(tmp_path)
    train = [path for path in written if path.parent == tmp_path / "train"]
    test = [path for path in written if path.parent == tmp_path / "test"]
    assert len(train) + len(test) == len(written)
    assert len(train) == 4 * sum(photo.split == "train" for photo in PHOTOS)
    assert sorted(path.name for path in test) == ["chelsea.png", "rocket.png"]
    assert all(min(read_rgb(path).shape[:2]) >= 150 for path in written)
    lines = (tmp_path / "LICENCES.txt").read_text().splitlines()
    assert len(lines) == len(PHOTOS)
    assert all(line.endswith(("CC0", "public domain")) for line in lines)


@needs_photos
def test_tiles_make_up_the_photo(tmp_path):
    write_photos(tmp_path)
    tiles = [read_rgb(tmp_path / "train" / f"astronaut-{number}.png") for number in range(1, 5)]
    whole = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
    folder = importlib.util.find_spec("skimage").submodule_search_locations[0]
    np.testing.assert_array_equal(whole, read_rgb(type(tmp_path)(folder) / "data" / "astronaut.png"))


@needs_photos
@pytest.mark.slow
def test_no_photo_is_in_both_splits(tmp_path):
    write_photos(tmp_path)
    train, test = (
        [compute_signature(read_rgb(path)[::2, ::2]) for path in image_files(tmp_path / split)]
        for split in ("train", "test")
    )
    assert find_matches(train, test) == []
    assert find_matches(train) == [], "tiles do not overlap"
    assert find_matches(train, [train[5]]), "the search finds copies"


@needs_photos
@pytest.mark.slow
def test_scikit_image_and_torch_are_not_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; import derain.data.rain; from derain.data import quickstart_photos\n"
        f"quickstart_photos.write_photos(Path({str(tmp_path)!r}))\n"
        "print([name for name in ('skimage', 'torch', 'lightning', 'albumentations') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_scikit_image_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DerainError, match=r"pip install 'derain\[quickstart\]'"):
        write_photos(tmp_path / "photos")
    assert not (tmp_path / "photos").exists()
