"""Videos: their frames are changed; times, sound, subtitles, chapters and tags are handed back as they were."""

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError
from derain.images import Pixels, replacing, to_bytes
from derain.pictures import compare
from derain.progress import track

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv"}
)
"""File names that count as videos, in lower case."""

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

Frame = NDArray[np.float32]
"""An upright frame, ``(h, w, 3)`` in [0, 1]."""

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
        _Writer(io.BytesIO(), target, look(source), (2, 2), stream, others, 18, source).close(whole=False)


def rewrite(
    source: Path, target: Path, change: Callable[[Frame], Frame], *, crf: int = 18, beside: Path | None = None
) -> None:
    """Writes a video with changed frames: whole or not at all, upright, each frame at its time, sound as it was.

    Of a video that breaks off, what is there is written, and a warning says so.

    Args:
        source: The video.
        target: Its ending says the container.
        change: Gives a frame of the same size.
        crf: Quality as x264 counts it, the smaller the better.
        beside: Also write a video that shows both side by side.

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

        def writer(path: Path, size: tuple[int, int]) -> _Writer:
            temporary = stack.enter_context(replacing(path))
            return stack.enter_context(_Writer(temporary, path, first, size, stream, others, crf, source))

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
        raise DerainError(f"{path}: not a video that can be read ({_reason(error)}); give a whole video") from error
    with container:
        yield container


def _reason(error: Any) -> str:
    return str(error.strerror or type(error).__name__)


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
        rgb = frame.reformat(format="rgb24", interpolation=_exactly(), **there).to_ndarray()
    upright = np.rot90(rgb[:, ::-1] if first.mirrored else rgb, first.quarters)
    return np.ascontiguousarray(upright).astype(np.float32) / np.float32(255)


def _exactly() -> Any:
    """Bicubic chroma, and no short cuts in arithmetic."""
    from av.video.reformatter import Interpolation as By

    return By.BICUBIC | By.ACCURATE_RND | By.FULL_CHR_H_INT | By.FULL_CHR_H_INP


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

    def __init__(self, container: Any, stream: Any, others: list[Any], path: Path, writers: list["_Writer"]) -> None:
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
                self.broken = _reason(error)
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

    def catch_up(self, writer: "_Writer") -> None:
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


class _Writer:
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

    def add(self, pixels: Pixels, like: Any) -> None:
        """Adds a frame, at the time of another one."""
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        reach = FULL if self.first.full else LIMITED
        there = {"dst_colorspace": MATRICES[self.first.matrix], "src_color_range": FULL, "dst_color_range": reach}
        frame = frame.reformat(format=self.video.pix_fmt, interpolation=_exactly(), **there)
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
            raise DerainError(f"{self.target}: could not be written ({_reason(error)})") from error

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
                raise DerainError(f"{self.target}: could not be written ({_reason(error)})") from error

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(whole=error[0] is None)


KEPT_BY_FORMAT = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "ENCODER", "DURATION"})
"""What a container says of itself rather than of its content."""
