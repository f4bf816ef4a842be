"""Write videos: containers, encoders, colours and copied streams."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from derain.errors import DerainError
from derain.images import Pixels

from .encoders import ENCODERS, choose_encoder, open_encoder
from .formats import FORMATS, FULL, LIMITED, MATRICES, VideoFormat, accurate_interpolation, reason
from .overlap import Packet

CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "ENCODER", "DURATION"})
"""Tags that describe the container, not its content; they are not copied."""

log = logging.getLogger("derain")


class Writer:
    """Writes a video: encodes frames, and copies streams, chapters and tags of the source.

    Args:
        file: File to write, or a buffer.
        target: Name of the video in messages; its suffix selects the container.
        video_format: Colours and aspect of the source.
        size: Height and width of the frames in pixels.
        stream: Video stream of the source.
        copied_streams: Streams of the source to copy.
        crf: Quality from 0 (best) to 51 (worst), see ``VideoOptions``.
        encoder: Name of the encoder; None for the default of the container.
        source: Name of the source in messages.

    Raises:
        DerainError: If the suffix is not in ``FORMATS``, the encoder is not available or cannot be opened, or the
            container does not support an audio stream.
    """

    def __init__(
        self,
        file: Path | io.BytesIO,
        target: Path,
        video_format: VideoFormat,
        size: tuple[int, int],
        stream: Any,
        copied_streams: list[Any],
        crf: int,
        encoder: str | None,
        source: Path,
    ) -> None:
        if target.suffix.lower() not in FORMATS:
            suffixes = ", ".join(FORMATS)
            raise DerainError(f"{target}: cannot write '{target.suffix.lower()}' videos; end the name in {suffixes}")
        self.video_format, self.stream, self.target = video_format, stream, target
        self.last_pts: int | None = None
        self.container = self._open(file)
        self.video = self._add_video(size, crf, encoder)
        self.container.metadata.update(
            {key: value for key, value in stream.container.metadata.items() if key not in CONTAINER_TAGS}
        )
        self.container.set_chapters(stream.container.chapters())
        self.copies = self._add_copies(copied_streams, source)

    @property
    def rate(self) -> Any:
        """Frames per second of the source, 25 if unknown: for encoders, and for frames without a time."""
        return self.stream.average_rate or self.stream.guessed_rate or 25

    def _open(self, file: Path | io.BytesIO) -> Any:
        import av
        from av.format import Flags

        name = FORMATS[self.target.suffix.lower()]
        source = self.stream.container
        options = {}
        if name in {"mp4", "mov"}:
            options = {"movflags": "+faststart", "video_track_timescale": str(self.stream.time_base.denominator)}
        if source.format.flags & Flags.ts_discont.value:  # times in such formats may start anywhere
            options["output_ts_offset"] = f"{-(source.start_time or 0) / 1_000_000:.6f}"
        handle = file if isinstance(file, io.BytesIO) else str(file)
        return av.open(handle, "w", format=name, options=options)

    def _add_video(self, size: tuple[int, int], crf: int, chosen_encoder: str | None) -> Any:
        encoder = choose_encoder(self.container, chosen_encoder, self.target)
        video = self.container.add_stream(encoder, rate=self.rate, options=ENCODERS[encoder](crf))
        video.height, video.width = size
        has_odd_side = size[0] % 2 or size[1] % 2  # H.264 can halve the resolution of chroma for even sides only
        video.pix_fmt = "yuv444p" if encoder == "libx264" and has_odd_side else "yuv420p"
        context = video.codec_context
        video.time_base = context.time_base = self.stream.time_base
        context.sample_aspect_ratio = self.video_format.aspect
        self._tag_colors(context)
        for key in ("language", "title"):
            if key in self.stream.metadata:
                video.metadata[key] = self.stream.metadata[key]
        if chosen_encoder is not None:
            open_encoder(video, encoder, self.target)
        return video

    def _tag_colors(self, tagged: Any) -> None:
        """Set the colour tags of an encoder or a frame."""
        tagged.colorspace, tagged.color_range, tagged.color_trc, tagged.color_primaries = self.video_format.color_tags

    def _add_copies(self, copied_streams: list[Any], source: Path) -> dict[int, Any]:
        """Add streams to copy packets to; return them by their index in the source."""
        copies = {}
        for stream in copied_streams:
            copy = self._add_copy(stream)
            if copy is not None:
                copy.metadata.update(stream.metadata)
                copy.disposition = stream.disposition
                copies[stream.index] = copy
                continue
            codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
            suffix = self.target.suffix
            if stream.type == "audio":
                raise DerainError(
                    f"{self.target}: '{suffix}' does not support the sound of {source} ({codec}); "
                    "end the name in .mkv or .mov"
                )
            log.warning("%s: skipped subtitles (%s), which '%s' does not support", source, codec, suffix)
        return copies

    def _add_copy(self, stream: Any) -> Any | None:
        """Add a copy of a source stream; return None if the container does not support it."""
        if stream.codec_context is None:
            return None
        try:
            return self.container.add_stream_from_template(stream)
        except ValueError:
            return None

    def drop_tags(self) -> None:
        """Drop all tags except the languages of streams."""
        self.container.metadata.clear()
        for stream in [self.video, *self.copies.values()]:
            language = {key: value for key, value in stream.metadata.items() if key == "language"}
            stream.metadata.clear()
            stream.metadata.update(language)

    def add(self, pixels: Pixels, pts: int | None, duration: int) -> None:
        """Encode a frame.

        Args:
            pixels: ``(h, w, 3)`` uint8.
            pts: Time in units of the time base of the source's video stream; None if unknown.
            duration: Duration in the same units; 0 if unknown.
        """
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format=self.video.pix_fmt,
            interpolation=accurate_interpolation(),
            dst_colorspace=MATRICES[self.video_format.matrix],
            src_color_range=FULL,
            dst_color_range=FULL if self.video_format.full_range else LIMITED,
        )
        self._tag_colors(frame)
        self.last_pts = frame.pts = self._next_pts(pts)
        frame.time_base, frame.duration = self.stream.time_base, duration
        self._mux(lambda: self.video.encode(frame))

    def _next_pts(self, pts: int | None) -> int:
        """Return the time of the next frame, later than the last; estimated from the frame rate if ``pts`` is None."""
        if self.last_pts is None:
            return 0 if pts is None else pts
        if pts is None:
            pts = self.last_pts + round(1 / self.rate / self.stream.time_base)
        return max(self.last_pts + 1, pts)

    def copy(self, packet: Packet) -> None:
        """Copy a packet, if its stream is copied."""
        if packet.stream_index in self.copies:
            packet.content.stream = self.copies[packet.stream_index]
            self._mux(lambda: packet.content)

    def _mux(self, packets: Callable[[], Any]) -> None:
        """Write the packets that a function returns; report its errors, such as those of the encoder, too."""
        import av

        try:
            self.container.mux(packets())
        except av.FFmpegError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Any) -> DerainError:
        return DerainError(f"{self.target}: cannot be written ({reason(error)})")

    def finish(self) -> None:
        """Write the frames that the encoder has not yet returned; to be called after the last frame."""
        self._mux(lambda: self.video.encode(None))

    def close(self, complete: bool = True) -> None:
        """Close the file.

        Args:
            complete: Whether all frames were written; errors of an incomplete file are ignored.
        """
        import av

        try:
            self.container.close()
        except av.FFmpegError as error:
            if complete:
                raise self._not_written(error) from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(complete=error[0] is None)
