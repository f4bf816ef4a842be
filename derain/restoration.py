"""Weights in, rainy image of any size in, clean image out."""

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from derain.errors import DerainError
from derain.memory import free_memory
from derain.methods import DerainModule, weights
from derain.methods.daclipsde.solvers import Sampling
from derain.progress import track
from derain.ranges import check_finite, check_range

log = logging.getLogger("derain")
Precision = Literal["float32", "bf16"]
T = TypeVar("T")

OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")
"""How PyTorch's allocators of Linux, Windows and Apple GPUs say it."""

SMALLEST_TILE = 64
"""Side below which running out of memory is final, in pixels."""


class Restorer:
    """Restores rainy images with any method of derain.

    Args:
        method: Weights by name (`derain.methods.weights.locate`) or file, or a method; by default the model in the box.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: ``float32``, or ``bf16`` (autocast to bfloat16; float32 where the device cannot compute in it).
        tile: Side of the tiles in pixels; ``auto``: whole images where memory allows, else the largest
            tile that fits; ``None``: whole images always. Out of memory halves the tile and tries again.
        overlap: Pixels that neighbouring tiles share; they are blended by a raised cosine.
        ensemble: Mean over the eight flips and rotations, eight times slower: better only by methods that were trained
            on transposed crops; others take turned rain for no rain.
        route: Let all images take this route, of methods that have routes, instead of perceiving them.
        sampling: Solver, steps and seed, of methods that sample; their own default if not given.
        compile: Compile the network; takes up to a minute first, and pays from a few hundred images on.

    Raises:
        DerainError: If the weights cannot be used or the device is not there.

    Example:
        >>> restorer = Restorer(device="cpu")
        >>> restorer(np.zeros((5, 7, 3), np.uint8)).dtype
        dtype('uint8')
        >>> restorer(torch.rand(2, 3, 5, 7)).shape
        torch.Size([2, 3, 5, 7])
        >>> restorer(Image.new("RGB", (7, 5))).size
        (7, 5)
    """

    def __init__(
        self,
        method: Path | str | DerainModule = "default",
        *,
        device: str = "auto",
        precision: Precision = "float32",
        tile: int | Literal["auto"] | None = "auto",
        overlap: int = 64,
        ensemble: bool = False,
        route: int | None = None,
        sampling: Sampling | None = None,
        compile: bool = False,
    ) -> None:
        if isinstance(tile, int) and tile < SMALLEST_TILE:
            raise DerainError(f"--tile {tile}: must be at least {SMALLEST_TILE}, auto or none")
        self.note = type(method).__name__
        if not isinstance(method, DerainModule):
            path, (loaded, self.note) = method, weights.load(method)
            if not isinstance(loaded, DerainModule):
                raise DerainError(f"{path}: {self.note} restores no images; give weights of a method")
            method = loaded
        self.device = choose_device(device)
        self.method = method.to(self.device).eval()
        if route is not None:
            method.take_route(route)
        if sampling is not None:
            method.sample_by(sampling)
        method.check()
        if precision == "bf16" and not computes_bf16(self.device):
            log.warning("bf16: %s has no instructions for it, and emulation is slower: using float32", self.device)
            precision = "float32"
        self.precision, self.tile, self.overlap, self.ensemble = precision, tile, overlap, ensemble
        self._fitting: dict[tuple[int, int], int] = {}
        if compile:
            torch._inductor.config.freezing = True  # folds layouts and bias into the convolutions; global or not at all
            self.method.network.compile(dynamic=self.method.compiles_any_size)

    @torch.inference_mode()
    def __call__(self, rainy: T, perceived: dict[str, Any] | None = None, *, name: str = "image") -> T:
        """Restores an image or several, and gives them back as they came.

        Args:
            rainy: A PIL image, an array ``(h, w, 3)`` or ``(n, h, w, 3)``, a tensor ``(3, h, w)`` or ``(n, 3, h, w)``
                on any device, or a list of any of these; any ``h, w >= 1``. Floats in [0, 1], or bytes (uint8).
            perceived: What ``perceive`` gave of an image that these shall be restored like, as a video's first frame
                for all others; each image is perceived if not given.
            name: What messages call the image.

        Returns:
            The same kind, shape, type and device. A PIL image is upright RGB, with the alpha and profile that it had.

        Raises:
            DerainError: If it is none of these, floats are not in [0, 1], memory does not suffice for the smallest
                tile, or the restored image has values that are not finite.
        """
        restored: Any
        if isinstance(rainy, list | tuple):
            images = enumerate(rainy)
            restored = type(rainy)(self(image, perceived, name=f"{name} {index}") for index, image in images)
        elif isinstance(rainy, Image.Image):
            if rainy.mode[0] in "IF":  # more than 8 bits, which Pillow would clip
                raise DerainError(f"a PIL image of mode {rainy.mode}; give 8 bits, or an array of floats in [0, 1]")
            upright = ImageOps.exif_transpose(rainy)
            restored = Image.fromarray(self(np.asarray(upright.convert("RGB")), perceived, name=name))
            if upright.has_transparency_data:
                restored.putalpha(upright.convert("RGBA").getchannel("A"))
            if upright.mode in {"RGB", "RGBA", "P"} and "icc_profile" in upright.info:
                restored.info["icc_profile"] = upright.info["icc_profile"]
        elif isinstance(rainy, np.ndarray) and rainy.ndim in (3, 4):
            tensor = self(torch.from_numpy(np.array(np.moveaxis(rainy, -1, -3))), perceived, name=name)
            restored = np.ascontiguousarray(np.moveaxis(tensor.numpy(), -3, -1))
        else:
            restored = self._call(_checked(rainy, name), perceived, name)
        return cast(T, restored)

    def _call(self, rainy: Tensor, perceived: dict[str, Any] | None, name: str) -> Tensor:
        """Restores a tensor's images one by one."""
        images = rainy.reshape(-1, 1, *rainy.shape[-3:]).to("cpu", torch.float32)
        images = images / 255 if rainy.dtype == torch.uint8 else images
        views = [
            self._views(one, self.method, self.method.perceive(one.to(self.device)) if perceived is None else perceived)
            for one in images
        ]
        for index, view in enumerate(views):
            check_finite(view, name if rainy.ndim == 3 else f"{name} {index}")
        restored = torch.cat([one.clamp(0, 1) for one in views] or [images[:, 0]]).reshape(rainy.shape)
        restored = (restored.mul(255).round() if rainy.dtype == torch.uint8 else restored).to(rainy.device, rainy.dtype)
        with torch.inference_mode(False):
            return restored.clone()  # an inference tensor could not be used where gradients are wanted

    @torch.inference_mode()
    def perceive(self, rainy: NDArray[np.float32]) -> dict[str, Any]:
        """What the method perceives of an image ``(h, w, 3)`` in [0, 1], such as its route; often nothing."""
        return self.method.perceive(torch.from_numpy(np.moveaxis(rainy, -1, 0).copy())[None].to(self.device))

    @torch.inference_mode()
    def explain(self, rainy: NDArray[np.float32], name: str = "image") -> "Explanation":
        """Restores one image, as a call does, and shows how that came about; messages call it by its name."""
        image = torch.from_numpy(np.ascontiguousarray(rainy.transpose(2, 0, 1)))[None]
        perceived = self.perceive(rainy)
        views = self._views(image, self.method.explain, perceived)
        check_finite(views, name)
        stack = np.ascontiguousarray(views[0].clamp(0, 1).permute(1, 2, 0).numpy())
        maps = {name: stack[:, :, 3 + place] for place, name in enumerate(self.method.maps)}
        return Explanation(stack[:, :, :3], maps, self.method.describe_image(perceived, 0))

    def _views(
        self, image: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], perceived: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        """Restores the image, or the mean of its flips and rotations; what is perceived is perceived once."""
        if not self.ensemble:
            return self._restore(image, forward, perceived)
        backs = []
        for turns, mirror in itertools.product(range(4), (False, True)):
            view = torch.rot90(image.flip(3) if mirror else image, turns, (2, 3))
            back = torch.rot90(self._restore(view, forward, perceived), -turns, (2, 3))
            backs.append(back.flip(3) if mirror else back)
        return torch.stack(backs).mean(0)

    def _restore(
        self, image: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], perceived: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        """Restores by the largest tiles that memory holds, which are found once a size."""
        height, width = image.shape[2:]
        if (height, width) not in self._fitting:
            self._fitting[height, width] = self._first_tile(height, width)
        while True:
            tile = self._fitting[height, width]
            try:
                if self.method.samples:  # many passes over one state: each is cut into tiles, not the whole
                    inner = {"tiled": partial(blend_tiles, tile=tile, overlap=self.overlap), "show": show_steps}
                    return self._forward(image, forward, perceived | inner)
                return blend_tiles(image, lambda part: self._forward(part, forward, perceived), tile, self.overlap)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                    raise
                if self.tile is None or tile // 2 < SMALLEST_TILE:
                    raise DerainError(
                        f"not enough memory for a tile of {tile}×{tile} pixels on {self.device}; "
                        "close other programs, or use --tile auto, a smaller --tile or --device cpu"
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._fitting[height, width] = tile // 2
            log.warning("out of memory: going on with tiles of %d×%d pixels", tile // 2, tile // 2)

    def _first_tile(self, height: int, width: int) -> int:
        if isinstance(self.tile, int):
            return self.tile
        longest = max(height, width)
        pixels = memory_for(self.device) // 2 // self.method.bytes_per_pixel
        if self.tile is None or height * width <= pixels:
            return longest
        multiple = self.method.tile_multiple
        tile = max(SMALLEST_TILE, min(longest, int(pixels**0.5)) // multiple * multiple)
        log.info("%d×%d pixels: restoring in tiles of %d×%d", width, height, tile, tile)
        return tile

    def _forward(
        self, tile: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], perceived: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        autocast: AbstractContextManager[object] = nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            derained = forward(tile.to(self.device, memory_format=torch.channels_last), **perceived).float()
        # Clamping would turn infinity into white; as NaN it survives until the whole image is checked.
        return torch.where(derained.isfinite(), derained.clamp(0, 1), torch.nan).cpu()


class Explanation(NamedTuple):
    """How a restoration came about.

    Attributes:
        derained: ``(h, w, 3)`` in [0, 1].
        maps: Maps of the method by name, ``(h, w)`` in [0, 1] each.
        perceived: What the method perceived of the whole image.
    """

    derained: NDArray[np.float32]
    maps: dict[str, NDArray[np.float32]]
    perceived: dict[str, Any]


def choose_device(name: str) -> torch.device:
    """Turns ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device.

    Raises:
        DerainError: If there is no such device here.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in here or (colon and not number.isdecimal()) or int(number or 0) >= here[kind]:
        found = ", ".join(f"{count} {kind}" for kind, count in here.items() if count)
        raise DerainError(f"--device {name}: not here (found {found}); give auto, cpu, cuda, cuda:N or mps")
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def memory_for(device: torch.device) -> int:
    """Bytes that a restoration may count on: free memory of the GPU, or of the machine, at most 4 GiB there.

    On a CPU, larger tiles are no faster, and other programs want memory too.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch keeps it at hand
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(free_memory(), 4 << 30)


def blend_tiles(
    image: Float[Tensor, "1 c h w"],
    forward: Callable[[Tensor], Tensor],
    tile: int,
    overlap: int,
) -> Float[Tensor, "1 n h w"]:
    """Restores tile by tile; where tiles overlap, each fades out along a raised cosine, so no seam shows.

    All tiles have one size, ``min(tile, h)`` by ``min(tile, w)``, so that a compiled network compiles once.

    Args:
        image: Or what else is laid out as one.
        forward: Restores one tile, ``(1, c, s, s)`` to ``(1, n, s, s)``.
        tile: Side of a tile in pixels.
        overlap: Least overlap of neighbours in pixels; at most half a tile is used.

    Example:
        >>> image = torch.rand(1, 3, 50, 90)
        >>> torch.allclose(blend_tiles(image, lambda t: t, 32, 8), image)
        True
    """
    height, width = image.shape[2:]
    side_h, side_w = min(tile, height), min(tile, width)
    if (side_h, side_w) == (height, width):
        return forward(image)
    overlap = min(overlap, tile // 2)
    total: Tensor | None = None
    weight = image.new_zeros(1, 1, height, width)
    for top, left in itertools.product(starts(height, side_h, overlap), starts(width, side_w, overlap)):
        rows, columns = slice(top, top + side_h), slice(left, left + side_w)
        fade = torch.outer(
            _fade(side_h, overlap, top > 0, top + side_h < height),
            _fade(side_w, overlap, left > 0, left + side_w < width),
        ).to(image.device)
        part = forward(image[..., rows, columns].contiguous()) * fade
        if total is None:
            total = part.new_zeros(1, part.shape[1], height, width)
        total[..., rows, columns] += part
        weight[..., rows, columns] += fade
    return cast(Tensor, total) / weight


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of tiles that cover ``length`` and overlap by at least ``overlap``, evenly spread.

    Example:
        >>> starts(100, 40, 10)
        [0, 30, 60]
        >>> starts(101, 40, 10)
        [0, 20, 41, 61]
    """
    if tile >= length:
        return [0]
    count = -(-(length - tile) // (tile - overlap)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _fade(side: int, overlap: int, before: bool, after: bool) -> Float[Tensor, " side"]:
    """Weights along one side of a tile: 1 inside, a raised cosine towards neighbours, nowhere zero."""
    ramp = torch.sin((torch.arange(overlap) + 0.5) / max(overlap, 1) * torch.pi / 2) ** 2
    weight = torch.ones(side)
    if before:
        weight[:overlap] *= ramp
    if after:
        weight[side - overlap :] *= ramp.flip(0)
    return weight


def show_steps(steps: Iterable[T], total: int) -> Iterator[T]:
    """Shows on a terminal how far sampling is."""
    return track(steps, "Sampling", total)


def _checked(images: object, name: str) -> Tensor:
    """Images that can be restored.

    Raises:
        DerainError: If they are not.
    """
    wanted = "expected a PIL image, an array (h, w, 3) or a tensor (3, h, w), or several; bytes, or floats in [0, 1]"
    if not isinstance(images, Tensor):
        shape = f" of shape {images.shape}" if isinstance(images, np.ndarray) else ""
        raise DerainError(f"{name}: is a {type(images).__name__}{shape}; {wanted}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise DerainError(f"{name}: has channels, height and width {tuple(images.shape)}; {wanted}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DerainError(f"{name}: holds {images.dtype}; {wanted}")
        check_range(images, name)
    return images
