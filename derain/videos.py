"""Videos: their frames are changed; times, sound, subtitles, chapters and tags are handed back as they were."""

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
from derain.video_writer import FORMATS, FULL, LIMITED, MATRICES, UNSPECIFIED, Look, Writer, exactly, reason

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv"}
)
"""File names that count as videos, in lower case."""

Frame = NDArray[np.float32]
"""An upright frame, ``(h, w, 3)`` in [0, 1]."""

log = logging.getLogger("derain")


def crf_of(crf: int) -> int:
    """Checks ``--crf``.

    Raises:
        DerainError: If encoders know no such quality.
    """
    if not 0 <= crf <= 51:
        raise DerainError(f"--crf {crf}: must be from 0 (lossless) to 51 (worst); 18 shows no loss")
    return crf


def writable(path: Path) -> Path:
    """The name of a video that is read, with the ending of one that is written; other names stay.

    Example:
        >>> [writable(Path(name)).name for name in ("a.mts", "b.mkv", "c.jpg")]
        ['a.mp4', 'b.mkv', 'c.jpg']
    """
    suffix = path.suffix.lower()
    return path.with_suffix(".mp4") if suffix in SUFFIXES and suffix not in FORMATS else path


def check(source: Path, target: Path) -> None:
    """Refuses early what could not be read or written.

    Raises:
        DerainError: If ``source`` is no video, or ``target`` cannot hold what is in it.
    """
    with _opened(source) as container:
        stream, others = _streams(container, source)
        Writer(io.BytesIO(), target, look(source), (2, 2), stream, others, 18, source).close(whole=False)


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[Frame], Frame],
    *,
    crf: int = 18,
    beside: Path | None = None,
    metadata: bool = True,
) -> bool:
    """Writes a video with changed frames: whole or not at all, upright, each frame at its time, sound as it was.

    Of a video that breaks off, what is there is written, and a warning says so.

    Args:
        source: The video.
        target: Its ending says the container.
        change: Gives a frame of the same size.
        crf: Quality as x264 counts it, the smaller the better.
        beside: Also write a video that shows both side by side.
        metadata: Whether the tags of the video, such as time and location, are kept.

    Returns:
        Whether the location is among the tags that were kept.

    Raises:
        DerainError: If the video cannot be read, or the container cannot hold its sound.
    """
    first = look(source)
    if first.bits > 8:
        log.warning("%s: has %d bits a channel; 8 are written", source, first.bits)
    if first.interlaced:
        log.warning("%s: is interlaced and taken for whole frames; deinterlace it first for a better result", source)
    with ExitStack() as stack:
        container = stack.enter_context(_opened(source))
        stream, others = _streams(container, source)
        left = {one.type or "unknown" for one in container.streams if one not in [stream, *others]}
        if left - ({"data"} if container.chapters() else set()):  # MP4 keeps chapters in such a stream
            log.warning("%s: left out: streams of %s", source, ", ".join(sorted(left)))

        def writer(path: Path, size: tuple[int, int]) -> Writer:
            temporary = stack.enter_context(write_whole(path))
            made = stack.enter_context(Writer(temporary, path, first, size, stream, others, crf, source))
            if not metadata:
                made.forget()
            return made

        out = writer(target, (first.height, first.width))
        writers = [out]
        frames = _Reading(container, stream, others, source, writers)
        for frame in track(frames, "Frames", _count(container, stream)):
            rainy = _read(frame, first, source)
            changed = change(rainy)
            pixels = to_bytes(changed, f"{source}: frame {frames.frames}")
            out.add(pixels, frame)
            if beside is not None:
                picture = _even(np.asarray(compare({"rainy": to_bytes(rainy), "derained": pixels})))
                if len(writers) == 1:
                    writers.append(writer(beside, (picture.shape[0], picture.shape[1])))
                    frames.catch_up(writers[1])
                writers[1].add(picture, frame)
        frames.tell()
        for one in writers:
            one.finish()
        return any("location" in key.lower() for key in out.container.metadata)


def look(path: Path) -> Look:
    """Decodes the first frame and takes down how all of them are to be read.

    Raises:
        DerainError: If there is no frame, or it is turned by no quarter turn.
    """
    with _opened(path) as container:
        stream, _ = _streams(container, path)
        frame = next(iter(_Reading(container, stream, [], path, [])), None)
        if frame is None:
            raise DerainError(f"{path}: holds no frame that could be decoded; give a whole video")
        display = frame.side_data.get("DISPLAYMATRIX")
        aspect = Fraction(stream.sample_aspect_ratio or 1)
    upright = (False, 0) if display is None else turn(np.frombuffer(bytes(display), np.int32).tolist())
    if upright is None:
        raise DerainError(f"{path}: is to be shown turned by other than quarter turns; write it upright first")
    mirrored, quarters = upright
    height, width = (frame.width, frame.height) if quarters % 2 else (frame.height, frame.width)
    guessed = 1 if min(height, width) >= 720 else 6  # as players guess: BT.709 for HD, BT.601 else
    matrix = int(frame.colorspace) if int(frame.colorspace) in MATRICES else guessed
    told = int(frame.colorspace) if int(frame.colorspace) in MATRICES else UNSPECIFIED
    full = int(frame.color_range) == FULL or frame.format.name.startswith("yuvj")
    reach = FULL if full else int(frame.color_range)
    bits = max(component.bits for component in frame.format.components)
    tags = (told, reach, int(frame.color_trc), int(frame.color_primaries))
    aspect = 1 / aspect if quarters % 2 else aspect
    return Look(height, width, mirrored, quarters, matrix, full, tags, aspect, bits, bool(frame.interlaced_frame))


