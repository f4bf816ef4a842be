import cv2
import numpy as np
import pytest

from derain.errors import DerainError
from derain.pictures import compare, contact_sheet


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def position(sheet, image):
    """Return column and row of an unchanged image on a sheet."""
    pixels = np.asarray(sheet)
    height, width = image.shape[:2]
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(pixels, image[:4, :8], cv2.TM_SQDIFF))
    np.testing.assert_array_equal(pixels[y : y + height, x : x + width], image)
    return x, y


@pytest.mark.parametrize(("height", "width"), [(10, 20), (321, 481)])
def test_compare_keeps_every_pixel_and_the_order(height, width):
    images = {name: noise(height, width, seed) for seed, name in enumerate(["rainy", "derained", "clean"])}
    sheet = compare(images)
    columns, rows = zip(*(position(sheet, image) for image in images.values()), strict=True)
    assert columns[0] < columns[1] < columns[2]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(("height", "width"), [(10, 20), (1, 1), (321, 481), (2160, 3840)])
def test_compare_writes_a_legible_label_above_each_image(height, width):
    white = np.full((height, width, 3), 255, np.uint8)
    sheet = np.asarray(compare({"rainy": white, "clean": white}).convert("L"))
    inked = (sheet < 128).any(axis=0)
    assert inked[: sheet.shape[1] // 2].any()
    assert inked[sheet.shape[1] // 2 :].any()
    lines = np.flatnonzero((sheet < 128).any(axis=1))
    assert lines.max() - lines.min() >= max(8, min(height, width) // 60)
    assert lines.max() < sheet.shape[0] - height, "the label covers the image"


def test_compare_adds_space_for_long_labels():
    image = noise(10, 20)
    short, long = (
        compare({"a": image, "b": image}),
        compare({"a": image, "b, and 37.48 dB\nsecond line": image}),
    )
    assert long.width > short.width + 60
    assert long.height > short.height + 10


def test_compare_accepts_images_of_different_sizes():
    images = {"small": noise(10, 20), "large": noise(60, 50, 1)}
    sheet = compare(images)
    (left, _), (right, _) = (position(sheet, image) for image in images.values())
    assert left < right


def test_contact_sheet_shrinks_to_the_cell_and_keeps_the_aspect_ratio():
    red = np.full((100, 400, 3), (200, 0, 0), np.uint8)
    blue = np.full((300, 100, 3), (0, 0, 200), np.uint8)
    sheet = np.asarray(contact_sheet([[red, blue]], cell=100))
    for colour, size in (((200, 0, 0), (25, 100)), ((0, 0, 200), (100, 33))):
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == size


def test_contact_sheet_enlarges_nothing():
    image = noise(10, 20)
    position(contact_sheet([[image]], cell=256), image)


def test_contact_sheet_of_ragged_rows_with_labels():
    images = [noise(40, 40, seed) for seed in range(3)]
    plain = contact_sheet([images[:2], images[2:]], cell=40)
    labelled = contact_sheet(
        [images[:2], images[2:]], column_labels=["rainy", "clean"], row_labels=["norain-001", "2"], cell=40
    )
    assert labelled.height > plain.height
    assert labelled.width > plain.width + 50
    (x0, y0), (x1, y1), (x2, y2) = (position(labelled, image) for image in images)
    assert x0 == x2 < x1
    assert y0 == y1 < y2


def test_sheets_need_images_and_as_many_labels():
    image = noise(4, 4)
    with pytest.raises(DerainError, match="no images"):
        compare({})
    with pytest.raises(DerainError, match="no images"):
        contact_sheet([[]])
    with pytest.raises(DerainError, match=r"1 column .* 2 columns"):
        contact_sheet([[image, image]], column_labels=["rainy"])
    with pytest.raises(DerainError, match=r"3 row .* 1 rows"):
        contact_sheet([[image]], row_labels=["a", "b", "c"])
