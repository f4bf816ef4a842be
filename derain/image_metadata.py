"""EXIF and colour profiles that are copied from the file that is read into the file that is written."""

import logging
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD

from derain.image_sources import ORIENTATION, UNREADABLE, ImageSource

JPEG = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
"""Endings of JPEG files."""

TIFF = frozenset({".tif", ".tiff"})
"""Endings of TIFF files."""

EXIF_OF_JPEG = 65_533
"""Bytes of EXIF that a JPEG file can hold."""

DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 33432)
"""Tags of TIFF that describe the photo rather than the layout of the file: description, maker, date, copyright, ..."""

Info = dict[str, Any]
"""What Pillow writes beside pixels: ``exif`` and ``icc_profile``, in bytes."""

log = logging.getLogger("derain")


def has_location(info: Info) -> bool:
    """Return whether EXIF says where the photo was taken."""
    exif = Image.Exif()
    exif.load(info.get("exif", b""))
    return IFD.GPSInfo in exif


def exif_to_write(source: ImageSource, path: Path) -> bytes | None:
    """Return EXIF without the orientation, which is applied to the pixels; of a TIFF, without the file's layout.

    Must be called before the file is closed. EXIF that cannot be written again is dropped with a warning.
    """
    try:
        exif = source.exif
        if source.tags is not None:
            exif = _exif_of_deep_tiff(source)
        elif exif is None:
            return None
        if source.tags is not None or (source.image is not None and source.image.format == "TIFF"):
            exif = _descriptive(exif)
        exif.pop(ORIENTATION, None)
        return exif.tobytes() if len(exif) else None
    except UNREADABLE as error:
        log.warning("%s: EXIF dropped: it is damaged (%s)", path, str(error).partition("\n")[0])
        return None


def _exif_of_deep_tiff(source: ImageSource) -> Image.Exif:
    assert source.tags is not None
    exif = Image.Exif()
    source.file.seek(0)
    exif.bigtiff = source.file.read(4)[2:3] == b"+"
    exif.endian = "<" if source.tags.prefix == b"II" else ">"
    exif.load_from_fp(source.file, source.tags._offset)
    return exif


def _descriptive(exif: Image.Exif) -> Image.Exif:
    """Return EXIF without the tags that describe the layout of a TIFF file."""
    kept = Image.Exif()
    for tag in DESCRIPTIVE:
        if tag in exif:
            kept[tag] = exif[tag]
    for directory in (IFD.Exif, IFD.GPSInfo):
        values = {tag: value for tag, value in exif.get_ifd(directory).items() if tag != IFD.Interop}
        if values:
            kept[directory] = values
    return kept


def writable(info: Info, path: Path, *, grey: bool, deep: bool) -> Info:
    """Return the metadata that a file can hold; a warning names what it cannot.

    Args:
        info: Of the photo.
        path: The file to write.
        grey: Whether it has one colour channel.
        deep: Whether it has 16 bits a channel.
    """
    kept, dropped = {key: value for key, value in info.items() if value}, []
    suffix = path.suffix.lower()
    exif, profile = kept.get("exif", b""), kept.get("icc_profile")
    if suffix == ".bmp":
        dropped = [(key, "BMP cannot hold it") for key in kept]
    elif exif and suffix in JPEG and len(exif) > EXIF_OF_JPEG:
        dropped.append(("exif", f"it has {len(exif)} bytes, and JPEG holds {EXIF_OF_JPEG}"))
    elif exif and suffix in TIFF and deep:
        dropped.append(("exif", "TIFF of 16 bits is written without"))
    elif exif and suffix in TIFF:
        loaded = Image.Exif()
        loaded.load(exif)
        described = _descriptive(loaded)
        kept["exif"] = described.tobytes()
        if not len(described):
            kept.pop("exif")
    if profile is not None and suffix != ".bmp" and (profile[16:20] == b"GRAY") != grey:
        dropped.append(("icc_profile", f"it is not one of {'grey' if grey else 'colours'}"))
    names = {"exif": "EXIF", "icc_profile": "ICC profile"}
    if dropped:
        log.warning("%s: %s", path, "; ".join(f"{names[key]} dropped: {reason}" for key, reason in dropped))
    return {key: value for key, value in kept.items() if key not in dict(dropped)}
