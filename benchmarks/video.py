"""Videos: threads for decoding, restoring and encoding against a plain loop, and fused frames against single ones.

``video.py [--height 176] [--frames 9] [--temporal 2] [--rain heavy] [--weights W …] [--rounds 3]`` prints

- the frames per second of ``rewrite``, and of a plain loop that decodes, changes and encodes one frame after the other;
  a pause of 15 ms stands for a network on another device;
- the PSNR of frames that are restored one by one, and of the same frames fused with their neighbours, for a pan, a
  zoom, a static scene and an object that moves over a pan; for the static scene also the flicker, and for the object
  the PSNR in its area. Photos are those of scikit-image; the streaks of each frame are drawn anew.

Targets, against frames that are restored one by one: a gain of 1 dB on average, at most half the flicker in the static
scene, and no lower PSNR in the area of the object.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data

from derain.data.rain import PRESETS, add_rain, sample_rain
from derain.images import Pixels
from derain.metrics import flicker
from derain.restoration import Restorer
from derain.video import Picture, fuse_neighbours, rewrite

Mask = NDArray[np.bool_]


def view(photo: Pixels, size: tuple[int, int], count: int, dx: float, dy: float, zoom: float) -> list[Pixels]:
    """Return the frames of a camera that moves over a photo.

    Args:
        photo: The photo.
        size: Height and width of the frames in pixels.
        count: Number of frames.
        dx: Pixels to the right per frame.
        dy: Pixels down per frame.
        zoom: Magnification per frame.
    """
    height, width = size
    scale = 1.25 * max(height / photo.shape[0], width / photo.shape[1])
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    frames = []
    for index in range(count):
        size_factor = zoom**index
        x = photo.shape[1] / 2 + dx * (index - count / 2) - width / 2 / size_factor
        y = photo.shape[0] / 2 + dy * (index - count / 2) - height / 2 / size_factor
        matrix = np.array([[1 / size_factor, 0, x], [0, 1 / size_factor, y]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpAffine(photo, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101))
    return frames


def add_object(frames: list[Pixels], texture: Pixels, speed: float) -> tuple[list[Pixels], list[Mask]]:
    """Return frames with a textured disc that moves to the right, and masks of the disc."""
    height, width = frames[0].shape[:2]
    rows, columns = np.mgrid[:height, :width]
    moved, masks = [], []
    for index, frame in enumerate(frames):
        x, y = 0.2 * width + speed * index, 0.5 * height + index
        mask = np.hypot(columns - x, rows - y) < height / 5
        matrix = np.array([[1, 0, x - texture.shape[1] / 2], [0, 1, y - texture.shape[0] / 2]])
        disc = cv2.warpAffine(texture, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        moved.append(np.where(mask[..., None], disc, frame))
        masks.append(mask)
    return moved, masks


def scenes(size: tuple[int, int], count: int) -> dict[str, tuple[list[Pixels], list[Mask]]]:
    """Return the frames of each scene, and masks of the area of the object; without an object, of everything."""
    whole = [np.ones(size, bool)] * count
    background = view(data.rocket(), size, count, 1.3, 0, 1)
    return {
        "pan": (view(data.astronaut(), size, count, 3.3, 1.2, 1), whole),
        "zoom": (view(data.coffee(), size, count, 0, 0, 1.02), whole),
        "static": (view(data.chelsea(), size, count, 0, 0, 1), whole),
        "object": add_object(background, data.chelsea(), 6.3),
    }


def psnr(frames: list[Pixels], clean: list[Pixels], masks: list[Mask]) -> float:
    """Return the mean PSNR in dB within masks."""
    errors = [((a.astype(float) - b)[mask] ** 2).mean() for a, b, mask in zip(frames, clean, masks, strict=True)]
    return statistics.mean(10 * np.log10(255**2 / max(error, 1e-9)) for error in errors)


def quality(weights: str, rain: str, size: tuple[int, int], count: int, reach: int) -> bool:
    """Print quality with and without fusion; return whether a target is missed."""
    restorer = Restorer(weights, device="cpu")
    gains, missed = [], False
    for name, (clean, masks) in scenes(size, count).items():
        rng = np.random.default_rng(3)
        parameters = sample_rain(*PRESETS[rain], rng)
        derained = restorer([add_rain(frame, parameters, rng) for frame in clean])
        fused = list(fuse_neighbours(iter(derained), reach))
        whole = [np.ones(size, bool)] * count
        before, after = psnr(derained, clean, whole), psnr(fused, clean, whole)
        gains.append(after - before)
        line = f"{name:7} {before:.2f} to {after:.2f} dB ({after - before:+.2f})"
        if name == "static":
            ratio = flicker(fused) / flicker(derained)
            line += f"; flicker {ratio:.2f} of {flicker(derained):.2f} levels"
            missed |= ratio > 0.5
        if name == "object":
            inside = psnr(fused, clean, masks) - psnr(derained, clean, masks)
            line += f"; in the area of the object {inside:+.2f} dB"
            missed |= inside < 0
        print(line, flush=True)
    print(f"{weights}, {rain} rain: mean gain {statistics.mean(gains):+.2f} dB", flush=True)
    return missed or statistics.mean(gains) < 1


def one_after_the_other(source: Path, target: Path, change: object) -> None:
    """Decode, change and encode each frame before the next."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = written.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.height, stream.width = read.streams.video[0].height, read.streams.video[0].width
        stream.pix_fmt = "yuv420p"
        for frame in read.decode(video=0):
            (pixels,) = change(iter([Picture(frame.to_ndarray(format="rgb24"), "frame")]))  # type: ignore[operator]
            new = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            new.pts, new.time_base = frame.pts, frame.time_base
            written.mux(stream.encode(new))
        written.mux(stream.encode())


def speed(rounds: int, count: int) -> None:
    """Print the frames per second of both forms, at 640×480: the fastest of several rounds in alternation."""

    def wait(frames: Iterator[Picture]) -> Iterator[Pixels]:  # as a network on a GPU
        for frame in frames:
            time.sleep(0.015)
            yield 255 - frame.pixels

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with av.open(str(folder / "in.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 480, 640, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 25)
            for frame in view(data.astronaut(), (480, 640), count, 3, 1, 1):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        times: dict[str, list[float]] = {"one after the other": [], "derain": []}
        for _ in range(rounds):
            for label, function in (("one after the other", one_after_the_other), ("derain", rewrite)):
                start = time.perf_counter()
                function(folder / "in.mp4", folder / "out.mp4", wait)
                times[label].append(time.perf_counter() - start)
    plain, overlapped = min(times["one after the other"]), min(times["derain"])
    print("640×480, 15 ms per frame on another device, frames per second: ", end="")
    print(f"{count / plain:.1f} one after the other, {count / overlapped:.1f} by derain")


def main() -> int:
    """Print speed and quality; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=176, help="height of the frames in pixels; width: 16/11 of it")
    parser.add_argument("--frames", type=int, default=9, help="frames of each scene")
    parser.add_argument("--temporal", type=int, default=2, help="neighbours before and after a frame to fuse")
    parser.add_argument("--rain", choices=list(PRESETS), default="heavy")
    parser.add_argument("--weights", nargs="+", default=["default"], help="bundled models or weights files")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the speed")
    options = parser.parse_args()
    speed(options.rounds, 100)
    size = (options.height, options.height * 16 // 11)
    missed = [quality(weights, options.rain, size, options.frames, options.temporal) for weights in options.weights]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
