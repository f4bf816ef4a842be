"""Restoration of rainy images of any size, in tiles if memory is short."""

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

from derain.errors import ArgumentError, DerainError
from derain.memory import free_memory
from derain.methods import DerainModule
from derain.methods.catalog import load
from derain.methods.interfaces import Explains, Routed, Sampled, Sampling
from derain.progress import track
from derain.ranges import check_finite, check_range

log = logging.getLogger("derain")
Precision = Literal["float32", "bf16"]
T = TypeVar("T")

OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")
"""Out-of-memory messages of PyTorch's allocators on Linux, Windows and Apple GPUs."""

SMALLEST_TILE = 64
"""Smallest side of a tile in pixels."""


class Restorer:
    """Restores rainy images with any method of derain.

    Args:
        weights: Name of weights (`derain.methods.catalog.locate`), a file, or a method; by default the bundled model.
        method: For weights of a method from outside derain: its class, or the path of the class, such as
            ``my_method.MyModule``, imported from the installed packages or the current folder.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        precision: ``float32``, or ``bf16`` (autocast to bfloat16; float32 where the device cannot compute in it).
        tile: Side of the tiles in pixels, at least 64; ``auto``: whole images if they fit into memory, otherwise the
            largest tiles that do; ``None``: always whole images. If memory runs out, tiles of half the side are tried,
            except with ``None``.
        overlap: Minimum number of pixels that neighbouring tiles share, at most half a tile; they are blended by a
            raised cosine.
        ensemble: Average over the eight flips and rotations, which takes eight times as long. Improves only methods
            trained on rotated or transposed crops; others miss rotated rain.
        route: Route for all images, for methods with routes; by default the method chooses one for each image.
        sampling: Solver, steps and seed, for methods that sample; by default those of the method.
        compile: Compile the network, which takes up to a minute; worthwhile for a few hundred images or more.

    Raises:
        DerainError: If the weights cannot be loaded, the device is not available, or the method does not support an
            option.

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
        weights: Path | str | DerainModule = "default",
        *,
        method: str | type[DerainModule] | None = None,
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
            raise ArgumentError(f"tile {tile}: must be at least {SMALLEST_TILE}, 'auto' or None")
        module, self.note = _load(weights, method)
        self.device = choose_device(device)
        self.method = module.to(self.device).eval()
        if route is not None:
            set_route(self.method, route)
        if sampling is not None:
            set_sampling(self.method, sampling)
        self.method.check_requirements()
        if precision == "bf16" and not computes_bf16(self.device):
            log.warning("bf16: %s has no instructions for it, and emulation is slower: using float32", self.device)
            precision = "float32"
        self.precision, self.tile, self.overlap, self.ensemble = precision, tile, overlap, ensemble
        self._tile_sides: dict[tuple[int, int], int] = {}
        if compile:
            _compile(self.method)

    @torch.inference_mode()
    def __call__(self, rainy: T, conditions: dict[str, Any] | None = None, *, name: str = "image") -> T:
        """Restore one or several images.

        Args:
            rainy: A PIL image, an array ``(h, w, 3)`` or ``(n, h, w, 3)``, a tensor ``(3, h, w)`` or ``(n, 3, h, w)``
                on any device, or a list or tuple of any of these; any ``h, w >= 1``. Floats in [0, 1], or uint8.
            conditions: Result of `encode` for another image, such as the first frame of a video; by default each image
                is encoded.
            name: Name of the image in messages.

        Returns:
            Restored images of the same kind, shape, type and device. PIL images are returned upright, as RGB or RGBA,
            with the ICC profile of the input if its mode is RGB, RGBA or P.

        Raises:
            DerainError: If the input is of another kind, floats are not in [0, 1], memory does not suffice for the
                smallest tile, or a restored value is NaN or infinite.
        """
        restored: Any
        if isinstance(rainy, list | tuple):
            images = enumerate(rainy)
            restored = type(rainy)(self(image, conditions, name=f"{name} {index}") for index, image in images)
        elif isinstance(rainy, Image.Image):
            if rainy.mode[0] in "IF":  # more than 8 bits, which Pillow would clip
                raise DerainError(
                    f"{name}: PIL mode {rainy.mode}; expected 8 bits per channel; convert it, or pass an array of "
                    "floats in [0, 1]"
                )
            upright = ImageOps.exif_transpose(rainy)
            restored = Image.fromarray(self(np.asarray(upright.convert("RGB")), conditions, name=name))
            if upright.has_transparency_data:
                restored.putalpha(upright.convert("RGBA").getchannel("A"))
            if upright.mode in {"RGB", "RGBA", "P"} and "icc_profile" in upright.info:
                restored.info["icc_profile"] = upright.info["icc_profile"]
        elif isinstance(rainy, np.ndarray) and rainy.ndim in (3, 4):
            tensor = self(torch.from_numpy(np.array(np.moveaxis(rainy, -1, -3))), conditions, name=name)
            restored = np.ascontiguousarray(np.moveaxis(tensor.numpy(), -3, -1))
        else:
            restored = self._call(_checked(rainy, name), conditions, name)
        return cast(T, restored)

    def _call(self, rainy: Tensor, conditions: dict[str, Any] | None, name: str) -> Tensor:
        """Restore the images of a tensor."""
        in_bytes = rainy.dtype == torch.uint8
        images = rainy.reshape(-1, 1, *rainy.shape[-3:]).to("cpu", torch.float32)
        if in_bytes:
            images = images / 255
        restored = torch.empty_like(images)
        for index, image in enumerate(images):
            image_conditions = conditions
            if image_conditions is None:
                image_conditions = self.method.encode(image.to(self.device))
            derained = self._restore_ensemble(image, self.method, image_conditions)
            check_finite(derained, name if rainy.ndim == 3 else f"{name} {index}")
            restored[index] = derained.clamp(0, 1)
        if in_bytes:
            restored = restored.mul(255).round()
        restored = restored.reshape(rainy.shape).to(rainy.device, rainy.dtype)
        with torch.inference_mode(False):
            return restored.clone()  # autograd refuses inference tensors

    @torch.inference_mode()
    def encode(self, rainy: NDArray[np.float32]) -> dict[str, Any]:
        """Return the conditions of the method for an image ``(h, w, 3)`` in [0, 1]; empty for most methods."""
        return self.method.encode(torch.from_numpy(np.moveaxis(rainy, -1, 0).copy())[None].to(self.device))

    @torch.inference_mode()
    def explain(self, rainy: NDArray[np.float32], name: str = "image") -> "Explanation":
        """Restore one image, with the maps and the description of the method if it implements `Explains`.

        Args:
            rainy: ``(h, w, 3)`` in [0, 1].
            name: Name of the image in messages.

        Returns:
            The restored image with maps and description, which are empty for other methods.

        Raises:
            DerainError: As for ``__call__``.
        """
        image = torch.from_numpy(np.ascontiguousarray(rainy.transpose(2, 0, 1)))[None]
        conditions = self.encode(rainy)
        function = self.method.explain if isinstance(self.method, Explains) else self.method
        restored = self._restore_ensemble(image, function, conditions)
        check_finite(restored, name)
        channels = np.ascontiguousarray(restored[0].clamp(0, 1).permute(1, 2, 0).numpy())
        if not isinstance(self.method, Explains):
            return Explanation(channels, {}, {})
        maps = {name: channels[:, :, index] for index, name in enumerate(self.method.maps, 3)}
        return Explanation(channels[:, :, :3], maps, self.method.describe_image(conditions, 0))

    def _restore_ensemble(
        self, image: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], conditions: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        """Restore an image; with ``ensemble``, average over its flips and rotations."""
        if not self.ensemble:
            return self._restore(image, forward, conditions)
        restored = []
        for quarter_turns, is_flipped in itertools.product(range(4), (False, True)):
            view = torch.rot90(image.flip(3) if is_flipped else image, quarter_turns, (2, 3))
            upright = torch.rot90(self._restore(view, forward, conditions), -quarter_turns, (2, 3))
            restored.append(upright.flip(3) if is_flipped else upright)
        return torch.stack(restored).mean(0)

    def _restore(
        self, image: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], conditions: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        """Restore in the largest tiles that fit into memory; their side is determined once per image size."""
        height, width = image.shape[2:]
        if (height, width) not in self._tile_sides:
            self._tile_sides[height, width] = self._first_tile(height, width)
        while True:
            tile = self._tile_sides[height, width]
            try:
                if isinstance(self.method, Sampled):  # tiles each step itself, since all tiles share one state
                    tiled = partial(blend_tiles, tile=tile, overlap=self.overlap)
                    return self._forward(image, forward, conditions | {"tiled": tiled, "show": show_steps})
                return blend_tiles(image, lambda crop: self._forward(crop, forward, conditions), tile, self.overlap)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
                if not is_memory_error and not OUT_OF_MEMORY.search(str(error)):
                    raise
                if self.tile is None or tile // 2 < SMALLEST_TILE:
                    raise DerainError(
                        f"not enough memory for a tile of {tile}×{tile} pixels on {self.device}; "
                        "close other programs, or use a smaller tile, tile auto or device cpu"
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._tile_sides[height, width] = tile // 2
            log.warning("out of memory: continuing with tiles of %d×%d pixels", tile // 2, tile // 2)

    def _first_tile(self, height: int, width: int) -> int:
        """Return the side of the first tiles to try; the longest side of the image means no tiles."""
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
        self, tile: Float[Tensor, "1 3 h w"], forward: Callable[..., Tensor], conditions: dict[str, Any]
    ) -> Float[Tensor, "1 n h w"]:
        autocast: AbstractContextManager[object] = nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            derained = forward(tile.to(self.device, memory_format=torch.channels_last), **conditions).float()
        # Clamping would turn infinity into white; NaN is reported when the whole image is checked.
        return torch.where(derained.isfinite(), derained.clamp(0, 1), torch.nan).cpu()


class Explanation(NamedTuple):
    """Derained image with the maps and the description of the method.

    Attributes:
        derained: ``(h, w, 3)`` in [0, 1].
        maps: Maps of the method by name, each ``(h, w)`` in [0, 1].
        description: Facts about the image from `Explains.describe_image`, such as its route.
    """

    derained: NDArray[np.float32]
    maps: dict[str, NDArray[np.float32]]
    description: dict[str, Any]


def _load(weights: Path | str | DerainModule, method: str | type | None) -> tuple[DerainModule, str]:
    """Return the method, and one line that describes it in messages."""
    if isinstance(weights, DerainModule):
        if method is not None:
            raise ArgumentError(f"method {method}: not used with a {type(weights).__name__}; omit it")
        return weights, weights.title
    module, note = load(weights, method)
    if not isinstance(module, DerainModule):
        raise DerainError(
            f"{weights}: {note} does not restore images; use weights of a restoration method (derain models list)"
        )
    return module, note


def _compile(method: DerainModule) -> None:
    """Compile the network of a method.

    Raises:
        ArgumentError: If the network is a container of modules without a ``forward``.
    """
    network = method.network
    if type(network).forward is torch.nn.Module.forward:  # a list or dictionary of modules
        raise ArgumentError(
            f"compile: {type(method).__name__}.network is a {type(network).__name__}, which has no forward to compile; "
            "omit the option"
        )
    torch._inductor.config.freezing = True  # faster convolutions; PyTorch has only a global switch
    network.compile(dynamic=method.compiles_any_size)


def set_route(method: DerainModule, route: int) -> None:
    """Send all images along one route.

    Raises:
        ArgumentError: If the method has no routes, or no such route.
    """
    if not isinstance(method, Routed):
        raise ArgumentError(f"route {route}: {type(method).__name__} has no routes; omit it")
    method.set_route(route)


def set_sampling(method: DerainModule, sampling: Sampling) -> None:
    """Set solver, number of steps and seed of a method that samples.

    Raises:
        DerainError: If the method does not sample, or does not support the solver or the number of steps.
    """
    if not isinstance(method, Sampled):
        raise DerainError(f"{type(method).__name__} restores in one pass; omit solver, steps and seed")
    method.set_sampling(sampling)


def require_explains(method: DerainModule) -> Explains:
    """Return the method as `Explains`.

    Raises:
        ArgumentError: If the method does not implement it.
    """
    if not isinstance(method, Explains):
        raise ArgumentError(f"explain: {type(method).__name__} has no maps; omit the option")
    return method


def choose_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        ArgumentError: If the device is not available.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    device_counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in device_counts.items() if count))
    kind, colon, number = name.partition(":")
    if kind not in device_counts or (colon and not number.isdecimal()) or int(number or 0) >= device_counts[kind]:
        available = ", ".join(f"{count} {kind}" for kind, count in device_counts.items() if count)
        raise ArgumentError(
            f"device {name}: not available (found {available}); expected auto, cpu, cuda, cuda:N or mps"
        )
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def memory_for(device: torch.device) -> int:
    """Return the memory available to a restoration in bytes: free CUDA memory; on other devices free RAM, up to 4 GiB.

    Tiles that need more are no faster on a CPU.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(free_memory(), 4 << 30)