def turn(display: Sequence[int]) -> tuple[bool, int] | None:
    """Reads a display matrix: whether to mirror first, and how many quarters to turn counter-clockwise.

    Args:
        display: Nine numbers by rows in 16.16 fixed point, ``x' = x m0 + y m3``, ``y' = x m1 + y m4``, y downwards.

    Returns:
        None where it is no quarter turn.

    Example:
        >>> turn([0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30])
        (False, 1)
    """
    a, b, c, d = (display[place] for place in (0, 1, 3, 4))
    mirrored = a * d - b * c < 0
    length = math.hypot(a, b) * (-1 if mirrored else 1) or 1
    quarters = {(1.0, 0.0): 0, (0.0, -1.0): 1, (-1.0, 0.0): 2, (0.0, 1.0): 3}.get(
        (round(a / length, 2), round(b / length, 2))
    )
    return None if quarters is None else (mirrored, quarters)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a video for reading."""
    try:
        import av
    except ImportError as error:
        raise DerainError("videos need PyAV, which is not installed; run: pip install 'derain[video]'") from error
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; check the path") from error
    except av.FFmpegError as error:
        raise DerainError(f"{path}: not a video that can be read ({reason(error)}); give a whole video") from error
    with container:
        yield container


def _streams(container: Any, path: Path) -> tuple[Any, list[Any]]:
    """The stream of frames, no picture of a cover, and those of sound and subtitles."""
    from av.stream import Disposition

    videos = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not videos:
        raise DerainError(f"{path}: holds no pictures that move; give a video")
    if videos[0].codec_context is None:
        raise DerainError(f"{path}: this build of PyAV cannot decode its pictures; write it as H.264 first")
    videos[0].thread_type = "AUTO"
    return videos[0], [one for one in container.streams if one.type in {"audio", "subtitle"}]


def _count(container: Any, stream: Any) -> int:
    """How many frames there should be, for the progress."""
    seconds = (container.duration or 0) / 1_000_000
    return max(1, int(stream.frames or seconds * float(stream.average_rate or 25)))


def _read(frame: Any, first: Look, path: Path) -> Frame:
    """An upright frame as RGB."""
    turned = first.quarters % 2
    size = (frame.width, frame.height) if turned else (frame.height, frame.width)
    if size != (first.height, first.width):
        raise DerainError(f"{path}: its frames change their size on the way; cut it there first")
    if frame.format.is_rgb:
        rgb = frame.to_ndarray(format="rgb24")
    else:
        reach = FULL if first.full else LIMITED
        there = {"src_colorspace": MATRICES[first.matrix], "src_color_range": reach, "dst_color_range": FULL}
        rgb = frame.reformat(format="rgb24", interpolation=exactly(), **there).to_ndarray()
    upright = np.rot90(rgb[:, ::-1] if first.mirrored else rgb, first.quarters)
    return np.ascontiguousarray(upright).astype(np.float32) / np.float32(255)


def _even(pixels: Pixels) -> Pixels:
    """White below and to the right where a side is odd."""
    return np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), constant_values=255)


class _Reading:
    """Frames of a video in the order they are shown; what lies between them goes to the writers as it is.

    Args:
        container: The video.
        stream: Its frames.
        others: Streams that are copied.
        path: For messages.
        writers: Take the packets of the other streams.
    """

    def __init__(self, container: Any, stream: Any, others: list[Any], path: Path, writers: list["Writer"]) -> None:
        self.container, self.stream, self.others, self.path, self.writers = container, stream, others, path, writers
        self.early: list[tuple[Any, int]] = []
        self.frames = self.damaged = 0
        self.broken = ""
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
        """Packets as far as the file goes, then None, which asks for what the decoder holds back."""
        import av

        packets = self.container.demux([self.stream, *self.others])
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.FFmpegError as error:  # the file is cut off within a packet
                self.broken = reason(error)
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
            self.early.append((packet, index))
        for writer in self.writers:
            writer.copy(packet, index)

    def catch_up(self, writer: "Writer") -> None:
        """Gives a writer that came with the first frame what came before it."""
        for packet, index in self.early:
            writer.copy(packet, index)

    def tell(self) -> None:
        """Warns of what is missing or was left out.

        Raises:
            DerainError: If nothing was left to restore.
        """
        if not self.frames:
            raise DerainError(f"{self.path}: no frame could be decoded; give a whole video")
        start, duration = self.container.start_time or 0, self.container.duration
        if self.broken:
            log.warning("%s: breaks off at %.1f s (%s); what is there was restored", self.path, self.end, self.broken)
        elif duration is not None:
            last, whole = float(self.end) - start / 1_000_000, duration / 1_000_000
            if whole - last > max(0.2, whole / 100):
                log.warning("%s: breaks off at %.1f of %.1f s; what is there was restored", self.path, last, whole)
        if self.damaged:
            log.warning("%s: %d frames are damaged and were left out", self.path, self.damaged)
