"""Metric of torchmetrics: PSNR, SSIM and LPIPS of each image, on one device or several."""

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
    """PSNR and SSIM of every image of a data set by named protocols, and optionally LPIPS.

    Scores are stored per image; squared errors are never pooled over images. Devices may have different numbers of
    images, and an image that several devices evaluated counts once. So the result equals that of a single device.

    Args:
        protocols: Names of protocols or groups, see :func:`derain.metrics.resolve`.
        lpips: LPIPS metric; by default, LPIPS is not computed.

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
        super().__init__(compute_with_cache=False)  # `update_failed` would not clear the cache
        self.lpips = lpips
        self.set_dtype(torch.float64)
        self.protocols = resolve(protocols)
        # A row has the index, PSNR and SSIM by each protocol, and LPIPS if computed. Rows are flattened, since
        # torchmetrics gathers a flat empty state from a device without images.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        derained: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"],
        clean: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"],
        index: Int[Tensor, " b"],
        names: Sequence[str] = (),
    ) -> None:
        """Score a batch of images.

        Args:
            derained: ``(b, 3, h, w)``, uint8, or float32 or float64 in [0, 1]. Values may exceed this range by up to 1;
                do not clamp them, since each protocol clips in its own way.
            clean: Same shape; uint8, or float32 or float64 in [0, 1].
            index: ``(b,)``, index of each image in the data set.
            names: Names of the images in messages; their indices by default.

        Raises:
            DerainError: If shapes differ, or images have another type, are out of range, or are too small for a
                protocol or LPIPS.
        """
        for images in (derained, clean):
            if images.dtype not in {torch.uint8, torch.float32, torch.float64}:
                raise DerainError(
                    f"image type {images.dtype} is not supported; expected uint8, float32 or float64; "
                    "evaluate with --trainer.precision 32-true or a mixed precision"
                )
        derained_arrays, clean_arrays = (images.detach().cpu().movedim(1, -1).numpy() for images in (derained, clean))
        indices = index.tolist()
        names = names or [f"image {image_index}" for image_index in indices]
        for name, x, y in zip(names, derained_arrays, clean_arrays, strict=True):
            check_values(x, y, name)
        rows = []
        for image_index, x, y in zip(indices, derained_arrays, clean_arrays, strict=True):
            row = [float(image_index)]
            for protocol in self.protocols:
                row += psnr_ssim(x, y, protocol)
            if self.lpips is not None:
                row.append(self.lpips(x, y))
            rows.append(row)
        self._append(rows)

    def update_failed(self, index: Int[Tensor, " b"]) -> None:
        """Record images that cannot be scored: their scores are NaN.

        Args:
            index: ``(b,)``, index of each image in the data set.
        """
        missing = [float("nan")] * (self._columns - 1)
        self._append([[float(image_index), *missing] for image_index in index.tolist()])

    @property
    def update_called(self) -> bool:
        """Whether images were recorded; torchmetrics counts calls of `update` alone, and not of `update_failed`."""
        return len(self.rows) > 0

    @property
    def _columns(self) -> int:
        return 1 + 2 * len(self.protocols) + (self.lpips is not None)

    def _append(self, rows: list[list[float]]) -> None:
        # MPS has no float64.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.rows.append(torch.tensor(rows, dtype=torch.float64, device=device).flatten())

    def compute(self) -> dict[str, Scores]:
        """Return the scores of all images on all devices, by the name of the protocol."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        table = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, np.float64).reshape(-1, self._columns)
        index, first_rows = np.unique(table[:, 0].astype(np.int64), return_index=True)
        table = table[first_rows]
        lpips = None if self.lpips is None else table[:, -1]
        scores = {}
        for protocol_index, protocol in enumerate(self.protocols):
            psnr, ssim = table[:, 1 + 2 * protocol_index], table[:, 2 + 2 * protocol_index]
            scores[protocol.name] = Scores(index, psnr, ssim, lpips)
        return scores
