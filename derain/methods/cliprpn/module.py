"""Lightning module of CLIP-RPN: routes of images, loss with a scheduled exponent, route counts."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NotRequired, cast

import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.files.metadata import Metadata
from derain.methods.base import DerainModule
from derain.methods.cliprpn.loss import (
    MaskScaling,
    Reconstruction,
    Smoothing,
    exponent,
    mask_loss,
    rain_mask,
    reconstruction_loss,
)
from derain.methods.cliprpn.network import CLIPRPN, LEVELS, Interaction, mask_maps
from derain.methods.cliprpn.perception import RainPerception, Similarity
from derain.methods.cliprpn.prompts import texts_of
from derain.methods.cliprpn.routing import Routing
from derain.methods.graph import Graph
from derain.methods.interfaces import Explains, Routed
from derain.methods.trainable import TrainableModule
from derain.nn.schedule import warm_up_then_cosine
from derain.progress import track

log = logging.getLogger("derain")


class CLIPRPNMetadata(Metadata):
    """Metadata of `CLIPRPNModule`.

    Attributes:
        clip_sha256: Hash of the CLIP that chose the routes in training; None: no CLIP, or unknown.
        route_counts: Number of training samples of each route; None: unknown.
    """

    clip_sha256: NotRequired[str | None]
    route_counts: NotRequired[Sequence[int] | None]


class CLIPRPNModule(DerainModule, Routed, Explains):
    """CLIP-RPN: CLIP chooses a route of mask-guided cross-attention for each image.

    Guan and Yoshie, CLIP-driven rain perception. The loss is the sum of a reconstruction loss, by default dynamic loss
    scheduling (DLS), and a loss of the predicted rain masks. CLIP is frozen and is part of neither checkpoints nor
    optimisers. Learning rate and exponent of DLS depend on the completed fraction of the optimiser steps.

    Args:
        perception: How routes are chosen: ``clip``: by CLIP; ``fixed``: all images take ``route``; ``none``: the
            network has a single route, or no route without ``mgca`` (Table 10 without RPN).
        clip: Id on the Hugging Face hub, or a local directory; ``$DERAIN_CLIP`` takes precedence.
        prompts: Name of a set in `derain.methods.cliprpn.prompts.PROMPTS` (``1``, ``2``, ``2-long``, ``3``,
            ``3-distortion``, ``rain``, ``intensity``), or a list of texts, one per route.
        similarity: Similarity of images and prompts: ``cosine``, or ``dot`` as eq. 1 is printed.
        route_by: ``image``: all crops and tiles of an image take the route of the image; ``patch``: each crop in
            training, and each image or tile at inference, has its own route.
        route: Index of the route for perception ``fixed``, from 0.
        mgca: Whether the sub-networks of the routes are mask-guided cross-attention (MGCA). If false, they are plain
            cross-attention (Table 10 without MGCA), to which the next three options do not apply; with perception
            ``none``, there are no sub-networks at all (Table 10 without both).
        interaction: How the rainy and the rain-free branch scale each other (eqs. 11 and 12): ``prose`` or ``swapped``,
            see `MaskGuidedCrossAttention`.
        residual: Whether mask-guided cross-attention is residual; not in the paper.
        spatial_kernel: Kernel size, an odd number, of a convolution that eq. 11 omits; 0: a mean instead, see
            `MaskGuidedCrossAttention`.
        dim: Channels of Restormer at the finest level.
        blocks: Transformer blocks of each of the four levels.
        refinement: Transformer blocks at full resolution after the decoder.
        heads: Attention heads of each of the four levels; must divide the channels of the level.
        expansion: Ratio of hidden channels to input channels in the feed-forward networks.
        loss: Reconstruction loss, one of Table 11: ``dls``, ``l1``, ``l2`` or ``huber``.
        beta: Exponent of ``dls`` at the start; section 4.2: 0.8.
        eta: Increase of the exponent from start to end; section 4.2: 2.3.
        smoothing: How the gradient of ``dls`` is kept finite at zero error: ``shift`` or ``root``, see
            `scheduled_loss`.
        rescale: Whether to multiply the reconstruction loss by a factor without gradient, so that its value equals the
            mean absolute error; not in the paper.
        mask_weight: Weight of the mask loss; eq. 15: 0.1.
        mask_threshold: Difference in [0, 1] above which a pixel is rainy; eq. 4: 0.1.
        mask_scaling: How the true mask is downscaled to the size of a level: ``nearest``, ``area`` or ``max``, see
            `mask_loss`.
        learning_rate: Highest learning rate of AdamW; section 4.2: 2e-4.
        weight_decay: Weight decay of AdamW; section 4.2: 0.01.
        warm_up: Fraction of the optimiser steps in which the learning rate rises, in [0, 1); section 4.2: 15 of 300
            epochs. Afterwards, the learning rate falls to 0 along a cosine.

    Raises:
        DerainError: If an option is out of its range, or the prompt set does not exist.
    """

    metadata_schema: ClassVar[Any] = CLIPRPNMetadata
    bounded_by_file: ClassVar[bool] = True
    bytes_per_pixel: int = 4700
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "CLIP-RPN, 1 route": {"perception": "none"},
        "CLIP-RPN, 2 routes": {"perception": "fixed"},
        "CLIP-RPN, 3 routes": {"perception": "fixed", "prompts": "1"},
        "CLIP-RPN without MGCA": {"perception": "fixed", "mgca": False},
        "CLIP-RPN, tiny": {"perception": "fixed", "dim": 16, "blocks": (1, 1, 1, 1), "refinement": 1},
    }
    may_change = DerainModule.may_change | {
        "clip",
        "loss",
        "beta",
        "eta",
        "smoothing",
        "rescale",
        "mask_weight",
        "mask_threshold",
        "mask_scaling",
    }
    compiles_any_size: ClassVar[bool] = False  # torch 2.13 computes wrong strides for frozen weights at dynamic sizes

    def __init__(
        self,
        perception: Literal["clip", "none", "fixed"] = "clip",
        clip: str = "openai/clip-vit-base-patch32",
        prompts: str | list[str] = "3",
        similarity: Similarity = "cosine",
        route_by: Literal["image", "patch"] = "image",
        route: int = 0,
        mgca: bool = True,
        interaction: Interaction = "prose",
        residual: bool = True,
        spatial_kernel: int = 7,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        loss: Reconstruction = "dls",
        beta: float = 0.8,
        eta: float = 2.3,
        smoothing: Smoothing = "shift",
        rescale: bool = False,
        mask_weight: float = 0.1,  # CLIP-RPN, eq. 15
        mask_threshold: float = 0.1,  # CLIP-RPN, eq. 4
        mask_scaling: MaskScaling = "nearest",
        learning_rate: float = 2e-4,
        weight_decay: float = 0.01,
        warm_up: float = 15 / 300,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        texts = texts_of(prompts)
        route_count = len(texts) if perception != "none" else int(mgca)
        if not 0 <= warm_up < 1:
            raise DerainError(f"--model.warm_up {warm_up}: expected a share of the training, at least 0 and below 1")
        self.network: CLIPRPN = CLIPRPN(
            route_count, mgca, interaction, residual, spatial_kernel, dim, blocks, refinement, heads, expansion
        )
        self.maps = tuple(f"mask at 1/{2**level}" for level in (1, 2, 3)) if len(self.network.masks) else ()
        rain_perception = RainPerception(clip, texts, similarity) if perception == "clip" else None
        self.routing = Routing(route_count, rain_perception, route if perception == "fixed" else 0)
        self.route_counts: list[int] | None = [0] * len(self.network.routes)
        self._new_counts = [0] * len(self.network.routes)  # counts of this process since the last `_sum_counts`

    def fetch_requirements(self) -> None:
        """Find or fetch CLIP; do nothing if all images take the same route.

        Raises:
            DerainError: If CLIP is not available.
        """
        self.routing.check()

    def encode(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """Return ``routes`` of whole images and, if CLIP chose the routes, ``similarities`` of images to prompts.

        If ``route_by`` is ``patch``, the result is empty: ``forward`` chooses the route of each image or tile.
        """
        return {} if self.hparams["route_by"] == "patch" else self.routing(rainy)

    def describe_image(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the route of an image and how it was chosen, see `Routing.describe`."""
        return self.routing.describe(conditions, index)

    def forward(
        self, rainy: Float[Tensor, "b 3 h w"], routes: Sequence[int] | None = None, similarities: Tensor | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Restore images of any size in [0, 1].

        Args:
            rainy: Rainy images.
            routes: Index of the route of each image, or of a single route for all; None: CLIP chooses, or all images
                take the fixed route.
            similarities: Not used; ``encode`` returns them for `describe_image`.
        """
        if routes is None:
            routes = self.routing(rainy)["routes"]
        return cast(Tensor, self.network(rainy, routes).derained)

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """Restore along route 0, without CLIP."""
        return self.network(rainy)

    def set_route(self, route: int) -> None:
        """Send all images along one route, without CLIP.

        Args:
            route: Index of the route, from 0.

        Raises:
            ArgumentError: If the route does not exist.
        """
        self.routing.set_route(route)

    def export_graph(self) -> Graph:
        """Return ``forward`` along the fixed route; CLIP is not part of the graph.

        Raises:
            DerainError: If CLIP chooses the routes.
        """
        if self.routing.perception is not None:
            raise DerainError(
                f"these weights have {self.routing.count} routes; expected a single route for a graph; choose it by "
                f"--route 0 to --route {self.routing.count - 1}"
            )
        route = self.routing.route
        self.routing.warn_untrained([route])
        return Graph(self, lambda rainy: self(rainy, routes=[route]), metadata={"routes": [route]})

    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return the derained image and the predicted rain masks in [0, 1], the finest level first (Figure 9).

        Args:
            rainy: Rainy images in [0, 1].
            **conditions: Result of `encode`; if empty, the images are routed here.
        """
        routes = (conditions or self.routing(rainy))["routes"]
        restored = self.network(rainy, routes)
        if not self.maps:
            return cast(Tensor, restored.derained)
        maps = mask_maps(restored.logits, *rainy.shape[2:])
        return torch.cat((restored.derained.float(), maps), dim=1)

    # Training.

    def on_fit_start(self) -> None:
        """Check strategy and CLIP; if CLIP chooses a route for each image, compute those of all training images.

        Raises:
            DerainError: If a distributed strategy would wait for gradients of unused routes; if CLIP is needed, and is
                not available or not that of the resumed run; or if CLIP chooses a route for each image, and the data
                module is not a `RainDataModule`.
        """
        super().on_fit_start()
        if len(self.network.routes) > 1:
            self.refuse_plain_ddp("routes that no image of a batch takes have no gradients")
        self.routing.check(resuming=True)
        if self.routing.perception is None or self.hparams["route_by"] == "patch":
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "rainy_images"):
            raise DerainError("--model.route_by image: requires RainDataModule; use it, or set --model.route_by patch")
        if self.local_rank != 0:
            self.trainer.strategy.barrier()  # wait until the first process of the machine has filled the cache
        names = [pair.name for pair in data.pairs["train"]]
        images = data.rainy_images("train")
        self.routing.compute_training_routes(names, track(images, "Rain perception", len(names)), self.device)
        if self.local_rank == 0:
            self.trainer.strategy.barrier()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the reconstruction loss plus the weighted mask losses (eq. 15).

        The sum is logged as ``train/loss``. Its parts are logged as ``train/reconstruction``, before ``rescale``, and
        ``train/mask_1`` to ``train/mask_3``, without weights. The exponent of ``dls`` and, with several
        routes, the share of each route are logged too.
        """
        routes = self._training_routes(batch)
        hyper = self.hparams
        power = exponent(self.trainer.global_step / self.steps, hyper["beta"], hyper["eta"])
        restored = self.network(batch["rainy"], routes)
        loss = reconstruction_loss(restored.derained, batch["clean"], hyper["loss"], power, hyper["smoothing"])
        logged: dict[str, Any] = {"train/reconstruction": loss}
        if hyper["rescale"]:
            mean_error = (restored.derained.float() - batch["clean"]).abs().mean()
            loss = loss * (mean_error / loss.clamp_min(1e-12)).detach()
        if restored.logits:
            mask = rain_mask(batch["rainy"], batch["clean"], hyper["mask_threshold"])
            mask_losses = mask_loss(restored.logits, mask, hyper["mask_scaling"])
            for level, level_loss in zip(LEVELS, mask_losses, strict=True):
                logged[f"train/mask_{level}"] = level_loss
                loss = loss + hyper["mask_weight"] * level_loss
        if hyper["loss"] == "dls":
            logged["train/exponent"] = power
        if len(self.network.routes) > 1:
            for route in range(len(self.network.routes)):
                logged[f"train/route_{route}"] = routes.count(route) / len(routes)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(routes))
        self.log_dict(logged, batch_size=len(routes))
        return loss

    def _training_routes(self, batch: PairBatch) -> list[int]:
        """Return the route of each image of a training batch, and count the images of each route."""
        training_routes = self.routing.training_routes
        if training_routes is None:
            routes = self.routing(batch["rainy"], cache=False)["routes"]
        else:
            routes = [training_routes[name] for name in batch["name"]]
        if self._new_counts:
            for route in routes:
                self._new_counts[route] += 1
        return list(routes)

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate schedule with linear warm-up and cosine decay to 0."""
        rate, decay = self.hparams["learning_rate"], self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(self.network.parameters(), rate, betas=(0.9, 0.999), weight_decay=decay)
        factor = warm_up_then_cosine(self.steps, self.hparams["warm_up"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _sum_counts(self) -> None:
        """Add the samples since the last call, summed over all devices, to ``route_counts``."""
        if self.route_counts is None or self._trainer is None:
            return
        new = torch.tensor(self._new_counts, device=self.device)
        summed = cast(Tensor, self.trainer.strategy.reduce(new, reduce_op="sum")).tolist()
        self.route_counts = [count + added for count, added in zip(self.route_counts, summed, strict=True)]
        self._new_counts = [0] * len(summed)

    def on_train_end(self) -> None:
        """Log a warning about routes that no training sample took."""
        self._sum_counts()
        counts = self.route_counts or ()
        untrained = [f"route {route}" for route, count in enumerate(counts) if not count]
        if untrained and self.trainer.is_global_zero:
            log.warning(
                "untrained: no training image took %s (samples per route: %s); train on more varied rain or change "
                "--model.prompts",
                ", ".join(untrained),
                ", ".join(f"{count:,}" for count in counts),
            )

    # Files.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sum the route counts over all devices, and add the metadata."""
        self._sum_counts()
        super().on_save_checkpoint(checkpoint)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata, including CLIP's hash and the number of training samples of each route."""
        return super().metadata() | {"clip_sha256": self.routing.clip_sha256, "route_counts": self.route_counts}

    def restore_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Restore CLIP's hash and the number of training samples of each route.

        Raises:
            DerainError: If the number of counts is not the number of routes.
        """
        super().restore_metadata(metadata)
        self.routing.clip_sha256 = metadata.get("clip_sha256")
        counts = metadata.get("route_counts")
        if counts is not None and len(counts) != len(self.network.routes):
            raise DerainError(
                f"metadata with route_counts {counts}: expected {len(self.network.routes)} numbers; use a file that "
                "derain wrote"
            )
        self.route_counts = None if counts is None else list(counts)
        if not self.is_fitting:
            self.routing.sample_counts = self.route_counts

    def start_from(self, loaded: TrainableModule) -> None:
        """Adopt the route counts of the weights that training starts from, so that they are continued."""
        if isinstance(loaded, CLIPRPNModule):
            self.route_counts = loaded.route_counts
