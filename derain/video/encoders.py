"""Video encoders and their options."""

from collections.abc import Callable
from typing import Any

from derain.errors import DerainError

from .formats import reason

CrfConversion = Callable[[int], dict[str, str]]
"""Function of ``crf``, 0 to 51, that returns options of an FFmpeg encoder with about this quality."""

DEFAULT_ENCODERS = ("libx264", "libvpx-vp9", "mpeg4")
"""Encoders in order of preference; the default is the first that the container supports and FFmpeg has."""


def _crf(crf: int) -> dict[str, str]:
    return {"crf": str(crf)}


def _svt_av1(crf: int) -> dict[str, str]:
    return {"crf": str(max(1, crf))}  # crf 0 means the default of 35


def _vp9(crf: int) -> dict[str, str]:
    return {"crf": str(crf), "b": "0"}  # with a bit rate, crf would be an upper limit of the quality


def _mpeg4(crf: int) -> dict[str, str]:
    return {"qmin": "1", "qmax": str(max(1, crf // 6))}  # its quantiser scale is 1 (best) to 31


def _nvenc(crf: int) -> dict[str, str]:
    return {"rc": "vbr", "cq": str(max(1, crf)), "b": "0"}  # cq 0 means automatic


def _quick_sync(crf: int) -> dict[str, str]:
    return {"global_quality": str(max(1, crf))}


def _amf(crf: int) -> dict[str, str]:
    return {"rc": "cqp", "qp_i": str(crf), "qp_p": str(crf)}


def _videotoolbox(crf: int) -> dict[str, str]:
    quality = round(100 * (1 - crf / 51))  # 1 to 100, 100 is best; in units of 118 (FF_QP2LAMBDA)
    return {"flags": "+qscale", "global_quality": str(118 * max(1, quality))}


ENCODERS: dict[str, CrfConversion] = {
    "libx264": _crf,
    "libx265": _crf,
    "libsvtav1": _svt_av1,
    "libvpx-vp9": _vp9,
    "mpeg4": _mpeg4,
    "h264_nvenc": _nvenc,
    "hevc_nvenc": _nvenc,
    "av1_nvenc": _nvenc,
    "h264_qsv": _quick_sync,
    "hevc_qsv": _quick_sync,
    "av1_qsv": _quick_sync,
    "h264_amf": _amf,
    "hevc_amf": _amf,
    "av1_amf": _amf,
    "h264_videotoolbox": _videotoolbox,
    "hevc_videotoolbox": _videotoolbox,
}
"""Encoders by name, with the conversion of ``crf`` to their options; those after ``mpeg4`` run on graphics hardware."""


def choose_encoder(container: Any, name: str | None, target: object) -> str:
    """Return the encoder for a container.

    Args:
        container: PyAV's container, opened for writing.
        name: Name of the encoder; None for the container's default.
        target: Name of the video in messages.

    Raises:
        DerainError: If the encoder is unknown, not part of this FFmpeg, or not supported by the container; or if no
            name is given, and this FFmpeg has none of the default encoders that the container supports.
    """
    supported = [encoder for encoder in ENCODERS if encoder in container.supported_codecs and _exists(encoder)]
    if name is None:
        default = next((encoder for encoder in DEFAULT_ENCODERS if encoder in supported), None)
        if default is None:
            raise DerainError(
                f"{target}: this FFmpeg has no {' or '.join(DEFAULT_ENCODERS)} for it; "
                f"use --encoder (available: {', '.join(supported) or 'none'}), or install PyAV from PyPI"
            )
        return default
    if name not in supported:
        raise DerainError(f"--encoder {name}: not available for {target}; use {', '.join(supported)}")
    return name


def _exists(encoder: str) -> bool:
    """Return whether this FFmpeg has an encoder; its hardware may be missing."""
    import av

    try:
        av.Codec(encoder, "w")
    except (ValueError, av.FFmpegError):  # the name is unknown, or that of a decoder only
        return False
    return True


def open_encoder(video: Any, name: str, target: object) -> None:
    """Open an encoder before its first frame, so that missing hardware is reported early.

    Args:
        video: PyAV's stream, with size, pixel format and time base.
        name: Name of the encoder in messages.
        target: Name of the video in messages.

    Raises:
        DerainError: If the encoder cannot be opened.
    """
    import av

    try:
        video.codec_context.open(strict=False)
    except av.FFmpegError as error:
        raise DerainError(
            f"--encoder {name}: cannot be opened for {target} ({reason(error)}), for example because its hardware or "
            "driver is missing; omit --encoder"
        ) from error
