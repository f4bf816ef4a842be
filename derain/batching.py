"""Restoration of many images in batches, on threads and in tiles."""

import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from derain.errors import ArgumentError, DerainError
from derain.memory import free_memory, is_out_of_memory
from derain.methods.base import DerainModule
from derain.methods.interfaces import Sampled
from derain.module_state import StateWatch
from derain.progress import track
from derain.tiles import blend_tiles, tile_count

log = logging.getLogger("derain")
Precision = Literal["float32", "bf16"]
T = TypeVar("T")

SMALLEST_TILE = 64
"""Smallest side of a tile in pixels."""

LARGEST_BATCH = 32
"""Largest number of images or tiles at once, by default."""

SMALLEST_FOR_THREADS = 64 * 64
"""Smallest number of pixels of an image or tile with a thread of its own; Python's global lock slows smaller ones."""


def check_tile(tile: int | Literal["auto"] | None) -> None:
    """Check the side of tiles, as accepted by `derain.Restorer`.

    Raises:
        ArgumentError: If the side is below ``SMALLEST_TILE``.
    """
    if isinstance(tile, int) and tile < SMALLEST_TILE:
        raise ArgumentError(f"tile {tile}: must be at least {SMALLEST_TILE}, or auto, or none for whole images")


class Scheduler:
    """Runs a method on images in batches, threads and tiles that fit into memory.

    On a GPU, images of equal size are stacked to batches. On a CPU, several images are restored at once, each on its
    own thread, and PyTorch's threads are divided among the images. Images of fewer than ``SMALLEST_FOR_THREADS`` pixels
    do not get threads there; nor do any images if the network is compiled or runs in onnxruntime, or if the pass over
    the first image changed attributes of the method. Images without a thread are restored one by one.

    If memory runs out, the number of images or tiles at once is halved. If memory does not suffice for a single one,
    the side of the tiles is halved, unless ``tile`` is None. Number and side are remembered for each image size.

    Args:
        method: The method, on ``device`` and in eval mode.
        device: Device to run on.
        precision: ``float32`` or ``bf16`` (autocast).
        tile: Side of the tiles, ``auto`` or None, as for `derain.Restorer`.
        overlap: Minimum overlap of tiles in pixels.
        ensemble: Whether to average over flips and rotations.

    Attributes:
        stacks: Whether images are stacked to batches: on all devices but a CPU.
        threads: Largest number of images at once on a CPU; None: PyTorch's number of threads.
        largest_batch: Largest number of images or tiles at once.
        limits: Range to which the values of restored images are clipped.
    """

    def __init__(
        self,
        method: DerainModule,
        device: torch.device,
        precision: Precision,
        tile: int | Literal["auto"] | None,
        overlap: int,
        ensemble: bool,
    ) -> None:
        self.method, self.device, self.precision = method, device, precision
        self.tile, self.overlap, self.ensemble = tile, overlap, ensemble
        self.stacks = device.type != "cpu"
        self.threads: int | None = None
        self.largest_batch = LARGEST_BATCH
        self.limits = (0.0, 1.0)
        self._tile_sides: dict[tuple[int, int], int] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._stateless: bool | None = None
        self._stop = threading.Event()  # set while threads are stopped

    @torch.inference_mode()
    def run(
        self,
        images: Sequence[Shaped[Tensor, "3 _ _"]],
        forward: Callable[..., Tensor],
        conditions: dict[str, Any] | None = None,
    ) -> "list[Tensor | DerainError]":
        """Restore images of any sizes.

        Args:
            images: Images in [0, 1], or uint8, on any device.
            forward: ``forward`` or ``explain`` of the method.
            conditions: Result of ``encode`` for one image, used for all; by default each image is encoded.

        Returns:
            For each image in order, a tensor ``(n, h, w)`` with the ``n`` channels that ``forward`` returns: float32,
            on the device of the image, clipped to ``limits``, with NaN for values that are not finite. If the image
            cannot be restored, the DerainError instead.
        """
        results: list[Tensor | DerainError | None] = [None] * len(images)
        remaining = list(range(len(images)))
        if not self.stacks:
            for index, result in self._run_on_threads(images, forward, conditions):
                results[index] = result
            remaining = [index for index in remaining if results[index] is None]
        groups: dict[Any, list[int]] = defaultdict(list)
        for index in remaining:
            image = images[index]
            groups[image.shape, image.dtype, image.device].append(index)
        for indices in groups.values():
            restored = self._run_in_batches([images[index] for index in indices], forward, conditions)
            for index, result in zip(indices, restored, strict=True):
                results[index] = result
        return [result for result in results if result is not None]

    def run_batch(
        self,
        images: Shaped[Tensor, "b 3 h w"],
        forward: Callable[..., Tensor],
        conditions: dict[str, Any] | None = None,
    ) -> Float[Tensor, "b n h w"]:
        """Restore a batch of images as `run` does.

        Raises:
            DerainError: If an image cannot be restored.
        """
        restored = []
        for result in self.run(list(images), forward, conditions):
            if isinstance(result, DerainError):
                raise result
            restored.append(result)
        return torch.stack(restored)

    def images_at_once(self, height: int, width: int) -> int:
        """Return the number of images of this size that are restored at once: in a batch, or on threads."""
        if not self.stacks:
            return self._threads(height, width)
        return self._count(height, width)

    # Threads of a CPU.

    def _run_on_threads(
        self, images: Sequence[Tensor], forward: Callable[..., Tensor], conditions: dict[str, Any] | None
    ) -> Iterator[tuple[int, Tensor | DerainError]]:
        """Restore images on a thread each; yield indices and results.

        Skipped are images that are too large or too small for a thread, images for which memory runs out, and a single
        image. In the first call, the first image is restored alone; if that pass changes attributes of the method, all
        further images are skipped.
        """
        indices = [index for index, image in enumerate(images) if self._threads(*image.shape[1:]) > 1]
        if len(indices) < 2:
            return
        if self._stateless is None:
            first = indices.pop(0)
            watch = StateWatch(self.method)
            yield first, self._run_in_batches([images[first]], forward, conditions)[0]
            self._stateless = not watch.has_changed()
            if not self._stateless:
                log.info("%s: a pass changes its modules: restoring one image at a time", self.method.title)
        if not self._stateless:
            return

        def restore(index: int) -> "Tensor | DerainError | None":
            try:
                with torch.inference_mode():
                    return self._attempt([images[index]], forward, conditions, alone=False)[0]
            except _MemoryShortageError:
                return None

        count = min(self._threads(*images[index].shape[1:]) for index in indices)
        failed_sizes = []
        end_of_full_rounds = len(indices) // count * count
        for part in filter(None, (indices[:end_of_full_rounds], indices[end_of_full_rounds:])):
            results = on_threads(restore, part, min(count, len(part)), self._stop)
            for index, result in zip(part, results, strict=True):
                if result is None:
                    failed_sizes.append(images[index].shape[1:])
                else:
                    yield index, result
        for height, width in dict.fromkeys(map(tuple, failed_sizes)):
            self._reduce_count(height, width, count)

    def _threads(self, height: int, width: int) -> int:
        """Return the number of images of this size that are restored at once, each on a thread; 1 without threads."""
        compiled = self.method.network._compiled_call_impl is not None
        has_own_threads = next(self.method.parameters(), None) is None  # the network runs in onnxruntime
        small = height * width < SMALLEST_FOR_THREADS
        if self._stateless is False or compiled or has_own_threads or small:
            return 1
        return min(self.threads or torch.get_num_threads(), self._count(height, width))

    # Batches.

    def _run_in_batches(
        self, images: Sequence[Tensor], forward: Callable[..., Tensor], conditions: dict[str, Any] | None
    ) -> "list[Tensor | DerainError]":
        """Restore images of equal size in batches; one by one on a CPU, or if the conditions cannot be repeated."""
        results: list[Tensor | DerainError] = []
        if not images:
            return results
        height, width = images[0].shape[1:]
        single = not self.stacks or (conditions is not None and repeat(conditions, 1, 2) is None)
        while len(results) < len(images):
            count = 1 if single else self._count(height, width)
            batch = images[len(results) : len(results) + count]
            try:
                results += self._attempt(batch, forward, conditions, alone=len(batch) == 1)
                continue
            except _MemoryShortageError:
                pass  # leave the block first: the traceback refers to tensors, whose memory would not be released
            self._release()
            self._reduce_count(height, width, len(batch))
        return results

    def _attempt(
        self,
        images: Sequence[Shaped[Tensor, "3 h w"]],
        forward: Callable[..., Tensor],
        conditions: dict[str, Any] | None,
        *,
        alone: bool,
    ) -> "list[Tensor | DerainError]":
        """Restore a batch; if the method raises DerainError, restore the images one by one to find those that fail.

        ``alone`` means that nothing else is restored at the same time. If memory runs out, smaller tiles are tried if
        ``alone`` is true; otherwise, `_MemoryShortageError` is raised.
        """
        try:
            return list(self._restore_ensemble(images, forward, conditions, alone).unbind())
        except DerainError as error:
            if len(images) == 1:
                error.__cause__ = error.__context__ = None
                return [error.with_traceback(None)]  # the traceback refers to the tensors of the failed pass
        return [self._attempt([image], forward, conditions, alone=True)[0] for image in images]

    def _restore_ensemble(
        self,
        images: Sequence[Shaped[Tensor, "3 h w"]],
        forward: Callable[..., Tensor],
        conditions: dict[str, Any] | None,
        alone: bool,
    ) -> Float[Tensor, "b n h w"]:
        """Restore a batch; with ``ensemble``, average over its flips and rotations.

        Raises:
            DerainError: If memory does not suffice for an image that is restored alone.
            _MemoryShortageError: If memory runs out and ``alone`` is false.
        """
        source = images[0].device
        try:
            batch = self._batch(images)
            if conditions is None:
                conditions = self.method.encode(batch.to(self.device))
            elif len(batch) > 1:
                conditions = repeat(conditions, 1, len(batch)) or {}
            if not self.ensemble:
                return self._restore(batch, forward, conditions, alone).to(source)
            restored = []
            for quarter_turns, is_flipped in itertools.product(range(4), (False, True)):
                view = torch.rot90(batch.flip(3) if is_flipped else batch, quarter_turns, (2, 3))
                upright = torch.rot90(self._restore(view, forward, conditions, alone), -quarter_turns, (2, 3))
                restored.append(upright.flip(3) if is_flipped else upright)
            return torch.stack(restored).mean(0).to(source)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Raised outside the block above: the traceback of its error refers to tensors.
        if alone:
            height, width = images[0].shape[1:]
            raise DerainError(
                f"not enough memory for an image of {width}×{height} pixels on {self.device}; close other programs, "
                "reduce the image, or use device cpu"
            )
        raise _MemoryShortageError

    def _batch(self, images: Sequence[Shaped[Tensor, "3 h w"]]) -> Float[Tensor, "b 3 h w"]:
        """Return images of equal size as a batch in [0, 1], on the device unless they are restored in tiles."""
        batch = torch.stack(list(images)) if len(images) > 1 else images[0][None]
        if self._tile_side(*batch.shape[2:]) >= max(batch.shape[2:]):
            if self.device.type == "cuda" and not batch.is_cuda:
                batch = batch.pin_memory()
            batch = batch.to(self.device, non_blocking=True)
        return to_unit(batch)

    # Tiles.

    def _restore(
        self, images: Float[Tensor, "b 3 h w"], forward: Callable[..., Tensor], conditions: dict[str, Any], alone: bool
    ) -> Float[Tensor, "b n h w"]:
        """Restore a batch in tiles; if memory runs out and ``alone`` is true, in fewer tiles at once or smaller tiles.

        Raises:
            DerainError: If memory does not suffice for the smallest tile; with ``tile`` None, for the whole image.
            MemoryError, RuntimeError: If memory runs out and ``alone`` is false.
        """
        height, width = images.shape[2:]
        while True:
            tile = self._tile_side(height, width)
            tiles_per_pass = self._tiles_per_pass(images, conditions, tile, alone)
            try:
                if isinstance(self.method, Sampled):  # a sampler tiles each of its steps: all tiles share one state
                    tiled = partial(blend_tiles, tile=tile, overlap=self.overlap)
                    return self._forward(images, forward, conditions | {"tiled": tiled, "show": self._show_steps})
                run = partial(self._forward_tiles, forward=forward, conditions=conditions, count=len(images))
                return blend_tiles(images, run, tile, self.overlap, tiles_per_pass)
            except (MemoryError, RuntimeError) as error:
                if not alone or not is_out_of_memory(error):
                    raise
            if tiles_per_pass == 1 and (self.tile is None or tile // 2 < SMALLEST_TILE):
                raise DerainError(
                    f"not enough memory for a tile of {tile}×{tile} pixels on {self.device}; "
                    "close other programs, or use a smaller tile, tile auto or device cpu"
                )
            self._release()
            if tiles_per_pass > 1:
                self._reduce_count(height, width, tiles_per_pass)
                continue
            self._tile_sides[height, width] = tile // 2
            self._counts[height, width] = 1
            log.warning("out of memory: continuing with tiles of %d×%d pixels", tile // 2, tile // 2)

    def _tiles_per_pass(self, images: Tensor, conditions: dict[str, Any], tile: int, alone: bool) -> int:
        """Return the number of positions whose tiles are restored at once."""
        height, width = images.shape[2:]
        if isinstance(self.method, Sampled) or tile >= max(height, width) or repeat(conditions, len(images), 2) is None:
            return 1
        if self.stacks:
            fitting = max(1, self._count(height, width) // len(images))
            return min(fitting, tile_count(height, width, tile, self.overlap))
        small = min(tile, height) * min(tile, width) < SMALLEST_FOR_THREADS
        return self._threads(height, width) if alone and self._stateless and not small else 1

    def _forward_tiles(
        self,
        tiles: Float[Tensor, "kb 3 h w"],
        forward: Callable[..., Tensor],
        conditions: dict[str, Any],
        count: int,
    ) -> Float[Tensor, "kb n h w"]:
        """Restore tiles of ``count`` images at one or more positions: in one pass, or on a CPU on a thread each."""
        if not self.stacks and len(tiles) > count == 1:

            def restore(tile: Tensor) -> Tensor:
                with torch.inference_mode():
                    return self._forward(tile, forward, conditions)

            return torch.cat(list(on_threads(restore, tiles.chunk(len(tiles)), len(tiles), self._stop)))
        repeated = repeat(conditions, count, len(tiles) // count)
        return self._forward(tiles, forward, conditions if repeated is None else repeated)

    def _forward(
        self, tiles: Float[Tensor, "b 3 h w"], forward: Callable[..., Tensor], conditions: dict[str, Any]
    ) -> Float[Tensor, "b n h w"]:
        self._check_running()
        autocast: AbstractContextManager[object] = nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            derained = forward(tiles.to(self.device, memory_format=torch.channels_last), **conditions).float()
        # Clamping would turn infinity into white; NaN is reported when the whole image is checked.
        return torch.where(derained.isfinite(), derained.clamp(*self.limits), torch.nan).to(tiles.device)

    def _show_steps(self, steps: Iterable[T], total: int) -> Iterator[T]:
        """Yield the steps of sampling; on the main thread, show their progress on a terminal."""
        if threading.current_thread() is threading.main_thread():
            steps = track(steps, "Sampling", total)
        for step in steps:
            self._check_running()
            yield step

    def _check_running(self) -> None:
        """Raise CancelledError while threads are stopped, since their results are not used."""
        if self._stop.is_set():
            raise CancelledError

    # Memory.

    def _tile_side(self, height: int, width: int) -> int:
        """Return the side of the tiles for an image size; if no side of the image is longer, it is not divided."""
        if (height, width) not in self._tile_sides:
            self._tile_sides[height, width] = self._first_tile(height, width)
        return self._tile_sides[height, width]

    def _first_tile(self, height: int, width: int) -> int:
        if isinstance(self.tile, int):
            return self.tile
        longest, fitting = max(height, width), self._pixels_in_memory()
        if self.tile is None or height * width <= fitting:
            return longest
        multiple = self.method.tile_multiple
        tile = max(SMALLEST_TILE, min(longest, int(fitting**0.5)) // multiple * multiple)
        log.info("%d×%d pixels: restoring in tiles of %d×%d", width, height, tile, tile)
        return tile

    def _count(self, height: int, width: int) -> int:
        """Return the number of images of this size, or of their tiles, at once: what fits, up to ``largest_batch``."""
        if (height, width) not in self._counts:
            tile = self._tile_side(height, width)
            pixels = min(tile, height) * min(tile, width)
            self._counts[height, width] = max(1, min(self.largest_batch, self._pixels_in_memory() // pixels))
        return self._counts[height, width]

    def _pixels_in_memory(self) -> int:
        """Return the number of pixels that the method can restore at once in half of the available memory."""
        return memory_for(self.device) // 2 // self.method.bytes_per_pixel

    def _reduce_count(self, height: int, width: int, count: int) -> None:
        """Halve the number of images or tiles at once after ``count`` of them exceeded the memory."""
        self._counts[height, width] = max(1, count // 2)
        log.warning("out of memory: continuing with %d instead of %d at once", max(1, count // 2), count)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _MemoryShortageError(Exception):
    """Memory does not suffice for several images at once."""


def to_unit(images: Tensor) -> Tensor:
    """Return images, uint8 or floating point, as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def on_threads(
    function: Callable[[T], Any], items: Iterable[T], count: int, stop: threading.Event | None = None
) -> Iterator[Any]:
    """Yield the results of a function for items in order, computed on ``count`` threads.

    PyTorch's number of threads is divided among them.

    Args:
        function: Function of an item; it runs outside the caller's inference mode and autocast.
        items: Items.
        count: Number of threads.
        stop: Event that is set when the iteration ends, also by an exception, and cleared when the threads have ended.
            A function should check it to end early, since the iteration ends only after all started items.

    Example:
        >>> list(on_threads(lambda item: item + 1, [1, 2, 3], 2))
        [2, 3, 4]
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(max(1, threads // count),))
    try:
        yield from pool.map(function, items)
    finally:
        if stop:
            stop.set()
        pool.shutdown(cancel_futures=True)
        if stop:
            stop.clear()
        torch.set_num_threads(threads)  # new threads start with the value that was set last


def repeat(conditions: dict[str, Any], count: int, times: int) -> dict[str, Any] | None:
    """Return the conditions of ``count`` images for a batch that contains these images ``times`` times.

    Returns:
        The conditions without those that are None; or None if any other is not a tensor, list or tuple with one entry
        for each image.

    Example:
        >>> repeat({"routes": [0, 2]}, 2, 2), repeat({"routes": "ab"}, 1, 2)
        ({'routes': [0, 2, 0, 2]}, None)
    """
    repeated: dict[str, Any] = {}
    for name, value in conditions.items():
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == count:
            repeated[name] = torch.cat([value] * times)
        elif isinstance(value, list | tuple) and len(value) == count:
            repeated[name] = [*value] * times
        elif value is not None:
            return None
    return repeated


def memory_for(device: torch.device) -> int:
    """Return the bytes of memory available to a restoration: free CUDA memory; else free RAM, up to 4 GiB."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # unused by PyTorch
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(free_memory(), 4 << 30)
