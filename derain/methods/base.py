"""What every method inherits: evaluation and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.memory import release_freed_memory
from derain.methods.described import DescribedModule
from derain.methods.divergence import REMEDY, listed, position
from derain.metrics import ImageQuality, Scores
from derain.metrics.perceptual import Lpips
from derain.ranges import check_finite


class DerainModule(DescribedModule, ABC):
    """Base of the methods: a subclass builds ``self.network`` and owns its training.

    A subclass defines ``training_step`` and ``configure_optimizers``. Everything else is here.

    Attributes:
        maps: Names of the maps that ``explain`` adds.
        explaining: Whether ``predict_step`` gives them too.
        protocols, lpips: How validation and test images are judged; the first protocol names the best checkpoint.
        bytes_per_pixel: Memory that ``forward`` takes for one pixel at inference, measured in float32.
        tile_multiple: What sides of tiles should be multiples of.
        compiles_any_size: Whether ``network`` is compiled once for all sizes, else once a size.
        samples: Whether ``forward`` runs the network many times: it then cuts tiles itself, each time (argument
            ``tiled``), and tells its steps (``show``).
        sampling: How a method that samples does so, no part of its files; none for others.
        published_options: Hyper-parameters that the authors' files do not record.
    """

    judged_by: ClassVar[str] = "val/psnr"
    maps: tuple[str, ...] = ()
    explaining: bool = False
    protocols: tuple[str, ...] = ("matlab-y",)
    lpips: Lpips | None = None
    bytes_per_pixel: ClassVar[int] = 4096
    tile_multiple: ClassVar[int] = 32
    compiles_any_size: ClassVar[bool] = True
    samples: ClassVar[bool] = False
    sampling: Any = None
    published_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self._quality: dict[str, ImageQuality] = {}
        self._shape: torch.Size | None = None

    @abstractmethod
    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restores images of any size ``h, w >= 1`` in [0, 1]; the result may leave the range a little.

        A method that perceives images as a whole takes what ``perceive`` gave as further arguments.
        """

    def perceive(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """What ``forward`` must know of whole images when it is given parts of them; nothing by default."""
        return {}

    def check(self) -> None:
        """Refuses early if something that perceiving needs cannot be had."""

    def sample_by(self, sampling: Any) -> None:
        """Chooses how a method that samples does so.

        Raises:
            DerainError: If it does not sample.
        """
        if self.sampling is None:
            raise DerainError(f"{type(self).__name__} restores in one pass; leave out solver, steps and seed")
        self.sampling = sampling

    def take_route(self, route: int) -> None:
        """Lets all images take one route, of methods that have routes; others raise a DerainError."""
        raise DerainError(f"--route {route}: {type(self).__name__} has no routes; leave it out")

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """One pass of the network without what surrounds it, for counting and timing."""
        return self.network(rainy)

    def explain(self, rainy: Float[Tensor, "b 3 h w"], **perceived: Any) -> Float[Tensor, "b n h w"]:
        """The derained image and, after its three channels, ``maps`` in [0, 1] that show how it came about."""
        return cast(Tensor, self(rainy, **perceived))

    def describe_image(self, perceived: dict[str, Any], place: int) -> dict[str, Any]:
        """What was perceived of one image of a batch, for people and programs to read."""
        return {}

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "DerainModule | None":
        """Return the method with its authors' state dict, or None when the keys are not theirs.

        Args:
            state: The tensors by the authors' names.
            path: The file, whose folder may name what the tensors do not.
            options: Of `published_options`, what a user knows of the file.
        """
        return None

    # Evaluation: image by image, judged in `derain.metrics`, never by the method itself.

    def _finish(self, stage: str) -> dict[str, dict[str, Scores]]:
        scores = {kind: quality.compute() for kind, quality in self._quality.items()}
        self._require_scores(stage, next(iter(scores["derained"].values())))
        for place, (name, score) in enumerate(scores["derained"].items()):
            prefix = stage if place == 0 else f"{stage}/{name}"
            self.log_dict(
                {f"{prefix}/psnr": float(score.psnr.mean()), f"{prefix}/ssim": float(score.ssim.mean())},
                prog_bar=place == 0 and stage == "val",
            )
            self.log(f"{prefix}/rainy_psnr", float(scores["rainy"][name].psnr.mean()))
            if score.lpips is not None and place == 0:
                self.log(f"{stage}/lpips", float(score.lpips.mean()))
        return scores

    def _require_scores(self, stage: str, gathered: Scores) -> None:
        """Refuse images without a score, which all ranks know of once scores are gathered.

        Raises:
            DerainError: If a derained image was not finite.
        """
        failed = gathered.index[np.isnan(gathered.psnr)].tolist()
        if not failed:
            return
        pairs = getattr(getattr(self.trainer, "datamodule", None), "pairs", {}).get(stage, ())
        names = [pairs[index].name if pairs else str(index) for index in failed]
        if self.resuming:
            raise DerainError(f"derained image is not finite at {position(self, names)}; {REMEDY}")
        raise DerainError(f"{listed(names)}: derained image is not finite; use other weights")

    def _give_back_at(self, shape: torch.Size) -> None:
        """Hands memory back when images come in another size, which needs blocks of other sizes."""
        if shape != self._shape:
            release_freed_memory()
        self._shape = shape

    def on_validation_epoch_start(self) -> None:
        """Refuses early if something is missing; forgets the last epoch's scores."""
        self.check()
        kinds = ("derained", "rainy")
        self._quality = {kind: ImageQuality(self.protocols, self.lpips).to(self.device) for kind in kinds}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Score an image; return the derained image for callbacks, or None where it is not finite."""
        self._give_back_at(batch["rainy"].shape)
        derained = self(batch["rainy"]).float()
        finite = derained.flatten(1).isfinite().all(1)
        if not finite.all():  # refused when scores are gathered: the other ranks would wait for one that stops here
            for quality in self._quality.values():  # a rank without any scores would break the gathering
                quality.update_failed(batch["index"][~finite])
            return None
        derained = derained.clamp(-1, 2)  # far outside [0, 1], where metrics suspect another range; protocols clip
        self._quality["derained"].update(derained, batch["clean"], batch["index"], batch["name"])
        self._quality["rainy"].update(batch["rainy"], batch["clean"], batch["index"], batch["name"])
        return {"derained": derained}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/psnr`` and ``val/ssim``, means of images over all devices."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Logs the means and keeps ``self.scores[kind][protocol]`` of every image for callbacks."""
        self.scores = self._finish("test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Restores images into [0, 1], with maps where they are wanted, and says what was perceived."""
        self.check()
        self._give_back_at(batch["rainy"].shape)
        perceived = self.perceive(batch["rainy"])
        restored = (self.explain if self.explaining else self)(batch["rainy"], **perceived)
        check_finite(restored, f"{', '.join(batch['name'])}: derained image")
        return {"derained": restored.float().clamp(0, 1), "perceived": perceived}
