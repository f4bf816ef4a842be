"""Writing videos: containers, encoders, and what a file says of its colours, its sound and itself."""

import io
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from derain.errors import DerainError
from derain.images import Pixels

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Containers that are written, by the ending of their name: those that keep every frame's time."""

ENCODERS: dict[str, Callable[[int], dict[str, str]]] = {
    "libx264": lambda crf: {"crf": str(crf)},
    "libvpx-vp9": lambda crf: {"crf": str(crf), "b": "0"},
    "mpeg4": lambda crf: {"qmin": "1", "qmax": str(max(1, crf // 6))},
}
"""Encoders from the best to the last resort, and their options for a quality."""

MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""Colour matrices as videos name them (ISO/IEC 23091-2) and as PyAV's conversions do."""

UNSPECIFIED, LIMITED, FULL = 2, 1, 2
"""Of the colour matrix; of the range of values, 16 to 235 and 0 to 255."""

KEPT_BY_FORMAT = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "ENCODER", "DURATION"})
"""What a container says of itself rather than of its content."""

log = logging.getLogger("derain")


class Look(NamedTuple):
    """What the first frame of a video says of all of them.

    Attributes:
        height: Of the upright frame.
        width: Of the upright frame.
        mirrored: Whether frames are mirrored from left to right before they are turned.
        quarters: Quarter turns, counter-clockwise, that set frames upright.
        matrix: Colour matrix of the conversion to RGB.
        full: Whether luma fills 0 to 255.
        tags: Colour matrix, range, transfer function and primaries, as the file names them.
        aspect: Width of an upright pixel by its height.
        bits: A channel.
        interlaced: Whether every other line is of another time.
    """

    height: int
    width: int
    mirrored: bool
    quarters: int
    matrix: int
    full: bool
    tags: tuple[int, int, int, int]
    aspect: Fraction
    bits: int
    interlaced: bool


def exactly() -> Any:
    """Bicubic chroma, and no short cuts in arithmetic."""
    from av.video.reformatter import Interpolation as By

    return By.BICUBIC | By.ACCURATE_RND | By.FULL_CHR_H_INT | By.FULL_CHR_H_INP


def reason(error: Any) -> str:
    """Return what FFmpeg says is wrong, in a few words."""
    return str(error.strerror or type(error).__name__)


class Writer:
    """A video in the making.

    Args:
        file: Where to.
        target: What the video will be called.
        first: How its frames are to be shown.
        size: Height and width of its frames.
        stream: The frames' stream in the source.
        others: Streams of the source to copy.
        crf: Quality.
        source: For messages.

    Raises:
        DerainError: If the container cannot hold what is in the source.
    """

    def __init__(
        self,
        file: Path | io.BytesIO,
        target: Path,
        first: Look,
        size: tuple[int, int],
        stream: Any,
        others: list[Any],
        crf: int,
        source: Path,
    ) -> None:
        import av
        from av.format import Flags

        suffix = target.suffix.lower()
        if suffix not in FORMATS:
            raise DerainError(f"{target}: cannot write '{suffix}' videos; end it in {', '.join(FORMATS)}")
        self.first, self.stream, self.target = first, stream, target
        self.last: int | None = None
        options = {"movflags": "+faststart", "video_track_timescale": str(stream.time_base.denominator)}
        if FORMATS[suffix] not in {"mp4", "mov"}:
            options = {}
        if stream.container.format.flags & Flags.ts_discont.value:  # its clock starts anywhere
            options["output_ts_offset"] = f"{-(stream.container.start_time or 0) / 1_000_000:.6f}"
        handle = file if isinstance(file, io.BytesIO) else str(file)
        self.container: Any = av.open(handle, "w", format=FORMATS[suffix], options=options)
        encoder = next(name for name in ENCODERS if name in self.container.supported_codecs)
        odd = encoder == "libx264" and (size[0] % 2 or size[1] % 2)  # H.264 halves colour only where sides are even
        rate = stream.average_rate or stream.guessed_rate or 25
        video: Any = self.container.add_stream(encoder, rate=rate, options=ENCODERS[encoder](crf))
        video.height, video.width = size
        video.pix_fmt = "yuv444p" if odd else "yuv420p"
        video.time_base = video.codec_context.time_base = stream.time_base
        video.codec_context.sample_aspect_ratio = first.aspect
        for name, tag in zip(("colorspace", "color_range", "color_trc", "color_primaries"), first.tags, strict=True):
            setattr(video.codec_context, name, tag)
        video.metadata.update({k: v for k, v in stream.metadata.items() if k in {"language", "title"}})
        self.container.metadata.update({k: v for k, v in stream.container.metadata.items() if k not in KEPT_BY_FORMAT})
        self.container.set_chapters(stream.container.chapters())
        self.beat = round(1 / rate / stream.time_base)
        self.video, self.copies = video, self._copies(others, source)

    def _copies(self, others: list[Any], source: Path) -> dict[int, Any]:
        """Streams for what is copied, by their number in the source."""
        copies = {}
        for one in others:
            codec = one.codec_context.codec.canonical_name if one.codec_context else "unknown"
            try:
                if one.codec_context is None:
                    raise ValueError
                copies[one.index] = self.container.add_stream_from_template(one)
            except ValueError as error:
                if one.type == "audio":
                    raise DerainError(
                        f"{self.target}: '{self.target.suffix}' cannot hold the sound of {source} ({codec}); "
                        "end it in .mkv or .mov"
                    ) from error
                log.warning("%s: subtitles (%s) left out, which '%s' cannot hold", source, codec, self.target.suffix)
                continue
            copies[one.index].metadata.update(one.metadata)
            copies[one.index].disposition = one.disposition
        return copies

    def forget(self) -> None:
        """Drop all tags but the languages of streams."""
        self.container.metadata.clear()
        for stream in [self.video, *self.copies.values()]:
            language = {key: value for key, value in stream.metadata.items() if key == "language"}
            stream.metadata.clear()
            stream.metadata.update(language)

    def add(self, pixels: Pixels, like: Any) -> None:
        """Adds a frame, at the time of another one."""
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        reach = FULL if self.first.full else LIMITED
        there = {"dst_colorspace": MATRICES[self.first.matrix], "src_color_range": FULL, "dst_color_range": reach}
        frame = frame.reformat(format=self.video.pix_fmt, interpolation=exactly(), **there)
        frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = self.first.tags
        pts = like.pts
        if self.last is not None:
            pts = max(self.last + 1, self.last + self.beat if pts is None else pts)
        self.last = 0 if pts is None else pts
        frame.pts, frame.time_base, frame.duration = self.last, self.stream.time_base, like.duration
        self._mux(lambda: self.video.encode(frame))

    def copy(self, packet: Any, index: int) -> None:
        """Adds a packet of another stream as it is."""
        if index in self.copies:
            packet.stream = self.copies[index]
            self._mux(lambda: packet)

    def _mux(self, packets: Callable[[], Any]) -> None:
        import av

        try:
            self.container.mux(packets())
        except av.FFmpegError as error:
            raise DerainError(f"{self.target}: could not be written ({reason(error)})") from error

    def finish(self) -> None:
        """Adds what the encoder holds back."""
        self._mux(lambda: self.video.encode(None))

    def close(self, whole: bool = True) -> None:
        """Ends the file."""
        import av

        try:
            self.container.close()
        except av.FFmpegError as error:
            if whole:
                raise DerainError(f"{self.target}: could not be written ({reason(error)})") from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(whole=error[0] is None)
