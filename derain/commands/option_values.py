"""Parse the values of options that are a number or a word."""

from typing import Literal

from derain.errors import DerainError


def tile_size(text: str) -> int | Literal["auto"] | None:
    """Return the value of ``--tile``: a side in pixels, ``auto``, or None (for ``none``: whole images).

    Raises:
        DerainError: If the text is not a whole number, ``auto`` or ``none``; the number is not checked further.

    Example:
        >>> tile_size("none"), tile_size("auto"), tile_size("512")
        (None, 'auto', 512)
    """
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    if not text.isdecimal():
        raise DerainError(f"--tile {text}: expected a number of pixels, auto or none")
    return int(text)


def scale_factor(text: str) -> int | Literal["auto"]:
    """Return the value of ``--scale``: a factor, ``auto``, or 1 (for ``full``).

    Raises:
        DerainError: If the text is not a whole number of at least 1, ``auto`` or ``full``.

    Example:
        >>> scale_factor("full"), scale_factor("auto"), scale_factor("4")
        (1, 'auto', 4)
    """
    if text == "auto":
        return "auto"
    if text == "full":
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise DerainError(f"--scale {text}: expected a factor of at least 1, auto or full")
    return int(text)
