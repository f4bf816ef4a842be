"""Small generated data sets of every layout, photos of scikit-image, a small CLIP and a small BLIP."""

import gzip
import importlib.metadata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from derain.data.layouts import LAYOUTS, Split
from derain.images import Pixels
from tests.trees import file_names


def clean_image(seed: int, size: tuple[int, int] = (48, 64)) -> Pixels:
    """Return a smooth image with edges, ``(h, w, 3)`` in 0 to 220, determined by the seed."""
    rng = np.random.default_rng(seed)
    h, w = size
    coarse = rng.uniform(30, 200, (4, 5, 3)).astype(np.float32)
    image = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        x, y = (int(rng.integers(0, n)) for n in (w, h))
        x2, y2 = (int(rng.integers(0, n)) for n in (w, h))
        colour = tuple(float(value) for value in rng.uniform(10, 220, 3))
        cv2.rectangle(image, (x, y), (x2, y2), colour, -1)
    return np.clip(image, 0, 220).astype(np.uint8)


def add_rain(clean: Pixels, seed: int, share: float = 0.06) -> Pixels:
    """Return an image with short bright streaks."""
    rng = np.random.default_rng(seed)
    h, w = clean.shape[:2]
    rainy = clean.astype(np.int16)
    layer = np.zeros((h, w), np.uint8)
    for _ in range(max(3, int(share * h * w / 8))):
        x, y = int(rng.integers(0, w)), int(rng.integers(0, h))
        cv2.line(layer, (x, y), (x + 2, y + 8), int(rng.integers(60, 120)), 1)
    return np.clip(rainy + layer[..., None], 0, 255).astype(np.uint8)


def make_set(
    root: Path,
    name: str,
    split: Split,
    count: int = 4,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
    *,
    variant: int = 0,
) -> Path:
    """Write a small data set in the layout of a public one, and return its folder.

    Args:
        root: Data root; the folder of the data set is created below it.
        name: Name of the layout; ``folder`` and ``images`` get a folder of this name.
        split: Split to write.
        count: Number of clean images.
        size: Height and width of an image.
        seed: Seed of the images; the clean image of pair ``i`` is ``clean_image(seed + i, size)``.
        variant: Index of the variant, for data sets that exist in several.
    """
    folder = root / (LAYOUTS[name].folders[0] if LAYOUTS[name].folders else name)
    for index, (rainy_name, clean_name) in enumerate(file_names(name, split, count)[variant]):
        clean_index = int(clean_name.rpartition("#")[2]) if "#" in clean_name else index
        clean_name = clean_name.partition("#")[0]
        clean = clean_image(seed + clean_index, size)
        rainy = add_rain(clean, 10_000 + seed + index)
        if clean_name in {"left", "right"}:
            halves = [clean, rainy] if clean_name == "left" else [rainy, clean]
            save(folder / rainy_name, np.concatenate(halves, axis=1))
            continue
        save(folder / rainy_name, rainy)
        if clean_name and not (folder / clean_name).exists():
            save(folder / clean_name, clean)
    return folder


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if path.suffix == ".jpg":
        image.save(path, quality=95, subsampling=0)
    else:
        image.save(path, compress_level=1)


def located(path: Path) -> Path:
    """Write a photo of 30 × 20 pixels with date and GPS position in its EXIF."""
    exif = Image.Exif()
    exif[0x0132] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 17.0, 40.0)})
    Image.fromarray(clean_image(1, (20, 30))).save(path, exif=exif)
    return path


