"""Rewrite videos: frames are changed; times, sound, subtitles, chapters and tags are copied."""

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from derain.errors import DerainError
from derain.images import Pixels, write_whole
from derain.pictures import compare
from derain.progress import track

from .overlap import Change, Frame, Picture, overlap
from .reading import (
    FrameReader,
    frame_count,
    open_video,
    read_format,
    select_streams,
    warn_of_losses,
    warn_of_skipped_streams,
)
from .writing import Writer

log = logging.getLogger("derain")


@dataclass(frozen=True)
class VideoOptions:
    """How videos are encoded.

    Attributes:
        crf: Quality from 0 (best) to 51 (worst), converted to the encoder's own measure of quality. So equal values
            give different qualities with different encoders. With libx264, 0 is lossless except for the conversion of
            colours.
        encoder: Name of an encoder of FFmpeg, a key of ``ENCODERS``; None for the first of ``DEFAULT_ENCODERS`` that
            the container supports: libx264, in WebM libvpx-vp9, unless FFmpeg lacks it.
        metadata: Whether to copy the tags of the file and its streams, such as time and location; chapters and the
            languages of streams are always copied.

    Raises:
        DerainError: If ``crf`` is out of range.
    """

    crf: int = 18
    encoder: str | None = None
    metadata: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise DerainError(f"--crf {self.crf}: expected 0 (best) to 51 (worst); 18 looks lossless")


def check(source: Path, target: Path, options: VideoOptions = VideoOptions()) -> None:
    """Check that a video can be read and its restored copy can be written, without writing a file.

    Args:
        source: The video.
        target: The new video; its suffix selects the container.
        options: How the new video is to be encoded.

    Raises:
        DerainError: If ``source`` is not a readable video, its rotation or colour matrix is not supported, the
            container of ``target`` cannot be written or does not support the sound, or the encoder is not available.
    """
    with open_video(source) as container:
        stream, copied_streams = select_streams(container, source)
        video_format = read_format(source)
        size = (256, 256) if options.encoder else (2, 2)  # encoders in hardware have a minimum size
        writer = Writer(
            io.BytesIO(), target, video_format, size, stream, copied_streams, options.crf, options.encoder, source
        )
        writer.close(complete=False)


def rewrite(
    source: Path,
    target: Path,
    change: Change,
    *,
    options: VideoOptions = VideoOptions(),
    beside: Path | None = None,
) -> bool:
    """Write a video with changed, upright frames and the times and sound of the source; after an error, write none.

    Frames are decoded, changed and encoded at the same time, and memory does not grow with the length of the video. If
    the source is truncated, its readable part is written, with a warning.

    Args:
        source: The video.
        target: The new video; its suffix selects the container.
        change: Function that changes the frames, see `Change`.
        options: How the new video is encoded.
        beside: File for another video that shows source and result side by side; None for no such video.

    Returns:
        Whether the copied tags include a location.

    Raises:
        DerainError: As by `check`; also if the size of the frames changes, or a file cannot be written.
    """
    video_format = read_format(source)
    warn_of_losses(video_format, source)
    size = (video_format.height, video_format.width)
    with ExitStack() as stack:
        container = stack.enter_context(open_video(source))
        stream, copied_streams = select_streams(container, source)
        warn_of_skipped_streams(container, [stream, *copied_streams], source)

        def open_writer(path: Path, size: tuple[int, int]) -> Writer:
            temporary = stack.enter_context(write_whole(path))
            writer = Writer(
                temporary, path, video_format, size, stream, copied_streams, options.crf, options.encoder, source
            )
            stack.enter_context(writer)
            if not options.metadata:
                writer.drop_tags()
            return writer

        writers = [open_writer(target, size)]
        if beside is not None:
            blank = np.zeros((*size, 3), np.uint8)
            writers.append(open_writer(beside, side_by_side(blank, blank).shape[:2]))
        reader = FrameReader(container, stream, copied_streams, source)
        written = 0

        def write(frame: Frame, pixels: Pixels | None) -> None:
            nonlocal written
            for writer in writers:
                for packet in frame.packets:
                    writer.copy(packet)
            if pixels is None or frame.pixels is None:
                return
            writers[0].add(pixels, frame.pts, frame.duration)
            if beside is not None:
                writers[1].add(side_by_side(frame.pixels, pixels), frame.pts, frame.duration)
            written += 1

        def tracked(pictures: Iterator[Picture]) -> Iterator[Pixels]:
            return change(track(pictures, "Frames", frame_count(container, stream)))

        try:
            overlap(reader.upright(video_format), tracked, write)
        except KeyboardInterrupt:
            log.warning("%s: interrupted after %d frames; nothing is written to %s", source, written, target)
            raise
        reader.report_damage()
        for writer in writers:
            writer.finish()
        return any("location" in key.lower() for key in writers[0].container.metadata)


def side_by_side(rainy: Pixels, derained: Pixels) -> Pixels:
    """Return a labelled comparison of two frames; an odd height or width is made even by a white row or column."""
    picture = np.asarray(compare({"rainy": rainy, "derained": derained}))
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
