"""EXIF and ICC profile that are copied from an input image to the restored image."""

import logging
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD

from derain.image_sources import ORIENTATION, UNREADABLE, ImageSource, first_line

JPEG = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
"""Suffixes of JPEG files."""

TIFF = frozenset({".tif", ".tiff"})
"""Suffixes of TIFF files."""

MAX_JPEG_EXIF = 65_533
"""Largest size of EXIF in a JPEG file, in bytes."""

DESCRIPTIVE_TAGS = (270, 271, 272, 305, 306, 315, 33432)
"""TIFF tags that describe the photo: description, make, model, software, date, artist, copyright."""

NAMES = {"exif": "EXIF", "icc_profile": "ICC profile"}
"""Names of the items of metadata in messages."""

Info = dict[str, Any]
"""Metadata as arguments of Pillow's ``save``: ``exif`` and ``icc_profile``, as bytes."""

log = logging.getLogger("derain")


def has_location(info: Info) -> bool:
    """Return whether the EXIF of ``info`` contains the location where the photo was taken."""
    exif = Image.Exif()
    exif.load(info.get("exif", b""))
    return IFD.GPSInfo in exif


def copy_exif(source: ImageSource, path: Path) -> bytes | None:
    """Return the EXIF of an image as bytes to write with the restored image; None if there is none, or it is damaged.

    The orientation is removed, since the restored image is upright. Of a TIFF, only ``DESCRIPTIVE_TAGS`` and the Exif
    and GPS directories are copied.

    Args:
        source: The image; its file must be open.
        path: Name of the file in the warning about EXIF that cannot be copied.
    """
    try:
        exif = source.exif if source.tags is None else _exif_of_deep_tiff(source)
        if exif is None:
            return None
        if source.tags is not None or (source.image is not None and source.image.format == "TIFF"):
            exif = _descriptive_exif(exif)
        exif.pop(ORIENTATION, None)
        return exif.tobytes() if len(exif) else None
    except UNREADABLE as error:
        log.warning("%s: damaged EXIF dropped (%s)", path, first_line(error))
        return None


def _exif_of_deep_tiff(source: ImageSource) -> Image.Exif:
    assert source.tags is not None
    exif = Image.Exif()
    source.file.seek(0)
    exif.bigtiff = source.file.read(4)[2:3] == b"+"
    exif.endian = "<" if source.tags.prefix == b"II" else ">"
    exif.load_from_fp(source.file, source.tags._offset)
    return exif


def _descriptive_exif(exif: Image.Exif) -> Image.Exif:
    """Return a copy with ``DESCRIPTIVE_TAGS`` and the Exif and GPS directories only."""
    copy = Image.Exif()
    for tag in DESCRIPTIVE_TAGS:
        if tag in exif:
            copy[tag] = exif[tag]
    for directory in (IFD.Exif, IFD.GPSInfo):
        values = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != IFD.Interop}
        if values:
            copy[directory] = values
    return copy


def supported_metadata(info: Info, path: Path, *, grey: bool, deep: bool) -> Info:
    """Return the metadata that the format of a file supports.

    A warning names EXIF or an ICC profile that is dropped. For TIFF, EXIF is reduced to ``DESCRIPTIVE_TAGS`` and the
    Exif and GPS directories, without a warning.

    Args:
        info: Metadata of the photo.
        path: File to write; its suffix selects the format.
        grey: Whether the file will have one colour channel.
        deep: Whether the file will have 16 bits per channel.
    """
    supported = {key: value for key, value in info.items() if value}
    unsupported = _unsupported(supported, path, grey=grey, deep=deep)
    if unsupported:
        warnings = [f"{NAMES[key]} dropped: {reason}" for key, reason in unsupported.items()]
        log.warning("%s: %s", path, "; ".join(warnings))
    for key in unsupported:
        del supported[key]
    if "exif" in supported and path.suffix.lower() in TIFF:
        exif = Image.Exif()
        exif.load(supported.pop("exif"))
        descriptive = _descriptive_exif(exif)
        if len(descriptive):
            supported["exif"] = descriptive.tobytes()
    return supported


def _unsupported(info: Info, path: Path, *, grey: bool, deep: bool) -> dict[str, str]:
    """Return the keys of the items that a format does not support, each with the reason."""
    suffix = path.suffix.lower()
    if suffix == ".bmp":
        return dict.fromkeys(info, "not supported by BMP")
    reasons = {}
    if "exif" in info and suffix in JPEG and len(info["exif"]) > MAX_JPEG_EXIF:
        reasons["exif"] = f"{len(info['exif'])} bytes; JPEG supports at most {MAX_JPEG_EXIF}"
    if "exif" in info and suffix in TIFF and deep:
        reasons["exif"] = "not written to 16-bit TIFF"
    if "icc_profile" in info:
        profile_is_grey = info["icc_profile"][16:20] == b"GRAY"
        if profile_is_grey != grey:
            reasons["icc_profile"] = f"not a profile for {'grey' if grey else 'colour'} images"
    return reasons
