"""Train a bundled model on one core: ``python experiments/default_model.py DATA OUT [--width 32] [--steps 18500]``.

``DATA`` contains Rain800, the test sets, and the measured streaks in ``Streaks``. On average, 40 % of the crops are of
Rain800's own pairs; the others are clean crops, most of them with the rain of ``default_rain.py``. Training images are
skipped if `derain data verify` finds their background in a test set or in another training set. Up to 24 images whose
background occurs only once are used for validation.

``OUT`` receives the state of the training every ten minutes; the same command resumes it. At the end,
``OUT/weights.safetensors`` has the averaged weights. ``--weights FILE`` starts from weights, keeps their architecture,
and uses the larger crops only; ``--refinement N`` then adds an untrained refinement. ``--without KIND`` omits a kind of
rain in training, to measure how the model removes rain that it was not trained on.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from default_rain import WITHOUT_RAIN, Crop, RainPairs, Rng, lamplight, log_uniform
from numpy.typing import NDArray
from torch import Tensor

from derain.data.pairs import find_pairs
from derain.data.verify import verify
from derain.errors import DerainError
from derain.methods import RegressionModule
from derain.networks.nafnet import NAFNet
from derain.progress import track

SHARES = {"measured": 0.25, "noise": 0.21, "drawn": 0.21, "fine": 0.22, "hard": 0.11}
"""Share of each kind of rain of `RainPairs`."""

MAX_VALIDATION = 24
"""Maximum number of photos for validation."""

OWN_PAIRS = 0.4
"""Probability that a crop is of Rain800's own pairs."""

DARKER = 0.3
"""Share of the crops of own pairs that are chosen among the pairs whose rainy image is darker than the clean one."""

TRAINED_ON = ("Rain800 without leaks", "synthetic rain", "measured streaks")
"""Training data as the weights file names them."""

REDUCED = 0.5
"""Share of the crops with new rain that are reduced 1.3 to 3 times after the rain, like photos on web pages."""

OWN_REDUCED = 0.25
"""Share of the crops of Rain800's own pairs that are reduced, up to 2 times."""

SQUARES = 8.0
"""Weight of the squared error in the loss; that of the absolute error is 1."""

SAVE_SECONDS = 600
"""Seconds between two saved states."""


@dataclass
class Photo:
    """A clean image and its own rainy version, ``(h, w, 3)`` uint8."""

    clean: NDArray[np.uint8]
    rainy: NDArray[np.uint8]

    @property
    def is_darker(self) -> bool:
        """Whether the rainy image is darker than the clean one, on average."""
        return bool(self.rainy.mean() < self.clean.mean())


