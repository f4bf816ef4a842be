"""The one exception for bad input."""


class DerainError(ValueError):
    """Bad input, told in one line: what is wrong with which file or option, what was expected, what to do.

    The command line prints the line without a traceback and exits with code 2.

    Example:
        >>> raise DerainError("photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file")
        Traceback (most recent call last):
        derain.errors.DerainError: photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file
    """
