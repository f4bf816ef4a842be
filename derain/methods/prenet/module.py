"""Lightning module of PReNet and its ablations."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.prenet.network import (
    VARIANTS,
    PReNet,
    PublishedNetwork,
    Variant,
    is_real_rain_network,
    published_network,
    variant_of,
)
from derain.nn.schedule import multiplied_at
from derain.nn.ssim import structural_similarity

log = logging.getLogger("derain")


class PReNetModule(DerainModule):
    """PReNet and its ablations (Ren et al., Progressive Image Deraining Networks, CVPR 2019).

    Trained by the negative SSIM of the last stage with Adam; the learning rate drops at the milestones.

    Args:
        variant: ``PReNet``; ``PReNet_r``, which applies one residual block five times; ``PRN`` and ``PRN_r``, the same
            two without a recurrent layer; ``PReNet_LSTM``, a PReNet whose stages output the image, not the residual.
        stages: Number of stages, 1 to 100; paper: 6.
        learning_rate: Learning rate of Adam; section 4 of the paper: 1e-3.
        milestones: Epochs after which the learning rate is multiplied by ``decay``; paper: 30, 50, 80 of 100.
        decay: Factor at the milestones; paper: 0.2.

    Raises:
        DerainError: If the number of stages is out of its range.
    """

    bounded_by_file: ClassVar[bool] = True
    bytes_per_pixel: int = 1600
    published_options: ClassVar[frozenset[str]] = frozenset({"variant", "stages"})
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {variant: {"variant": variant} for variant in VARIANTS}

    def __init__(
        self,
        variant: Variant = "PReNet",
        stages: int = 6,
        learning_rate: float = 1e-3,
        milestones: Sequence[int] = (30, 50, 80),
        decay: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.milestones, self.decay = learning_rate, milestones, decay
        network = PReNet(stages=stages, **VARIANTS[variant])
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size."""
        return cast(Tensor, self.network(rainy))

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "DerainModule | None":
        """Return the method with the authors' weights, such as ``net_latest.pth``, or None for other tensors.

        The tensors determine neither the number of stages nor whether the network is a ``PReNet_LSTM``. Options take
        precedence, then the name of the folder (`published_network`). Without both, 6 stages are assumed, and PReNet
        rather than ``PReNet_LSTM``, with a warning.

        Raises:
            DerainError: If the variant does not fit the tensors, or the number of stages is not an integer from 1 to
                100; or if the file is from the authors' folder ``logs/real``, whose architecture is not supported, and
                no options are given.
        """
        variant_of_tensors = variant_of(state)
        if variant_of_tensors is None:
            return None
        if path is not None and not options and is_real_rain_network(path):
            raise DerainError(
                f"{path}: is from the authors' folder logs/real; its network has the tensors of PReNet but a different "
                "architecture, which derain does not support; use the weights of another folder"
            )
        folder_network = published_network(path) if path is not None else None
        network = folder_network or PublishedNetwork(variant_of_tensors, 6)
        variant = options.get("variant", network.variant)
        stages = options.get("stages", network.stages)
        possible = {variant_of_tensors, "PReNet_LSTM"} if variant_of_tensors == "PReNet" else {variant_of_tensors}
        if variant not in possible or not isinstance(stages, int):
            raise DerainError(
                f"{path}: variant {variant}, stages {stages}: expected variant {' or '.join(sorted(possible))} and an "
                "integer number of stages; use FILE:stages=N,variant=NAME"
            )
        module = cls(variant=variant, stages=stages)
        module.network.load_state_dict(dict(state), strict=True)
        if folder_network or options:
            log.info("%s: %s with %d stages", path, variant, stages)
        elif len(possible) > 1:
            log.warning(
                "%s: the file records neither the variant nor the number of stages; assuming %s with %d stages; to "
                "change them, use FILE:stages=N,variant=PReNet_LSTM",
                path,
                variant,
                stages,
            )
        else:
            log.warning(
                "%s: the file does not record the number of stages; assuming %s with %d stages; to change "
                "it, use FILE:stages=N",
                path,
                variant,
                stages,
            )
        return module

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the negative SSIM of the derained images."""
        loss = -structural_similarity(self(batch["rainy"]), batch["clean"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["name"]))
        return loss

    def configure_optimizers(self) -> Any:
        """Return Adam and a schedule that multiplies the learning rate by ``decay`` at the milestones."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplied_at(self.milestones, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": schedule}