def blend_tiles(
    image: Float[Tensor, "1 c h w"],
    forward: Callable[[Tensor], Tensor],
    tile: int,
    overlap: int,
) -> Float[Tensor, "1 n h w"]:
    """Apply a function to an image tile by tile, and blend the overlaps of the tiles by a raised cosine.

    All tiles have the same size, ``min(tile, h)`` × ``min(tile, w)``, so that a compiled network compiles once.

    Args:
        image: Image, or another tensor with the same layout, such as a sampler's state.
        forward: Function of a tile, ``(1, c, min(tile, h), min(tile, w))``, that returns ``n`` channels of that size.
        tile: Side of a tile in pixels.
        overlap: Minimum overlap of neighbours in pixels, reduced to half a tile if it is larger.

    Example:
        >>> image = torch.rand(1, 3, 50, 90)
        >>> torch.allclose(blend_tiles(image, lambda t: t, 32, 8), image)
        True
    """
    height, width = image.shape[2:]
    tile_height, tile_width = min(tile, height), min(tile, width)
    if (tile_height, tile_width) == (height, width):
        return forward(image)
    overlap = min(overlap, tile // 2)
    total: Tensor | None = None
    weight = image.new_zeros(1, 1, height, width)
    tops, lefts = tile_starts(height, tile_height, overlap), tile_starts(width, tile_width, overlap)
    for top, left in itertools.product(tops, lefts):
        bottom, right = top + tile_height, left + tile_width
        rows, columns = slice(top, bottom), slice(left, right)
        fade = torch.outer(
            _fade(tile_height, overlap, top > 0, bottom < height),
            _fade(tile_width, overlap, left > 0, right < width),
        ).to(image.device)
        faded = forward(image[..., rows, columns].contiguous()) * fade
        if total is None:
            total = faded.new_zeros(1, faded.shape[1], height, width)
        total[..., rows, columns] += faded
        weight[..., rows, columns] += fade
    return cast(Tensor, total) / weight


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the start of each of the evenly spaced tiles that cover ``length`` and overlap by at least ``overlap``.

    Example:
        >>> tile_starts(100, 40, 10)
        [0, 30, 60]
        >>> tile_starts(101, 40, 10)
        [0, 20, 41, 61]
    """
    if tile >= length:
        return [0]
    count = -(-(length - tile) // (tile - overlap)) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def _fade(side: int, overlap: int, before: bool, after: bool) -> Float[Tensor, " side"]:
    """Return the weights along one side of a tile: 1 inside, and a raised cosine, above 0, towards its neighbours."""
    ramp = torch.sin((torch.arange(overlap) + 0.5) / max(overlap, 1) * torch.pi / 2) ** 2
    weight = torch.ones(side)
    if before:
        weight[:overlap] *= ramp
    if after:
        weight[side - overlap :] *= ramp.flip(0)
    return weight


def show_steps(steps: Iterable[T], total: int) -> Iterator[T]:
    """Show the progress of sampling on a terminal."""
    return track(steps, "Sampling", total)


def _checked(images: object, name: str) -> Tensor:
    """Return a tensor of images after checking that it can be restored.

    Raises:
        DerainError: If its type, shape, data type or range is not accepted.
    """
    expected = "expected a PIL image, an array (h, w, 3) or a tensor (3, h, w), or several; uint8, or floats in [0, 1]"
    if not isinstance(images, Tensor):
        shape = f" of shape {images.shape}" if isinstance(images, np.ndarray) else ""
        raise DerainError(f"{name}: is a {type(images).__name__}{shape}; {expected}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise DerainError(f"{name}: has shape {tuple(images.shape)}; {expected}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DerainError(f"{name}: has dtype {images.dtype}; expected uint8 or floating point; convert it")
        check_range(images, name)
    return images
