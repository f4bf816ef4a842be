"""What every method inherits: evaluation and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.memory import give_back_blocks
from derain.methods.described import DescribedModule
from derain.methods.divergence import REMEDY
from derain.metrics import ImageQuality, Scores
from derain.metrics.perceptual import Lpips


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
    def from_published(cls, state: Mapping[str, Tensor]) -> "DerainModule | None":
        """Builds the method from its authors' state dict, or returns None when the keys are not theirs."""
        return None

    # Evaluation: image by image, judged in `derain.metrics`, never by the method itself.

    def _finish(self, stage: str) -> dict[str, dict[str, Scores]]:
        scores = {kind: quality.compute() for kind, quality in self._quality.items()}
        for place, (name, score) in enumerate(scores["derained"].items()):
            if self.resuming:
                self._require_numbers(name, score)
            prefix = stage if place == 0 else f"{stage}/{name}"
            self.log_dict(
                {f"{prefix}/psnr": float(score.psnr.mean()), f"{prefix}/ssim": float(score.ssim.mean())},
                prog_bar=place == 0 and stage == "val",
            )
            self.log(f"{prefix}/rainy_psnr", float(scores["rainy"][name].psnr.mean()))
            if score.lpips is not None and place == 0:
                self.log(f"{stage}/lpips", float(score.lpips.mean()))
        return scores

    def _require_numbers(self, protocol: str, score: Scores) -> None:
        """Refuse scores that are not finite."""
        finite = np.isfinite(np.asarray(score.psnr)) & np.isfinite(np.asarray(score.ssim))
        wrong = score.index[~finite].tolist()
        if wrong:
            pairs = getattr(getattr(self.trainer, "datamodule", None), "pairs", {}).get("val", ())
            image = pairs[wrong[0]].name if pairs else wrong[0]
            raise DerainError(
                f"val/psnr ({protocol}) is not finite for {len(wrong)} images, first {image}, at epoch "
                f"{self.current_epoch}, step {self.global_step}; {REMEDY}"
            )

    def _give_back_at(self, shape: torch.Size) -> None:
        """Hands memory back when images come in another size, which needs blocks of other sizes."""
        if shape != self._shape:
            give_back_blocks()
        self._shape = shape

    def on_validation_epoch_start(self) -> None:
        """Refuses early if something is missing; forgets the last epoch's scores."""
        self.check()
        kinds = ("derained", "rainy")
        self._quality = {kind: ImageQuality(self.protocols, self.lpips).to(self.device) for kind in kinds}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Judges an image; gives the derained image to callbacks."""
        self._give_back_at(batch["rainy"].shape)
        derained = self(batch["rainy"]).float()  # protocols clip as they say
        self._quality["derained"].update(derained, batch["clean"], batch["index"])
        self._quality["rainy"].update(batch["rainy"], batch["clean"], batch["index"])
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
        return {"derained": restored.float().clamp(0, 1), "perceived": perceived}
