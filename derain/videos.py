"""Restore videos: frames are changed; times, sound, subtitles, chapters and tags are copied."""

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError
from derain.images import Pixels, to_bytes, write_whole
from derain.pictures import compare
from derain.progress import track
from derain.video_writer import (
    FORMATS,
    FULL,
    LIMITED,
    MATRICES,
    UNSPECIFIED,
    VideoFormat,
    Writer,
    accurate_interpolation,
    reason,
)

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv"}
)
"""Suffixes of videos, in lower case."""

MICROSECONDS = 1_000_000
"""Microseconds per second: FFmpeg's unit for start and duration of a container."""

Frame = NDArray[np.float32]
"""An upright frame, ``(h, w, 3)`` in [0, 1]."""

log = logging.getLogger("derain")


def check_crf(crf: int) -> None:
    """Check ``--crf``.

    Raises:
        DerainError: If it is not from 0 to 51.
    """
    if not 0 <= crf <= 51:
        raise DerainError(f"--crf {crf}: expected 0 (lossless) to 51 (worst); 18 looks lossless")


def output_path(path: Path) -> Path:
    """Return the path of the restored file: videos in a container that cannot be written become ``.mp4``.

    Example:
        >>> [output_path(Path(name)).name for name in ("a.mts", "b.mkv", "c.jpg")]
        ['a.mp4', 'b.mkv', 'c.jpg']
    """
    suffix = path.suffix.lower()
    return path.with_suffix(".mp4") if suffix in SUFFIXES and suffix not in FORMATS else path


def check(source: Path, target: Path) -> None:
    """Check that a video can be read and its restored copy can be written.

    Raises:
        DerainError: If ``source`` is not a readable video, or the container of ``target`` does not support its sound.
    """
    with _open(source) as container:
        stream, copied_streams = _streams(container, source)
        writer = Writer(io.BytesIO(), target, read_format(source), (2, 2), stream, copied_streams, 18, source)
        writer.close(complete=False)


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[Frame], Frame],
    *,
    crf: int = 18,
    beside: Path | None = None,
    metadata: bool = True,
) -> bool:
    """Write a complete video with changed, upright frames and the times and sound of the source, or no video.

    If the source is truncated, its readable part is written, with a warning.

    Args:
        source: The video.
        target: The new video; its suffix is the container.
        change: Function of a frame that returns a frame of the same size.
        crf: Quality on x264's scale, 0 (lossless) to 51.
        beside: File for another video that shows source and result side by side; None for no such video.
        metadata: Whether to copy the tags of the video, such as time and location.

    Returns:
        Whether the copied tags include a location.

    Raises:
        DerainError: If the video cannot be read, the size of its frames changes, the container does not support its
            sound, or a changed frame is not finite.
    """
    video_format = read_format(source)
    _warn_of_losses(video_format, source)
    with ExitStack() as stack:
        container = stack.enter_context(_open(source))
        stream, copied_streams = _streams(container, source)
        _warn_of_skipped_streams(container, [stream, *copied_streams], source)

        def open_writer(path: Path, size: tuple[int, int]) -> Writer:
            temporary = stack.enter_context(write_whole(path))
            writer = Writer(temporary, path, video_format, size, stream, copied_streams, crf, source)
            stack.enter_context(writer)
            if not metadata:
                writer.drop_tags()
            return writer

        video_writer = open_writer(target, (video_format.height, video_format.width))
        writers = [video_writer]
        reader = _FrameReader(container, stream, copied_streams, source, writers)
        for frame in track(reader, "Frames", _frame_count(container, stream)):
            rainy = _read(frame, video_format, source)
            pixels = to_bytes(change(rainy), f"{source}: frame {reader.frames}")
            video_writer.add(pixels, frame)
            if beside is not None:
                picture = _with_even_sides(np.asarray(compare({"rainy": to_bytes(rainy), "derained": pixels})))
                if len(writers) == 1:
                    writers.append(open_writer(beside, (picture.shape[0], picture.shape[1])))
                    reader.copy_early_packets(writers[1])
                writers[1].add(picture, frame)
        reader.report_damage()
        for writer in writers:
            writer.finish()
        return any("location" in key.lower() for key in video_writer.container.metadata)


def _warn_of_losses(video_format: VideoFormat, source: Path) -> None:
    if video_format.bits > 8:
        log.warning("%s: %d bits per channel; the copy has 8", source, video_format.bits)
    if video_format.interlaced:
        log.warning("%s: interlaced, but restored as progressive; deinterlace it first for a better result", source)


def _warn_of_skipped_streams(container: Any, kept: list[Any], source: Path) -> None:
    skipped = {stream.type or "unknown" for stream in container.streams if stream not in kept}
    if container.chapters():
        skipped.discard("data")  # MP4 stores chapters in such a stream, and they are copied
    if skipped:
        log.warning("%s: skipped streams: %s", source, ", ".join(sorted(skipped)))