def read_photos(data: Path) -> tuple[list[Photo], list[Photo]]:
    """Return photos for training and for validation, without backgrounds of test sets or other training sets.

    Raises:
        DerainError: If Rain800 is not found, or an image cannot be read.
    """
    pairs = find_pairs("Rain800", "train", data_root=data).pairs
    found: dict[str, set[Path]] = {kind: set() for kind in ("leak", "shared", "duplicate")}
    for finding in verify(data)[1]:
        if finding.kind in found:
            found[finding.kind] |= {Path(file).resolve() for file in finding.files}
    kept = [pair for pair in pairs if pair.rainy.resolve() not in found["leak"] | found["shared"]]
    single = [pair for pair in kept if pair.rainy.resolve() not in found["duplicate"]]
    held_out = set(single[:: max(1, len(single) // MAX_VALIDATION)][:MAX_VALIDATION])
    training, validation = [], []
    for pair in track(kept, "Reading", len(kept)):
        rainy, clean = pair.read()
        (validation if pair in held_out else training).append(Photo(clean, rainy))
    skipped = f"{len(pairs) - len(kept)} skipped: their backgrounds are in other sets"
    print(f"{len(training)} photos for training, {len(validation)} for validation; {skipped}")
    return training, validation


class Crops:
    """Random training pairs, determined by the arguments and the number of the step.

    Args:
        photos: Photos for training.
        rain: Makes pairs from clean crops.
    """

    def __init__(self, photos: list[Photo], rain: RainPairs) -> None:
        self.photos, self.rain = photos, rain
        self.darker = [photo for photo in photos if photo.is_darker]

    def batch(self, step: int, count: int, side: int) -> tuple[Tensor, Tensor]:
        """Return rainy and clean crops, ``(count, 3, side, side)`` in [0, 1]."""
        rng = np.random.default_rng([0, step])
        pairs = [self._own(rng, side) if rng.random() < OWN_PAIRS else self._new(rng, side) for _ in range(count)]
        rainy, clean = (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) for crops in zip(*pairs, strict=True))
        return rainy, clean

    def _own(self, rng: Rng, side: int) -> tuple[Crop, Crop]:
        """Return a crop of one of Rain800's own pairs, rainy and clean."""
        is_darker = bool(self.darker) and rng.random() < DARKER
        photos = self.darker if is_darker else self.photos
        photo = photos[rng.integers(len(photos))]
        scale = log_uniform(rng, 1.0, 2.0) if rng.random() < OWN_REDUCED else 1.0
        rainy, clean = random_crop([photo.rainy, photo.clean], rng, side, scale)
        return (rainy[:, ::-1], clean[:, ::-1]) if rng.random() < 0.5 else (rainy, clean)

    def _new(self, rng: Rng, side: int) -> tuple[Crop, Crop]:
        """Return a clean crop with new rain, and the clean crop."""
        scale = log_uniform(rng, 0.6, 2.2) if rng.random() < 0.5 else 1.0
        rain_side = int(side * log_uniform(rng, 1.3, 3.0)) if rng.random() < REDUCED else side
        (clean,) = random_crop([self.photos[rng.integers(len(self.photos))].clean], rng, rain_side, scale)
        clean = clean[:, ::-1] if rng.random() < 0.5 else clean
        clean = clean.transpose(1, 0, 2) if rng.random() < 0.3 else clean
        return self.rain.pair(np.ascontiguousarray(clean), rng, side)


def random_crop(images: list[NDArray[np.uint8]], rng: Rng, side: int, scale: float = 1.0) -> list[Crop]:
    """Return the same square crop of several images of equal size, resized to ``side`` pixels.

    Before it is resized, its side is ``scale`` times ``side``, at least 16, and at most the shorter side of the images.
    """
    height, width = images[0].shape[:2]
    crop_side = max(16, min(int(side * scale), height, width))
    top, left = rng.integers(height - crop_side + 1), rng.integers(width - crop_side + 1)
    crops = [image[top : top + crop_side, left : left + crop_side] for image in images]
    if crop_side != side:
        interpolation = cv2.INTER_AREA if crop_side > side else cv2.INTER_CUBIC
        crops = [cv2.resize(crop, (side, side), interpolation=interpolation) for crop in crops]
    return [crop.astype(np.float32) / 255 for crop in crops]


@torch.inference_mode()
def validate(network: NAFNet, photos: list[Photo], rain: RainPairs, without: str | None) -> dict[str, float]:
    """Return the mean PSNR in dB in RGB by kind of rain.

    Besides the kinds of `RainPairs`, ``own`` is the rain of Rain800, ``reduced`` is rain that is added at twice the
    size and then reduced, ``night`` is rain on photos lit by lamps, and ``none`` stands for clean photos.

    Args:
        network: The network.
        photos: Photos for validation.
        rain: Adds rain to clean photos.
        without: Kind of rain that is omitted in training, but not in validation; None if all kinds are trained on.
    """
    kinds = ["own", *rain.shares, *([without] if without else []), "reduced", "night", "none"]
    scores = {kind: [_psnr(network, photo, rain, kind, index) for index, photo in enumerate(photos)] for kind in kinds}
    return {kind: float(np.mean(values)) for kind, values in scores.items()}


def _psnr(network: NAFNet, photo: Photo, rain: RainPairs, kind: str, index: int) -> float:
    clean = photo.clean.astype(np.float32) / 255
    rainy = clean
    if kind == "own":
        rainy = photo.rainy.astype(np.float32) / 255
    elif kind == "reduced":
        large = cv2.resize(clean, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC).clip(0, 1)
        added = rain.add_rain(large, np.random.default_rng([7, index])) - large
        rainy = np.clip(clean + cv2.resize(added, clean.shape[1::-1], interpolation=cv2.INTER_AREA), 0, 1)
    elif kind == "night":
        rng = np.random.default_rng([8, index])
        lamps = lamplight(clean.shape[:2], rng)
        clean = np.rint(clean * lamps * 255).clip(0, 255) / np.float32(255)
        rainy = rain.add_rain(clean, rng, lamps=lamps)
    elif kind != "none":
        rainy = rain.add_rain(clean, np.random.default_rng([7, index]), kind)
    rainy = np.rint(rainy * 255) / np.float32(255)
    derained = network(torch.from_numpy(rainy).permute(2, 0, 1)[None]).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return 10 * math.log10(1 / max(1e-10, float(np.square(derained - clean).mean())))


def build(options: argparse.Namespace) -> RegressionModule:
    """Return the module to train, with the weights of a file or random ones.

    Raises:
        DerainError: If the file has no weights of a `RegressionModule`, or if they have a refinement and one is to be
            added.
    """
    if options.weights:
        module = cast(RegressionModule, RegressionModule.from_pretrained(options.weights).train())
        return with_refinement(module, options.refinement) if options.refinement else module
    architecture: dict[str, Any] = {
        "width": options.width,
        "encoder_blocks": options.blocks,
        "middle_blocks": options.middle,
        "decoder_blocks": options.blocks,
        "kernel_size": 5,
        "unshuffle": 2,
        "refinement_layers": options.refinement,
    }
    return RegressionModule(network="NAFNet", network_options=architecture, loss="l1", learning_rate=options.rate)


def with_refinement(module: RegressionModule, layers: int) -> RegressionModule:
    """Return a module with the weights of a given one and an untrained refinement, which does not change its output.

    Raises:
        DerainError: If the given module has a refinement already.
    """
    if module.network.refinement is not None:
        raise DerainError("--refinement: these weights have a refinement; omit the option to keep it")
    architecture = module.hparams["network_options"] | {"refinement_layers": layers}
    larger = RegressionModule(network="NAFNet", network_options=architecture, loss="l1")
    larger.network.load_state_dict(larger.network.state_dict() | module.network.state_dict())
    return larger


def main(options: argparse.Namespace) -> None:
    """Train a model, or resume its training."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training, validation = read_photos(options.data)
    shares = {kind: share for kind, share in SHARES.items() if kind != options.without}
    streaks = sorted((options.data / "Streaks").glob("*.png"))
    crops = Crops(training, RainPairs(streaks, shares, options.without_rain))
    method = build(options)
    averaged_method = copy.deepcopy(method)
    network, averaged = method.network, averaged_method.network.eval().requires_grad_(False)
    large = [parameter for parameter in network.parameters() if parameter.numel() > 512]
    small = [parameter for parameter in network.parameters() if parameter.numel() <= 512]
    groups = [{"params": large, "weight_decay": 1e-3}, {"params": small, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.99))
    state_file, first_step = options.out / "state.pt", 0
    options.out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        print(f"{state_file}: resuming at step {first_step}")
    saved_at = time.monotonic()
    for step in track(range(first_step, options.steps), "Training", options.steps - first_step):
        progress = step / options.steps
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 200) * cosine
        crops_are_small = progress < 0.75 and not options.weights
        rainy, clean = crops.batch(step, 8, 96) if crops_are_small else crops.batch(step, 4, 144)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            derained = network(rainy)
        error = derained.float() - clean
        loss = error.abs().mean() + SQUARES * error.square().mean()
        if not loss.isfinite():
            raise DerainError(f"step {step}: the loss is {loss}; resume with a smaller --rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
        if time.monotonic() - saved_at > SAVE_SECONDS or step + 1 == options.steps:
            parts = {"network": network, "averaged": averaged, "optimizer": optimizer}
            content = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            torch.save(content, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
            scores = validate(averaged, validation, crops.rain, options.without)
            print(f"step {step + 1}: " + ", ".join(f"{kind} {score:.2f} dB" for kind, score in scores.items()))
            saved_at = time.monotonic()
    averaged_method.trained_on = TRAINED_ON
    averaged_method.save_weights(options.out / "weights.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("out", type=Path, help="folder of the training state and the weights")
    parser.add_argument("--width", type=int, default=32, help="channels at half resolution")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4], help="blocks by level, finest first")
    parser.add_argument("--middle", type=int, default=6, help="blocks at the coarsest level")
    parser.add_argument("--refinement", type=int, default=0, help="refinement layers at full resolution")
    parser.add_argument("--steps", type=int, default=18_500, help="steps, each of 8 crops of 96×96 or 4 of 144×144")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; slow without AVX-512 bf16")
    parser.add_argument("--weights", type=Path, help="file of weights to start from, with their architecture")
    parser.add_argument("--without-rain", type=float, default=WITHOUT_RAIN, help="share of new crops without rain")
    parser.add_argument("--without", choices=list(SHARES), help="kind of rain to omit in training")
    try:
        main(parser.parse_args())
    except DerainError as error:
        sys.exit(f"default_model: error: {error}")
