"""Base class of the methods: their contract, evaluation and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.memory import release_freed_memory
from derain.methods.divergence import REMEDY, listed, position
from derain.methods.graph import Graph
from derain.methods.interfaces import Explains
from derain.methods.trainable import TrainableModule
from derain.metrics import ImageQuality, Scores
from derain.metrics.perceptual import Lpips
from derain.ranges import check_finite


class DerainModule(TrainableModule, ABC):
    """Base class of methods that remove rain.

    The contract, which `derain.testing.check_method` checks:

    - ``forward(rainy)`` accepts ``(b, 3, h, w)`` in [0, 1] with any ``h, w >= 1`` and returns the same shape. In eval
      mode it is deterministic, and the images of a batch do not influence each other. Values may leave [0, 1] a
      little; they are clipped where images are scored or written.
    - Every ``__init__`` argument has a type and a default and is recorded by ``self.save_hyperparameters()``: scalars,
      strings, lists and dictionaries only. Inference options such as a sampler are not among them.
    - ``self.network`` holds all that is restored from a weights file.
    - ``training_step`` returns a finite loss, and every parameter with ``requires_grad`` receives a gradient within an
      epoch. ``training_step`` and ``configure_optimizers`` belong to the method; evaluation, prediction, checkpoints
      and weights files are inherited.
    - What the method can do beyond that it says by the interfaces of `derain.methods.interfaces`.

    Attributes:
        protocols: Protocols that score validation and test images; the first one selects the best checkpoint.
        lpips: Perceptual metric that scores them too.
        scores: Scores of every test image by kind (``derained``, ``rainy``) and protocol.
        bytes_per_pixel: Memory of ``forward`` at inference in bytes a pixel, measured in float32.
        tile_multiple: Number that sides of tiles should be multiples of.
        compiles_any_size: Whether ``network`` is compiled once for all image sizes, else once for each.
        variants: Hyper-parameters of variants that ``derain bench`` counts, by name; by default the method as it is.
    """

    monitor: ClassVar[str] = "val/psnr"
    protocols: tuple[str, ...] = ("matlab-y",)
    lpips: Lpips | None = None
    scores: dict[str, dict[str, Scores]]
    bytes_per_pixel: int = 4096
    tile_multiple: int = 32
    compiles_any_size: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._quality: dict[str, ImageQuality] = {}
        self._shape: torch.Size | None = None

    @abstractmethod
    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images of any size ``h, w >= 1`` in [0, 1].

        A method whose ``encode`` returns conditions accepts them as further keyword arguments, and encodes the images
        itself if they are not given.
        """

    def encode(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """Return what ``forward`` is conditioned on when it restores tiles of these images; nothing by default."""
        return {}

    def check_requirements(self) -> None:
        """Find or fetch what ``encode`` needs.

        Raises:
            DerainError: If it is missing.
        """

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """Run what ``derain bench`` counts and times: by default ``forward``.

        Methods override it that run the network many times, or encode images by another network. Modules of the network
        may have a method ``extra_macs(inputs, output)``, which returns multiplications that counting misses: those of
        convolutions and linear layers, and those of attention.
        """
        return self(rainy)

    def export_graph(self) -> Graph:
        """Return the function that ``derain export`` writes: by default ``forward`` without conditions.

        A method that overrides it with a part of its computation implements `RunsGraph`.

        Raises:
            DerainError: If the method cannot be exported.
        """
        return Graph(self)

    def next_step(self, path: Path, option: str) -> str:
        """Return the command that restores photos with the weights of a finished training."""
        return f"restore photos: derain restore IN OUT --weights {path}{f' {option}' if option else ''}"

    # Evaluation.

    def on_validation_epoch_start(self) -> None:
        """Check requirements and reset the scores."""
        self.check_requirements()
        kinds = ("derained", "rainy")
        self._quality = {kind: ImageQuality(self.protocols, self.lpips).to(self.device) for kind in kinds}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Score images; return the derained ones for callbacks, or None if one is not finite."""
        self._release_memory(batch["rainy"].shape)
        derained = self(batch["rainy"]).float()
        finite = derained.flatten(1).isfinite().all(1)
        if not finite.all():  # refused when scores are gathered: other ranks would wait for one that stops here
            for quality in self._quality.values():  # a rank without any scores would break the gathering
                quality.update_failed(batch["index"][~finite])
            return None
        derained = derained.clamp(-1, 2)  # far outside [0, 1], where metrics suspect another range; protocols clip
        self._quality["derained"].update(derained, batch["clean"], batch["index"], batch["name"])
        self._quality["rainy"].update(batch["rainy"], batch["clean"], batch["index"], batch["name"])
        return {"derained": derained}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log ``val/psnr`` and ``val/ssim``, means over the images of all devices."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the means and keep the scores of every image for callbacks."""
        self.scores = self._log_scores("test")

    def _log_scores(self, stage: str) -> dict[str, dict[str, Scores]]:
        scores = {kind: quality.compute() for kind, quality in self._quality.items()}
        self._require_finite(stage, next(iter(scores["derained"].values())))
        for index, (protocol, score) in enumerate(scores["derained"].items()):
            prefix = stage if index == 0 else f"{stage}/{protocol}"
            means = {f"{prefix}/psnr": float(score.psnr.mean()), f"{prefix}/ssim": float(score.ssim.mean())}
            self.log_dict(means, prog_bar=index == 0 and stage == "val")
            self.log(f"{prefix}/rainy_psnr", float(scores["rainy"][protocol].psnr.mean()))
            if score.lpips is not None and index == 0:
                self.log(f"{stage}/lpips", float(score.lpips.mean()))
        return scores

    def _require_finite(self, stage: str, scores: Scores) -> None:
        """Refuse images without a score; all ranks know of them once scores are gathered.

        Raises:
            DerainError: If a derained image was not finite.
        """
        failed = scores.index[np.isnan(scores.psnr)].tolist()
        if not failed:
            return
        pairs = getattr(getattr(self.trainer, "datamodule", None), "pairs", {}).get(stage, ())
        names = [pairs[index].name if pairs else str(index) for index in failed]
        if self.is_fitting:
            raise DerainError(f"derained image is not finite at {position(self, names)}; {REMEDY}")
        raise DerainError(f"{listed(names)}: derained image is not finite; use other weights")

    def _release_memory(self, shape: torch.Size) -> None:
        """Release cached memory when the image size changes, which needs blocks of other sizes."""
        if shape != self._shape:
            release_freed_memory()
        self._shape = shape

    # Prediction.

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Restore images into [0, 1], with maps if the method explains itself; return them and the conditions."""
        self.check_requirements()
        rainy = batch["rainy"]
        self._release_memory(rainy.shape)
        conditions = self.encode(rainy)
        if isinstance(self, Explains) and self.explaining:
            restored = self.explain(rainy, **conditions)
        else:
            restored = self(rainy, **conditions)
        check_finite(restored, f"{', '.join(batch['name'])}: derained image")
        return {"derained": restored.float().clamp(0, 1), "conditions": conditions}
