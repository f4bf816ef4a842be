"""Scores collected image by image during evaluation, on one device or many."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchmetrics import Metric

from derain.errors import DerainError

from .full_reference import Scores, check_values, psnr_ssim
from .perceptual import Lpips
from .protocols import resolve


class ImageQuality(Metric):
    """PSNR and SSIM of every image of a set under named protocols.

    Values are kept per image, never pooled. Devices may hold different numbers of images; an image that
    several devices were given (samplers pad) counts once. The result is that of a single device to the last
    digit.

    Args:
        protocols: Names that :func:`derain.metrics.resolve` knows.
        lpips: Also compares by this, on whole images in floating point.

    Example:
        >>> quality = ImageQuality(["matlab-y"])
        >>> clean = torch.rand(2, 3, 24, 32)
        >>> quality.update(clean * 0.9, clean, torch.tensor([1, 0]))
        >>> quality.compute()["matlab-y"].index.tolist()
        [0, 1]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, protocols: Sequence[str] = ("matlab-y",), lpips: Lpips | None = None) -> None:
        super().__init__()
        self.lpips = lpips
        self.set_dtype(torch.float64)
        self.protocols = resolve(protocols)
        # index, then PSNR and SSIM of each protocol, then LPIPS if wanted; flat, as is the empty state that
        # torchmetrics sends for a device without images.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        derained: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"],
        clean: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"],
        index: Int[Tensor, " b"],
        names: Sequence[str] = (),
    ) -> None:
        """Judges images.

        Args:
            derained: uint8, or float32 or float64 in [0, 1]; not clamped, protocols do so as they say.
            clean: The same.
            index: Place of each image in its set.
            names: What messages call the images; their index if not given.

        Raises:
            DerainError: If images are in half precision, not in [0, 1], or too small for a protocol.
        """
        for images in (derained, clean):
            if images.dtype not in {torch.uint8, torch.float32, torch.float64}:
                raise DerainError(
                    f"images to judge must be uint8, float32 or float64, got {images.dtype}; "
                    "evaluate in 32-true or mixed precision"
                )
        arrays = (images.detach().cpu().movedim(1, -1).numpy() for images in (derained, clean))
        pairs = list(zip(*arrays, strict=True))
        for name, (x, y) in zip(names or [f"image {number}" for number in index.tolist()], pairs, strict=True):
            check_values(x, y, name)
        rows = [
            [
                float(place),
                *(value for protocol in self.protocols for value in psnr_ssim(x, y, protocol)),
                *([] if self.lpips is None else [self.lpips(x, y)]),
            ]
            for place, (x, y) in zip(index.tolist(), pairs, strict=True)
        ]
        self._append(rows)

    def update_failed(self, index: Int[Tensor, " b"]) -> None:
        """Record images that cannot be scored: their scores are NaN.

        Args:
            index: Index of each image in its set.
        """
        columns = 2 * len(self.protocols) + (self.lpips is not None)
        self._append([[float(number)] + [float("nan")] * columns for number in index.tolist()])

    def _append(self, rows: list[list[float]]) -> None:
        # MPS has no float64.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.rows.append(torch.tensor(rows, dtype=torch.float64, device=device).flatten())

    def compute(self) -> dict[str, Scores]:
        """Gives the scores of all images of all devices, by protocol."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        table = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, np.float64)
        table = table.reshape(-1, 1 + 2 * len(self.protocols) + (self.lpips is not None))
        index, first = np.unique(table[:, 0].astype(np.int64), return_index=True)
        table = table[first]
        lpips = None if self.lpips is None else table[:, -1]
        return {
            protocol.name: Scores(index, table[:, 1 + 2 * place], table[:, 2 + 2 * place], lpips)
            for place, protocol in enumerate(self.protocols)
        }