def photo(name: str) -> Pixels:
    """A freely licensed photo of scikit-image: astronaut, chelsea, coffee, rocket, motorcycle_left."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    file = next(path for path in folder.iterdir() if path.stem == name)
    return np.asarray(Image.open(file).convert("RGB"))


def make_video(
    path: Path,
    frames: Sequence[Pixels],
    *,
    times: Sequence[int] | None = None,
    base: Fraction = Fraction(1, 12800),
    degrees: float = 0,
    mirrored: bool = False,
    sound: Sequence[str] = (),
    pixels: str = "yuv444p",
    tags: tuple[int, int, int, int] = (6, 1, 6, 6),
    codec: str = "libx264",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes a video almost without loss, ten frames a second, with sine tones as sound, and returns its path.

    Args:
        path: Its ending says the container.
        frames: Of one size.
        times: Of the frames, in units of ``base``.
        base: The time base.
        degrees: To be turned counter-clockwise when shown.
        mirrored: To be mirrored from left to right when shown, after it was turned.
        sound: Encoders, one a track.
        pixels: Pixel format.
        tags: Colour matrix, range, transfer function, primaries.
        codec: Encoder.
        metadata: Of the container.
    """
    import av

    height, width = frames[0].shape[:2]
    times = times or [int(i / base / 10) for i in range(len(frames))]
    quality = {"crf": "1"} if codec == "libx264" else {"crf": "4", "b": "0"}
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        container.metadata.update(metadata or {})
        video = container.add_stream(codec, rate=10, options=quality)
        video.height, video.width, video.pix_fmt, video.codec_context.time_base = height, width, pixels, base
        names = ("colorspace", "color_range", "color_trc", "color_primaries")
        for name, tag in zip(names, tags, strict=True):
            setattr(video.codec_context, name, tag)
        if degrees or mirrored:
            video.set_display_rotation(degrees, hflip=mirrored)
        tracks = [container.add_stream(encoder, rate=48000, layout="mono") for encoder in sound]
        for time, rgb in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(
                format=pixels,
                dst_colorspace={6: 5}.get(tags[0], tags[0]),
                src_color_range=2,
                dst_color_range=tags[1],
                interpolation="BICUBIC",
            )
            for name, tag in zip(names, tags, strict=True):
                setattr(frame, name, tag)
            frame.pts, frame.time_base = time, base
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for place, track in enumerate(tracks):
            tone = np.sin(np.arange(48000 * len(frames) // 10) * 2 * np.pi * 220 * (place + 1) / 48000)
            wave = av.AudioFrame.from_ndarray((tone * 20000).astype(np.int16)[None], format="s16", layout="mono")
            wave.rate, wave.pts = 48000, 0
            container.mux(track.encode(wave))
            container.mux(track.encode())
    return path


def make_clip(folder: Path, seed: int = 0, size: int = 8, **vision: int) -> Path:
    """Writes a tiny random CLIP with CLIP's vocabulary, as ``save_pretrained`` does, and returns its folder.

    Args:
        folder: Where to.
        seed: Of the weights.
        size: Of the embeddings.
        vision: What differs in the vision tower, such as ``patch_size``.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    file = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(Path(file).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves come first
    letters = [*map(chr, shown), *map(chr, range(256, 512 - len(shown)))]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge.split()) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=size))
    pairs = [tuple(merge.split()) for merge in merges]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def clip_view(image: Any) -> Any:
    """Return an image (Pillow's or a tensor) resized and cropped as CLIP's authors and open_clip do, by torchvision."""
    from torchvision.transforms import v2

    resize = v2.Resize(224, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.CenterCrop(224)(resize(image))


def make_blip(folder: Path, seed: int = 2) -> Path:
    """Writes a tiny random BLIP with a tiny vocabulary, as its authors' is laid out, and returns its folder."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a the man dog street house with on of at night red : tree ##s ##ed ' s , ."
    vocabulary = {word: i for i, word in enumerate(words.split())}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    start = len(vocabulary)  # it is no word, as in the authors'
    text = {"vocab_size": start + 2, "bos_token_id": start, "sep_token_id": 3, "eos_token_id": 2, "pad_token_id": 0}
    lively = {"initializer_range": 0.2}  # as large as to give every image a caption of its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = tower | lively | {"image_size": 32, "patch_size": 16}
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=tower | lively | text, vision_config=vision, **lively)
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
