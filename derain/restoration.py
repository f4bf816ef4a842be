"""Restoration of rainy images of any size."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from derain.batching import Precision, Scheduler, check_tile, to_unit
from derain.errors import ArgumentError, DerainError
from derain.methods import DerainModule
from derain.methods.catalog import load
from derain.methods.interfaces import Explains, Routed, Sampled, Sampling
from derain.ranges import check_finite, check_range
from derain.scaling import automatic_factor, enlarge, reduce, subtract_rain

log = logging.getLogger("derain")
T = TypeVar("T")


class Restorer:
    """Restores rainy images with any method of derain.

    Args:
        weights: Name of weights (`derain.methods.catalog.locate`), a weights file, or a method; by default the bundled
            model ``default``.
        method: For weights of a method from outside derain: its class, or the path of the class, such as
            ``my_method.MyModule``. The class is imported from an installed package or the current folder.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        precision: ``float32``, or ``bf16``: autocast to bfloat16, but float32 with a warning on a device for which
            `computes_bf16` is false.
        tile: Side of the tiles in pixels, at least 64; ``auto``: whole images if they probably fit into memory,
            otherwise tiles; None: always whole images. If memory runs out, the side of the tiles is halved, except with
            None.
        overlap: Minimum number of pixels that neighbouring tiles share, reduced to half a tile if it is larger.
        ensemble: Average over the eight flips and rotations, which takes eight times as long. Use it only for methods
            trained on rotated or transposed crops: others miss rotated rain.
        route: Index of the route for all images, for methods with routes; by default the method chooses a route for
            each image.
        sampling: Solver, steps and seed, for methods that sample; by default those of the method.
        compile: Compile the network with ``torch.compile``; worthwhile only for hundreds of images.
        scale: Factor by which images are reduced before the rain in them is estimated; the removed rain is enlarged and
            subtracted from the full image (`derain.scaling`). ``auto``: 1 if the shorter side is below 2000 pixels,
            otherwise the factor that reduces it to 1000 to 1500 pixels.
        strength: Share of the rain that is removed, from 0 to 1.

    Attributes:
        method: The method, on ``device`` and in eval mode.
        device: The device.
        note: One line that describes the weights.
        scheduler: Object that restores the images, in batches, on threads and in tiles.

    Raises:
        DerainError: If the weights, or a model that the method needs, cannot be loaded; if the device is not available;
            or if an option is out of range or not supported by the method.

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
        scale: int | Literal["auto"] = 1,
        strength: float = 1.0,
    ) -> None:
        check_tile(tile)
        if scale != "auto" and scale < 1:
            raise ArgumentError(f"scale {scale}: must be at least 1, or 'auto'")
        if not 0 <= strength <= 1:
            raise ArgumentError(f"strength {strength:g}: must be from 0 to 1")
        module, self.note = _load(weights, method)
        self.device = choose_device(device)
        self.method = module.to(self.device).eval()
        if route is not None:
            set_route(self.method, route)
        if sampling is not None:
            set_sampling(self.method, sampling)
        self.method.fetch_requirements()
        if precision == "bf16" and not computes_bf16(self.device):
            log.warning("bf16: needs bfloat16 instructions of a CUDA device or x86 processor; using float32")
            precision = "float32"
        self.scheduler = Scheduler(self.method, self.device, precision, tile, overlap, ensemble)
        self.scale, self.strength = scale, strength
        self._reported: set[tuple[int, int]] = set()
        if compile:
            _compile(self.method)

    @contextmanager
    def in_bf16(self) -> Iterator[None]:
        """Compute in bf16 (autocast to bfloat16) within a ``with`` block, in calls from all threads.

        Devices without bfloat16 instructions emulate them, which is slower (`computes_bf16`).
        """
        before, self.scheduler.precision = self.scheduler.precision, "bf16"
        try:
            yield
        finally:
            self.scheduler.precision = before

    def __call__(self, rainy: T, conditions: dict[str, Any] | None = None, *, name: str | Sequence[str] = "image") -> T:
        """Restore one or several images.

        Args:
            rainy: A PIL image, an array ``(h, w, 3)`` or ``(n, h, w, 3)``, a tensor ``(3, h, w)`` or ``(n, 3, h, w)``
                on any device, or a list or tuple of any of these; any ``h, w >= 1``. Floats in [0, 1], or uint8.
            conditions: Result of `encode` for another image, such as the first frame of a video; by default each image
                is encoded.
            name: Name of the image in messages; for a list or tuple, one name for all elements or one for each. If
                several images have one name, a number is added.

        Returns:
            Restored images of the same kind, shape, data type and device. PIL images are returned upright, as RGB or
            RGBA, with the ICC profile of the input if its mode is RGB, RGBA or P.

        Raises:
            DerainError: If the input is of another kind, floats are NaN or exceed [0, 1] by more than 0.25, there is
                not one name for each element, memory is insufficient, or a restored value is NaN or infinite.
        """
        unpacked = _unpack(rainy, name)
        restored = []
        for result in self._restore(unpacked.images, unpacked.names, conditions):
            if isinstance(result, DerainError):
                raise result
            restored.append(result)
        return cast(T, unpacked.pack(restored))

    def restore_each(
        self, images: Sequence[NDArray[np.float32]], names: Sequence[str], conditions: dict[str, Any] | None = None
    ) -> list[NDArray[np.float32] | DerainError]:
        """Restore images of any sizes; an image that cannot be restored does not stop the others.

        Args:
            images: Each ``(h, w, 3)`` in [0, 1].
            names: Name of each image in messages.
            conditions: As for ``__call__``.

        Returns:
            For each image, the restored image, ``(h, w, 3)`` in [0, 1]; or the error that ``__call__`` would raise.
        """
        tensors = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in images]
        results = self._restore(tensors, names, conditions)
        return [result if isinstance(result, DerainError) else _to_array(result) for result in results]

    def _restore(
        self, images: Sequence[Tensor], names: Sequence[str], conditions: dict[str, Any] | None
    ) -> list[Tensor | DerainError]:
        """Restore tensors; the results are float32 in [0, 1], or errors."""
        reduced = [self._reduced(image) for image in images]
        results = self.scheduler.run(reduced, self.method, conditions)
        return [
            _finite(self._combined(image, small, result), name)
            for image, small, result, name in zip(images, reduced, results, names, strict=True)
        ]

    def images_at_once(self, height: int, width: int) -> int:
        """Return the number of images of this size that are restored at once: in a batch, or on threads of a CPU."""
        factor = self._factor(height, width)
        return self.scheduler.images_at_once(-(-height // factor), -(-width // factor))

    def _factor(self, height: int, width: int) -> int:
        """Return the factor by which images of this size are reduced."""
        return automatic_factor(height, width) if self.scale == "auto" else self.scale

    def _reduced(self, image: Tensor) -> Tensor:
        """Return the image that the method restores: reduced by ``scale`` and in float32, or the image itself."""
        height, width = image.shape[1:]
        factor = self._factor(height, width)
        if factor == 1:
            return image
        reduced = reduce(to_unit(image), factor)
        if (height, width) not in self._reported:
            self._reported.add((height, width))
            rows, columns = reduced.shape[1:]
            log.info("%d×%d pixels: estimating rain at %d×%d (scale %d)", width, height, columns, rows, factor)
        return reduced

    def _combined(self, image: Tensor, reduced: Tensor, result: Tensor | DerainError) -> Tensor | DerainError:
        """Subtract the rain of the reduced image, times ``strength``, from the full image, and enlarge the maps.

        Args:
            image: Image at full size.
            reduced: Result of `_reduced`.
            result: Derained reduced image and maps, ``(3 + maps, h, w)``; or an error, which is returned.
        """
        if isinstance(result, DerainError) or (reduced is image and self.strength == 1):
            return result
        derained = subtract_rain(to_unit(image), to_unit(reduced), result[:3], self.strength)
        maps = result[3:]
        return torch.cat([derained, enlarge(maps, *image.shape[1:]).clamp(0, 1)]) if len(maps) else derained

    @torch.inference_mode()
    def encode(self, rainy: NDArray[np.float32]) -> dict[str, Any]:
        """Return the conditions of an image ``(h, w, 3)`` in [0, 1], such as its route; empty for most methods."""
        image = self._reduced(torch.from_numpy(np.moveaxis(rainy, -1, 0).copy()))
        return self.method.encode(image[None].to(self.device))

    @torch.inference_mode()
    def explain(self, rainy: NDArray[np.float32], name: str = "image") -> "Explanation":
        """Restore one image; a method that implements `Explains` adds maps and a description.

        Args:
            rainy: ``(h, w, 3)`` in [0, 1].
            name: Name of the image in messages.

        Returns:
            The restored image, maps and description; the last two are empty if the method does not explain.

        Raises:
            DerainError: As for ``__call__``.
        """
        image = torch.from_numpy(np.ascontiguousarray(rainy.transpose(2, 0, 1)))
        conditions = self.encode(rainy)
        function = self.method.explain if isinstance(self.method, Explains) else self.method
        reduced = self._reduced(image)
        restored = _finite(self._combined(image, reduced, self.scheduler.run([reduced], function, conditions)[0]), name)
        if isinstance(restored, DerainError):
            raise restored
        channels = _to_array(restored)
        if not isinstance(self.method, Explains):
            return Explanation(channels, {}, {})
        maps = {map_name: channels[:, :, index] for index, map_name in enumerate(self.method.maps, 3)}
        return Explanation(channels[:, :, :3], maps, self.method.describe_image(conditions, 0))


class Explanation(NamedTuple):
    """Derained image, with maps and a description from the method.

    Attributes:
        derained: ``(h, w, 3)`` in [0, 1].
        maps: Maps by name, each ``(h, w)`` in [0, 1].
        description: Facts about the image from `Explains.describe_image`, such as its route.
    """

    derained: NDArray[np.float32]
    maps: dict[str, NDArray[np.float32]]
    description: dict[str, Any]


def _load(weights: Path | str | DerainModule, method: str | type | None) -> tuple[DerainModule, str]:
    """Return the method, and one line for messages that describes the weights."""
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
        ArgumentError: If the network is a container of modules, which has no ``forward``.
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
    """Return the method if it implements `Explains`.

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
    """Return whether a CUDA device or x86 processor has instructions for bfloat16; False for all others."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


class _Unpacked(NamedTuple):
    """Images in an argument of `Restorer`, as tensors.

    Attributes:
        images: Tensors, ``(3, h, w)`` each, on any device, uint8 or floating point.
        names: Name of each image in messages.
        pack: Function of the restored tensors, float32 in [0, 1], that returns them in the form of the argument.
    """

    images: list[Tensor]
    names: list[str]
    pack: Callable[[list[Tensor]], Any]


def _unpack(rainy: Any, name: str | Sequence[str]) -> _Unpacked:
    """Return the images of a PIL image, an array, a tensor, or a list or tuple of these.

    Args:
        rainy: The images.
        name: Name of the image, or of each image in a list or tuple.

    Raises:
        DerainError: If the argument is none of these; if its shape, data type or range is not accepted; or if there is
            not one name for each element.
    """
    if isinstance(rainy, list | tuple):
        names = [f"{name} {index}" for index in range(len(rainy))] if isinstance(name, str) else name
        if len(names) != len(rainy):
            raise ArgumentError(f"name: {len(names)} names for {len(rainy)} images; give a name for each")
        parts = [_unpack(part, part_name) for part, part_name in zip(rainy, names, strict=True)]
        return _Unpacked(
            [image for part in parts for image in part.images],
            [image_name for part in parts for image_name in part.names],
            lambda restored: type(rainy)(_pack_parts(parts, restored)),
        )
    if not isinstance(name, str):
        raise ArgumentError(
            f"name: {len(name)} names for a {type(rainy).__name__}; give names for a list or tuple only"
        )
    if isinstance(rainy, Image.Image):
        return _unpack_picture(rainy, name)
    if isinstance(rainy, np.ndarray) and rainy.ndim in (3, 4):
        images, image_names, pack = _unpack(torch.from_numpy(np.array(np.moveaxis(rainy, -1, -3))), name)
        return _Unpacked(
            images, image_names, lambda restored: np.ascontiguousarray(np.moveaxis(pack(restored).numpy(), -3, -1))
        )
    tensor = _checked(rainy.detach() if isinstance(rainy, Tensor) else rainy, name)
    images = list(tensor.reshape(-1, *tensor.shape[-3:]))
    image_names = [name] if tensor.ndim == 3 else [f"{name} {index}" for index in range(len(images))]
    return _Unpacked(images, image_names, lambda restored: _pack_tensor(restored, tensor))


def _pack_parts(parts: list[_Unpacked], restored: list[Tensor]) -> list[Any]:
    """Return the restored images in the form of the parts of a list or tuple."""
    packed = []
    for part in parts:
        count = len(part.images)
        packed.append(part.pack(restored[:count]))
        restored = restored[count:]
    return packed


def _unpack_picture(picture: Image.Image, name: str) -> _Unpacked:
    """Return the RGB channels of a PIL image.

    Raises:
        DerainError: If it has more than 8 bits per channel: Pillow would clip the values.
    """
    if picture.mode[0] in "IF":
        raise DerainError(
            f"{name}: PIL mode {picture.mode}; expected 8 bits per channel; convert it, or pass an array of floats in "
            "[0, 1]"
        )
    upright = ImageOps.exif_transpose(picture)
    images, names, pack_array = _unpack(np.asarray(upright.convert("RGB")), name)

    def pack(restored: list[Tensor]) -> Image.Image:
        packed = Image.fromarray(pack_array(restored))
        if upright.has_transparency_data:
            packed.putalpha(upright.convert("RGBA").getchannel("A"))
        if upright.mode in {"RGB", "RGBA", "P"} and "icc_profile" in upright.info:
            packed.info["icc_profile"] = upright.info["icc_profile"]
        return packed

    return _Unpacked(images, names, pack)


def _pack_tensor(restored: list[Tensor], like: Tensor) -> Tensor:
    """Return restored images as one tensor with the shape, data type and device of the input."""
    if not restored:
        return like.clone()
    packed = torch.stack(restored)  # outside inference mode, so that autograd accepts the result
    if like.dtype == torch.uint8:
        packed = packed.mul(255).round()
    return packed.reshape(like.shape).to(like.device, like.dtype)


def _to_array(image: Tensor) -> NDArray[np.float32]:
    """Return ``(c, h, w)`` as a contiguous array ``(h, w, c)``."""
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _finite(result: Tensor | DerainError, name: str) -> Tensor | DerainError:
    """Return a result if it is finite; otherwise an error that names the image. Errors get the name too."""
    if isinstance(result, DerainError):
        return DerainError(f"{name}: {result}")
    try:
        check_finite(result, name)
    except DerainError as error:
        return error
    return result


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
