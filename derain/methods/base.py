"""Base class of rain removal methods: contract, evaluation and prediction."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.memory import release_freed_memory
from derain.methods.divergence import REMEDY, join_names, position
from derain.methods.graph import Graph
from derain.methods.interfaces import Explains
from derain.methods.trainable import TrainableModule
from derain.metrics import ImageQuality, Scores
from derain.metrics.full_reference import mean_scores
from derain.metrics.perceptual import Lpips
from derain.metrics.temporal_quality import TemporalQuality
from derain.ranges import check_finite

log = logging.getLogger("derain")


class DerainModule(TrainableModule, ABC):
    """Base class of rain removal methods.

    `derain.testing.check_method` checks most of this contract:

    - ``forward(rainy)`` accepts ``(b, 3, h, w)`` in [0, 1] with any ``h, w >= 1`` and returns the same shape. In eval
      mode it is deterministic, and the images of a batch do not influence each other. Values may lie slightly outside
      [0, 1]; they are clipped when images are scored or written.
    - Every ``__init__`` argument has a type and a default and is recorded by ``self.save_hyperparameters()``: scalars,
      strings, lists and dictionaries only. Inference options, such as the sampler, are not ``__init__`` arguments.
    - ``self.network`` is a module whose state dict is what a weights file stores.
    - Losses are finite. In training, all parameters with ``requires_grad`` receive gradients.

    A method defines ``network``, ``forward``, ``training_step`` and ``configure_optimizers``; it inherits evaluation,
    prediction, checkpoints and weights files. For further capabilities, it also derives from interfaces in
    `derain.methods.interfaces`.

    Attributes:
        monitor: Logged validation metric that selects the best checkpoint; by default PSNR by the first of the
            ``protocols``.
        protocols: Names of the protocols that score validation and test images.
        lpips: Perceptual metric that also scores these images; None: no perceptual metric.
        scores: Scores of all images of the last test, by kind (``derained``, ``rainy``) and protocol; set by a test.
        temporal: Whether a test also computes flicker and warping error of videos.
        temporal_scores: Flicker and warping error of the last test with ``temporal``, by the index of the later of two
            frames; None before such a test.
        bytes_per_pixel: Memory that ``forward`` needs at inference, in bytes per image pixel, in float32.
        restore_batch: Function that restores the images of a batch, such as `derain.batching.Scheduler.run_batch`. Its
            arguments are the images, a function such as ``forward``, and the conditions or None. None: ``forward``
            restores the batch in one pass.
        tile_multiple: Tile sides should be multiples of this number of pixels.
        compiles_any_size: Whether one compilation of ``network`` serves all image sizes; if not, it is compiled for
            each size.
        variants: Hyper-parameters of the variants that ``derain bench`` counts, by name. A class that does not define
            ``variants`` itself has one variant, with the default hyper-parameters.
    """

    monitor: ClassVar[str] = "val/psnr"
    protocols: tuple[str, ...] = ("matlab-y",)
    lpips: Lpips | None = None
    scores: dict[str, dict[str, Scores]]
    temporal: bool = False
    temporal_scores: dict[int, dict[str, float | None]] | None = None
    restore_batch: Callable[..., Tensor] | None = None
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

        If ``encode`` returns conditions, ``forward`` also accepts them as keyword arguments. Without them, ``forward``
        calls ``encode`` itself.
        """

    def encode(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """Return conditions of whole images, such as embeddings, by name; empty by default.

        ``forward`` receives them with each tile of an image.
        """
        return {}

    def fetch_requirements(self) -> None:
        """Find or download the models that ``encode`` needs; by default there are none.

        Raises:
            DerainError: If a model is not available.
        """

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """Run the computation that ``derain bench`` counts and times; by default ``forward``.

        Override it if ``forward`` runs the network many times or encodes images by another network.

        ``derain bench`` counts convolutions and linear layers. A submodule can correct the counts by a method
        ``extra_macs(inputs, output)``, which returns two numbers of multiplications to add: those that the package thop
        counts in the authors' code but ``derain bench`` does not, and those that thop misses, such as attention.
        Negative numbers are subtracted.
        """
        return self(rainy)

    def export_graph(self) -> Graph:
        """Return the function that ``derain export`` writes; by default ``forward`` without conditions.

        A diffusion whose exported graph is its network implements `RunsGraph`.

        Raises:
            DerainError: If the method cannot be exported; never by default.
        """
        return Graph(self)

    def usage_hint(self, path: Path, option: str) -> str:
        """Return the command that restores photos with the weights of a finished training.

        Args:
            path: The weights file.
            option: ``--method CLASS_PATH`` if commands need it to load the file, else empty.
        """
        return f"restore photos: derain restore IN OUT --weights {path}{f' {option}' if option else ''}"

    # Evaluation.

    def on_validation_epoch_start(self) -> None:
        """Find or download the models that ``encode`` needs, and reset the scores.

        Raises:
            DerainError: If `fetch_requirements` fails.
        """
        self.fetch_requirements()
        kinds = ("derained", "rainy")
        self._quality = {kind: ImageQuality(self.protocols, self.lpips).to(self.device) for kind in kinds}

    def on_test_epoch_start(self) -> None:
        """Find or download the models that ``encode`` needs, and reset the scores.

        Raises:
            DerainError: If `fetch_requirements` fails, or ``temporal`` is true and there are no videos.
        """
        self.on_validation_epoch_start()
        if self.temporal:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self._temporal_quality = TemporalQuality(data.consecutive_frames("test")).to(self.device)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Score the derained and the rainy images of a batch.

        Returns:
            ``derained``, ``(b, 3, h, w)`` clipped to [-1, 2], for callbacks; None if a value is not finite.

        Raises:
            DerainError: If `ImageQuality` cannot score an image, such as one that is too small for a protocol.
        """
        self._release_memory(batch["rainy"].shape)
        derained = self._restore(batch["rainy"], self).float()
        finite = derained.flatten(1).isfinite().all(1)
        if not finite.all():  # reported when scores are gathered; if one rank raised here, the others would wait for it
            for quality in self._quality.values():  # both kinds must have scores of the same images
                quality.update_failed(batch["index"][~finite])
            return None
        derained = derained.clamp(-1, 2)  # metrics refuse other ranges, such as 0 to 255; protocols clip to [0, 1]
        self._quality["derained"].update(derained, batch["clean"], batch["index"], batch["name"])
        self._quality["rainy"].update(batch["rainy"], batch["clean"], batch["index"], batch["name"])
        return {"derained": derained}

    def test_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Score a batch as in validation; if ``temporal`` is true, also compare consecutive frames.

        Returns:
            As for `validation_step`.

        Raises:
            DerainError: If `ImageQuality` or `TemporalQuality` cannot score an image.
        """
        restored = self.validation_step(batch, batch_idx)
        if self.temporal and restored is not None:
            self._temporal_quality.update(restored["derained"], batch["rainy"], batch["clean"], batch["index"])
        return restored

    def on_validation_epoch_end(self) -> None:
        """Log means over the images of all devices: ``val/psnr``, ``val/ssim``, ``val/rainy_psnr``.

        Means by further protocols are logged as ``val/PROTOCOL/psnr`` and so on, LPIPS as ``val/lpips``. With several
        data sets, the means of each are also logged, as ``val/SET/psnr`` or ``val/PROTOCOL/SET/psnr`` and so on. With
        ``--data.val_mean sets``, the means without a set's name are the averages of the sets' means.

        Raises:
            DerainError: If a derained image is not finite.
        """
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log means under ``test/``, and store the scores of every image in ``scores``.

        Keys are as in validation. Means without a set's name are always over all images: ``val_mean`` does not apply.
        With ``temporal``, flicker and warping error are stored in ``temporal_scores``.

        Raises:
            DerainError: If a derained image is not finite.
        """
        self.scores = self._log_scores("test")
        if self.temporal:
            self.temporal_scores = self._temporal_quality.compute()

    def _log_scores(self, stage: str) -> dict[str, dict[str, Scores]]:
        scores = {kind: quality.compute() for kind, quality in self._quality.items()}
        self._require_finite(stage, next(iter(scores["derained"].values())))
        data: Any = getattr(self.trainer, "datamodule", None)
        sets = data.data_sets(stage) if hasattr(data, "data_sets") else {}
        for protocol_index, protocol in enumerate(scores["derained"]):
            prefix = stage if protocol_index == 0 else f"{stage}/{protocol}"
            derained_scores, rainy_scores = scores["derained"][protocol], scores["rainy"][protocol]
            if protocol_index > 0:
                derained_scores = dataclasses.replace(derained_scores, lpips=None)  # independent of the protocol
            means = mean_scores(derained_scores, rainy_scores)
            by_set = {name: mean_scores(derained_scores, rainy_scores, indices) for name, indices in sets.items()}
            for name, values in by_set.items():
                self.log_dict({f"{prefix}/{name}/{key}": value for key, value in values.items()})
            if by_set and stage == "val" and data.val_mean == "sets":
                evaluated = [values for values in by_set.values() if values]
                means = {key: sum(values[key] for values in evaluated) / len(evaluated) for key in means}
            in_bar = {f"{prefix}/{key}": means.pop(key) for key in ("psnr", "ssim")}
            self.log_dict(in_bar, prog_bar=protocol_index == 0 and stage == "val")
            self.log_dict({f"{prefix}/{key}": value for key, value in means.items()})
        return scores

    def _require_finite(self, stage: str, scores: Scores) -> None:
        """Check that every image has a score. All ranks have the same scores, so either all of them raise or none.

        Args:
            stage: ``val`` or ``test``.
            scores: Scores of the derained images of all ranks; NaN for images with values that are not finite.

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
        raise DerainError(f"{join_names(names)}: derained image is not finite; use other weights")

    def _release_memory(self, shape: torch.Size) -> None:
        """Release cached memory if the shape of the batch changed: the cached blocks may not fit the new shape."""
        if shape != self._shape:
            release_freed_memory()
        self._shape = shape

    # Prediction.

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Restore a batch of images.

        Returns:
            A dictionary with three entries. ``derained``: ``(b, 3, h, w)`` in [0, 1]; if the method `Explains` and
            ``explaining`` is true, its maps are further channels. ``conditions``: the result of ``encode`` for each
            image if ``explaining`` is true, otherwise empty. ``errors``: messages about derained images with values
            that are not finite, by index in the batch; they are also logged as warnings.

        Raises:
            DerainError: If a model that ``encode`` needs is not available, or ``restore_batch`` fails, for example for
                lack of memory.
        """
        self.fetch_requirements()
        rainy = batch["rainy"]
        self._release_memory(rainy.shape)
        conditions: list[dict[str, Any]] = []
        if isinstance(self, Explains) and self.explaining:
            images = [image[None] for image in rainy]
            conditions = [self.encode(image) for image in images]
            maps = [self._restore(image, self.explain, known) for image, known in zip(images, conditions, strict=True)]
            restored = torch.cat(maps)
        else:
            restored = self._restore(rainy, self)
        errors: dict[int, str] = {}
        for index, (image, name) in enumerate(zip(restored, batch["name"], strict=True)):
            try:
                check_finite(image, f"{name}: derained image")
            except DerainError as error:
                errors[index] = str(error)
                log.warning("%s", error)
        return {"derained": restored.float().clamp(0, 1), "conditions": conditions, "errors": errors}

    def _restore(
        self, rainy: Tensor, forward: Callable[..., Tensor], conditions: dict[str, Any] | None = None
    ) -> Tensor:
        """Restore a batch by ``restore_batch``, or, if ``restore_batch`` is None, by one call of ``forward``."""
        if self.restore_batch is not None:
            return self.restore_batch(rainy, forward, conditions)
        return forward(rainy, **(conditions or {}))