def read_format(path: Path) -> VideoFormat:
    """Return size, rotation and colours of a video, as those of its first frame.

    Raises:
        DerainError: If no frame can be decoded, or the rotation is not a multiple of 90°.
    """
    with _open(path) as container:
        stream, _ = _streams(container, path)
        frame = next(iter(_FrameReader(container, stream, [], path, [])), None)
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
    color_tag, matrix = _color_matrix(frame, min(height, width))
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
        interlaced=bool(frame.interlaced_frame),
    )


def _color_matrix(frame: Any, shorter_side: int) -> tuple[int, int]:
    """Return the tagged colour matrix and that for the conversion; without a tag, BT.709 for HD and BT.601 below."""
    tag = int(frame.colorspace)
    if tag in MATRICES:
        return tag, tag
    return UNSPECIFIED, 1 if shorter_side >= 720 else 6


def rotation_of(display_matrix: Sequence[int]) -> tuple[bool, int] | None:
    """Return the rotation of a display matrix: whether to mirror first, and quarter turns counter-clockwise.

    Args:
        display_matrix: Nine numbers, row by row, in 16.16 fixed point: ``x' = x m0 + y m3``, ``y' = x m1 + y m4``, with
            y downwards.

    Returns:
        None if the rotation is not a multiple of 90°.

    Example:
        >>> rotation_of([0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30])
        (False, 1)
    """
    a, b, _, c, d, *_ = display_matrix
    mirrored = a * d - b * c < 0
    length = math.hypot(a, b) or 1.0
    if mirrored:
        length = -length
    direction = (round(a / length, 2), round(b / length, 2))
    quarter_turns = {(1.0, 0.0): 0, (0.0, -1.0): 1, (-1.0, 0.0): 2, (0.0, 1.0): 3}.get(direction)
    return None if quarter_turns is None else (mirrored, quarter_turns)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a video for reading."""
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


def _streams(container: Any, path: Path) -> tuple[Any, list[Any]]:
    """Return the video stream (not a cover picture), and the audio and subtitle streams."""
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        raise DerainError(f"{path}: contains no video stream; expected a video")
    if videos[0].codec_context is None:
        raise DerainError(f"{path}: PyAV has no decoder for its video stream; re-encode the video as H.264")
    videos[0].thread_type = "AUTO"
    return videos[0], [stream for stream in container.streams if stream.type in {"audio", "subtitle"}]


def _frame_count(container: Any, stream: Any) -> int:
    """Return the expected number of frames, for the progress bar."""
    seconds = (container.duration or 0) / MICROSECONDS
    return max(1, int(stream.frames or seconds * float(stream.average_rate or 25)))


def _read(frame: Any, video_format: VideoFormat, path: Path) -> Frame:
    """Return a frame as upright RGB."""
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
    upright = np.rot90(rgb, video_format.quarter_turns)
    return np.ascontiguousarray(upright).astype(np.float32) / np.float32(255)


def _with_even_sides(pixels: Pixels) -> Pixels:
    """Return pixels with even sides: a white row or column is appended to an odd side."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


class _FrameReader:
    """Iterator over the frames of a video in display order; packets of other streams are copied to the writers.

    Args:
        container: The video.
        stream: Its video stream.
        copied_streams: Audio and subtitle streams.
        path: Name of the file in messages.
        writers: Receive the packets of the copied streams.
    """

    def __init__(
        self, container: Any, stream: Any, copied_streams: list[Any], path: Path, writers: list[Writer]
    ) -> None:
        self.container, self.stream, self.copied_streams = container, stream, copied_streams
        self.path, self.writers = path, writers
        self.early_packets: list[tuple[Any, int]] = []
        self.frames = self.damaged = 0
        self.error = ""
        self.end = Fraction(0)

    def __iter__(self) -> Iterator[Any]:
        for packet in self._packets():
            if packet is not None and packet.stream_index != self.stream.index:
                self._copy(packet, packet.stream_index)
                continue
            for frame in self._decode(packet):
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
        import av

        try:
            return list(self.stream.decode(packet))
        except av.FFmpegError:
            self.damaged += 1
            return []

    def _copy(self, packet: Any, index: int) -> None:
        if self.frames == 0:
            self.early_packets.append((packet, index))
        for writer in self.writers:
            writer.copy(packet, index)

    def copy_early_packets(self, writer: Writer) -> None:
        """Copy the packets before the first frame to a writer that was opened after these."""
        for packet, index in self.early_packets:
            writer.copy(packet, index)

    def report_damage(self) -> None:
        """Warn if the video is truncated or frames were skipped.

        Raises:
            DerainError: If no frame was decoded.
        """
        if not self.frames:
            raise DerainError(f"{self.path}: no frame can be decoded; expected an undamaged video")
        start = (self.container.start_time or 0) / MICROSECONDS
        if self.error:
            log.warning("%s: truncated at %.1f s (%s); restored the readable part", self.path, self.end, self.error)
        elif self.container.duration is not None:
            duration = self.container.duration / MICROSECONDS
            end = float(self.end) - start
            if duration - end > max(0.2, duration / 100):
                log.warning("%s: truncated at %.1f of %.1f s; restored the readable part", self.path, end, duration)
        if self.damaged:
            log.warning("%s: skipped %d damaged frames", self.path, self.damaged)
