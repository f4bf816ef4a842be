"""Read videos: upright RGB frames, and the packets of streams that are copied."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from derain.errors import DerainError
from derain.images import Pixels

from .formats import (
    FULL,
    LIMITED,
    MATRICES,
    UNKNOWN_MATRICES,
    UNSPECIFIED,
    VideoFormat,
    accurate_interpolation,
    reason,
    rotation_of,
)
from .overlap import Frame, Packet

MICROSECONDS = 1_000_000
"""Microseconds per second: start and duration of a container of FFmpeg are in microseconds."""

log = logging.getLogger("derain")


@contextmanager
def open_video(path: Path) -> Iterator[Any]:
    """Open a video for reading.

    Raises:
        DerainError: If PyAV is not installed, or the file is not a readable video.
    """
    try:
        import av
    except ImportError as error:
        raise DerainError("videos need PyAV, which is not installed; run: pip install 'derain[video]'") from error
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; check the path") from error
    except av.FFmpegError as error:
        raise DerainError(f"{path}: not a readable video ({reason(error)}); expected an undamaged video") from error
    with container:
        yield container


def select_streams(container: Any, path: Path) -> tuple[Any, list[Any]]:
    """Return the first video stream that is not a cover picture, and all audio and subtitle streams.

    Raises:
        DerainError: If there is no video stream, or no decoder for it.
    """
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        raise DerainError(f"{path}: contains no video stream; expected a video")
    if videos[0].codec_context is None:
        raise DerainError(f"{path}: PyAV has no decoder for its video stream; re-encode the video as H.264")
    videos[0].thread_type = "AUTO"
    return videos[0], [stream for stream in container.streams if stream.type in {"audio", "subtitle"}]


def frame_count(container: Any, stream: Any) -> int:
    """Return the expected number of frames, for the progress bar."""
    seconds = (container.duration or 0) / MICROSECONDS
    return max(1, int(stream.frames or seconds * float(stream.average_rate or 25)))


def read_format(path: Path) -> VideoFormat:
    """Return size, rotation and colours of a video, from its first frame.

    Raises:
        DerainError: If PyAV is not installed, the file is not a readable video, no frame can be decoded, the rotation
            is not a multiple of 90°, or the colour matrix is not supported.
    """
    with open_video(path) as container:
        stream, _ = select_streams(container, path)
        frame = next(iter(FrameReader(container, stream, [], path)), None)
        if frame is None:
            raise DerainError(f"{path}: no frame can be decoded; expected an undamaged video")
        display_matrix = frame.side_data.get("DISPLAYMATRIX")
        aspect = Fraction(stream.sample_aspect_ratio or 1)
    mirrored, quarter_turns = False, 0
    if display_matrix is not None:
        values = np.frombuffer(bytes(display_matrix), np.int32).tolist()
        rotation = rotation_of(values)
        if rotation is None:
            degrees = math.degrees(math.atan2(values[1], values[0]))
            raise DerainError(
                f"{path}: rotation of {degrees:.0f}° is not a multiple of 90°; re-encode the video upright"
            )
        mirrored, quarter_turns = rotation
    height, width = frame.height, frame.width
    if quarter_turns % 2:
        height, width, aspect = width, height, 1 / aspect
    color_tag, matrix = _color_matrix(frame, min(height, width), path)
    full_range = int(frame.color_range) == FULL or frame.format.name.startswith("yuvj")
    range_tag = FULL if full_range else int(frame.color_range)
    return VideoFormat(
        height=height,
        width=width,
        mirrored=mirrored,
        quarter_turns=quarter_turns,
        matrix=matrix,
        full_range=full_range,
        color_tags=(color_tag, range_tag, int(frame.color_trc), int(frame.color_primaries)),
        aspect=aspect,
        bits=max(component.bits for component in frame.format.components),
        has_alpha=any(component.is_alpha for component in frame.format.components),
        interlaced=bool(frame.interlaced_frame),
    )


def _color_matrix(frame: Any, shorter_side: int, path: Path) -> tuple[int, int]:
    """Return the tag of the colour matrix for the copy, and the matrix for the conversion to and from RGB.

    Without a tag, the matrix is that of BT.709 if the shorter side has at least 720 pixels, otherwise that of BT.601.

    Raises:
        DerainError: If the tag names a matrix that is not supported, such as YCgCo or ICtCp.
    """
    tag = int(frame.colorspace)
    if tag in MATRICES:
        return tag, tag
    if tag not in UNKNOWN_MATRICES:
        raise DerainError(f"{path}: colour matrix {tag} is not supported; re-encode the video with BT.709 (1)")
    return UNSPECIFIED, 1 if shorter_side >= 720 else 6


def to_upright_rgb(frame: Any, video_format: VideoFormat, path: Path) -> Pixels:
    """Return a frame of PyAV as upright RGB, ``(h, w, 3)`` uint8.

    Raises:
        DerainError: If the size is not that of the first frame.
    """
    size = (frame.height, frame.width)
    if video_format.quarter_turns % 2:
        size = (frame.width, frame.height)
    if size != (video_format.height, video_format.width):
        seconds = f" at {float(frame.time):.1f} s" if frame.time is not None else ""
        raise DerainError(f"{path}: frame size changes mid-stream{seconds}; split the file there")
    if frame.format.is_rgb:
        rgb = frame.to_ndarray(format="rgb24")
    else:
        rgb = frame.reformat(
            format="rgb24",
            interpolation=accurate_interpolation(),
            src_colorspace=MATRICES[video_format.matrix],
            src_color_range=FULL if video_format.full_range else LIMITED,
            dst_color_range=FULL,
        ).to_ndarray()
    if video_format.mirrored:
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(np.rot90(rgb, video_format.quarter_turns))


def warn_of_losses(video_format: VideoFormat, source: Path) -> None:
    """Warn of properties of a video that its copy does not have."""
    if video_format.bits > 8:
        log.warning("%s: %d bits per channel; the copy has 8", source, video_format.bits)
    if video_format.has_alpha:
        log.warning("%s: has an alpha channel; the copy has none", source)
    if video_format.interlaced:
        log.warning("%s: interlaced, but restored as progressive; deinterlace it first for a better result", source)


def warn_of_skipped_streams(container: Any, kept: list[Any], source: Path) -> None:
    """Warn of streams other than ``kept``, the restored and copied ones."""
    skipped = [stream.type or "unknown" for stream in container.streams if stream not in kept]
    if container.chapters() and "data" in skipped:
        skipped.remove("data")  # MP4 stores chapters in one such stream, and they are copied
    if skipped:
        log.warning("%s: skipped streams: %s", source, ", ".join(sorted(skipped)))


class FrameReader:
    """Iterable of the frames of a video in display order, and of the packets of copied streams in between.

    Args:
        container: The video.
        stream: Its video stream.
        copied_streams: Audio and subtitle streams.
        path: Name of the file in messages.

    Attributes:
        frames: Number of frames so far.
        damaged: Number of packets so far that could not be decoded.
        error: Message of FFmpeg about a packet that could not be read; empty if there was none so far.
        end: Latest end of a packet so far, as a time of the file in seconds.
    """

    def __init__(self, container: Any, stream: Any, copied_streams: list[Any], path: Path) -> None:
        self.container, self.stream, self.copied_streams, self.path = container, stream, copied_streams, path
        self.frames = self.damaged = 0
        self.error = ""
        self.end = Fraction(0)

    def upright(self, video_format: VideoFormat) -> Iterator[Frame]:
        """Yield upright RGB frames with the packets before them; the last item has packets, but no pixels.

        Raises:
            DerainError: If the size of the frames changes.
        """
        packets: list[Packet] = []
        for item in self:
            if isinstance(item, Packet):
                packets.append(item)
                continue
            pixels = to_upright_rgb(item, video_format, self.path)
            yield Frame(packets, pixels, item.pts, item.duration, item.time)
            packets = []
        yield Frame(packets, None)

    def __iter__(self) -> Iterator[Any]:
        """Yield PyAV's frames, and packets of copied streams as `Packet`."""
        for packet in self._packets():
            if packet is not None and packet.stream_index != self.stream.index:
                yield Packet(packet, packet.stream_index)
                continue
            for frame in self._decode(packet):
                frame.time_base = self.stream.time_base  # unset if the decoder releases frames at the end of the file
                self.frames += 1
                yield frame

    def _packets(self) -> Iterator[Any]:
        """Yield packets up to the end or to damage, then None, which flushes the decoder."""
        import av

        packets = self.container.demux([self.stream, *self.copied_streams])
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.FFmpegError as error:  # the file is truncated within a packet
                self.error = reason(error)
                break
            if packet.size:
                if packet.pts is not None:
                    self.end = max(self.end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                yield packet
        yield None

    def _decode(self, packet: Any) -> list[Any]:
        """Return the frames of a packet; count it if it is damaged."""
        import av

        try:
            return list(self.stream.decode(packet))
        except av.FFmpegError:
            self.damaged += 1
            return []

    def report_damage(self) -> None:
        """Warn if the video is truncated or frames were skipped.

        Raises:
            DerainError: If no frame was decoded.
        """
        if not self.frames:
            raise DerainError(f"{self.path}: no frame can be decoded; expected an undamaged video")
        start = (self.container.start_time or 0) / MICROSECONDS
        end = float(self.end) - start
        if self.error:
            log.warning("%s: truncated at %.1f s (%s); restored the readable part", self.path, end, self.error)
        elif self.container.duration is not None:
            duration = self.container.duration / MICROSECONDS
            if duration - end > max(0.2, duration / 100):
                log.warning("%s: truncated at %.1f of %.1f s; restored the readable part", self.path, end, duration)
        if self.damaged:
            log.warning("%s: skipped %d damaged frames", self.path, self.damaged)
