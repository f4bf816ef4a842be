"""Lightning module of DA-CLIP + IR-SDE: contexts, training at random times, sampling."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.files.metadata import Metadata
from derain.methods.base import DerainModule
from derain.methods.daclipsde.controller import FrozenDACLIP
from derain.methods.daclipsde.loss import matching_loss
from derain.methods.daclipsde.network import AttentionKind, ConditionalUNet
from derain.methods.daclipsde.published_keys import unet_options
from derain.methods.daclipsde.sde import MeanRevertingSDE, Schedule
from derain.methods.daclipsde.solvers import sample, solver_name, visited_times
from derain.methods.graph import Graph
from derain.methods.interfaces import Explains, RunsGraph, Sampled, Sampling
from derain.nn.schedule import multiplied_at, warm_up_then_cosine

log = logging.getLogger("derain")

Contexts = Literal["both", "content", "degradation", "none"]
Tiled = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Function that applies a function of images to an image, as a whole or tile by tile."""


class ScheduleState(TypedDict):
    """Schedule of the SDE, as `MeanRevertingSDE.state` returns it."""

    max_sigma: float
    eps: float
    speed: Sequence[float]


class DACLIPSDEMetadata(Metadata):
    """Metadata of `DACLIPSDEModule`.

    Attributes:
        sde: Schedule of the SDE.
        clip_sha256: Hash of CLIP; absent if CLIP was not used.
        controller_sha256: Hash of the controller's file; None: an untrained controller; absent without a controller.
    """

    sde: NotRequired[ScheduleState]
    clip_sha256: NotRequired[str | None]
    controller_sha256: NotRequired[str | None]


class DACLIPSDEModule(DerainModule, Sampled, Explains, RunsGraph):
    """DA-CLIP + IR-SDE: mean-reverting SDE, conditioned on the embeddings of a degradation-aware CLIP controller.

    Pullabhotla, Image Deraining using Degradation-aware CLIP; Luo et al., ICML 2023 (IR-SDE) and ICLR 2024 (DA-CLIP).
    The network estimates noise; ``forward`` runs it once for each sampling step. Controller and CLIP are frozen and are
    part of neither checkpoints nor optimisers. Without contexts, the method is IR-SDE.

    Args:
        contexts: Embeddings that the network is conditioned on: ``content``, by cross-attention at the deepest level
            and in the middle; ``degradation``, by a prompt that is added to the time embedding; ``both``; or ``none``.
        clip: Id on the Hugging Face hub, or a local directory; ``$DERAIN_CLIP`` takes precedence.
        controller: Weights of `DACLIPModule`, or the authors' checkpoint of DA-CLIP; ``$DERAIN_CONTROLLER`` takes
            precedence. Default: an untrained controller, with a warning; both embeddings are then CLIP's own.
        channels: Channels at full resolution, see `ConditionalUNet`.
        multipliers: Channels after each level, as multiples of ``channels``; IR-SDE: 2, 4, 8, 16.
        attention: Self-attention: ``none`` or ``linear``, see `ConditionalUNet`.
        context: Size of CLIP's embeddings.
        max_sigma: Stationary standard deviation λ of the noise. Values of 1 or more are in units of 1/255, smaller
            ones for images in [0, 1]; IR-SDE for rain: 10.
        sde_steps: T, the number of steps of the schedule.
        eps: Fraction of the clean residual ``x(0) - μ`` that remains at time T, in (0, 1).
        schedule: How the speed θ changes with time: ``cosine``, ``linear`` or ``constant``, see `theta_schedule`.
        residual: Standard deviation of clean minus rainy images, for preconditioning (Karras et al., NeurIPS 2022; not
            in the paper): the network estimates only the error of the best linear estimate of the noise, divided by
            the standard deviation of this error. Default: no preconditioning.
        learning_rate: Initial learning rate of AdamW without weight decay, betas 0.9 and 0.99; IR-SDE: 1e-4.
        decay: Schedule of the learning rate. ``cosine``: it falls to 1e-6 along a cosine. ``halving``: it is halved
            after 2/7, 4/7 and 6/7 of the optimiser steps (IR-SDE: after 200, 400 and 600 of 700 thousand steps).

    Raises:
        DerainError: If an option is out of its range.
    """

    bounded_by_file: ClassVar[bool] = True
    bytes_per_pixel: int = 6000
    published_options: ClassVar[frozenset[str]] = frozenset({"max_sigma"})
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "IR-SDE, one step": {"contexts": "none", "multipliers": (2, 4, 8, 16)},
        "DA-CLIP + IR-SDE, one step": {},
        "IR-SDE, tiny, one step": {"contexts": "none", "channels": 16, "attention": "none"},
    }
    metadata_schema: ClassVar[Any] = DACLIPSDEMetadata
    may_change = DerainModule.may_change | {"clip", "controller"}

    def __init__(
        self,
        contexts: Contexts = "both",
        clip: str = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        controller: str | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        attention: AttentionKind = "linear",
        context: int = 512,
        max_sigma: float = 50.0,
        sde_steps: int = 100,
        eps: float = 0.005,
        schedule: Schedule = "cosine",
        residual: float | None = None,
        learning_rate: float = 2e-4,
        decay: Literal["cosine", "halving"] = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if residual is not None and residual <= 0:
            raise DerainError(f"--model.residual {residual}: expected a number above 0, or null")
        self.sde = MeanRevertingSDE(max_sigma, sde_steps, eps, schedule)
        self.network: ConditionalUNet = ConditionalUNet(
            channels,
            multipliers,
            attention,
            content=contexts in {"both", "content"},
            degradation=contexts in {"both", "degradation"},
            context=context,
        )
        self.daclip = FrozenDACLIP(clip, controller) if contexts != "none" else None
        self.sampling = Sampling("posterior", min(10, sde_steps))
        self.published = False  # whether the network has the authors' weights

    @property
    def context_names(self) -> list[str]:
        """Names of the embeddings that the network is conditioned on: ``content``, ``degradation``, both or none."""
        contexts = self.hparams["contexts"]
        return [name for name in ("content", "degradation") if contexts in {"both", name}]

    def set_sampling(self, sampling: Sampling) -> None:
        """Set solver, number of steps and seed.

        Raises:
            ArgumentError: If there is no such solver, or the schedule has fewer steps.
        """
        visited_times(self.sde, sampling.steps)  # checks the number of steps
        self.sampling = dataclasses.replace(sampling, solver=solver_name(sampling))

    def fetch_requirements(self) -> None:
        """Load CLIP, which is fetched if necessary, and the controller; without contexts, do nothing.

        Raises:
            DerainError: If one of them is not available or cannot be loaded, the size of their embeddings is not
                ``context``, or a resumed run was started with a different CLIP or controller; or if the network has the
                authors' weights, and there is no controller's file.
        """
        if self.daclip is None:
            return
        if self.published and self.daclip.file is None:
            raise DerainError(
                "the authors' U-Net of DA-CLIP requires its controller; set DERAIN_CONTROLLER to the file "
                "(daclip_ViT-B-32.pt)"
            )
        size = self.daclip.controller.projection.out_features
        context = self.hparams["context"]
        if size != context:
            raise DerainError(
                f"--model.context {context}: embeddings of CLIP {self.daclip.clip.name} have size {size}; set "
                f"--model.context {size}"
            )

    def encode(self, rainy: Float[Tensor, "b 3 h w"]) -> dict[str, Any]:
        """Return the embeddings that the network is conditioned on, ``(b, context)`` each, by name; empty for none."""
        if self.daclip is None:
            return {}
        embeddings = self.daclip(rainy)
        return {name: getattr(embeddings, name) for name in self.context_names}

    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return the derained image; there are no maps."""
        return cast(Tensor, self(rainy, **conditions))

    def describe_image(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return ``degradation``, the probability of each word for an image; empty without a degradation embedding."""
        if self.daclip is None or "degradation" not in conditions:
            return {}
        probabilities = self.daclip.probabilities(conditions["degradation"][index][None])[0].tolist()
        by_word = zip(self.daclip.words, probabilities, strict=True)
        return {"degradation": {word: round(probability, 4) for word, probability in by_word}}

    @torch.no_grad()
    def forward(
        self,
        rainy: Float[Tensor, "b 3 h w"],
        content: Float[Tensor, "b d"] | None = None,
        degradation: Float[Tensor, "b d"] | None = None,
        tiled: Tiled = lambda image, forward: forward(image),
        show: Callable[[Iterable[Any], int], Iterable[Any]] = lambda steps, total: steps,
    ) -> Float[Tensor, "b 3 h w"]:
        """Restore images of any size with the solver, number of steps and seed of ``sampling``.

        Args:
            rainy: Rainy images in [0, 1].
            content: Content embeddings; if neither kind of embedding is given, the images are encoded here.
            degradation: Degradation embeddings.
            tiled: Function that applies the network at every step, to whole images or tile by tile.
            show: Function that iterates over the steps and reports progress.

        Returns:
            Derained images, not clamped.
        """
        conditions = {"content": content, "degradation": degradation}
        if content is None and degradation is None:
            conditions |= self.encode(rainy)
        for name, embedding in conditions.items():
            if embedding is not None:
                conditions[name] = embedding.to(rainy.device)

        def estimate(state: Tensor, time: int) -> Tensor:
            times = torch.full((len(rainy),), time)
            state_and_rainy = torch.cat((state, rainy), dim=1)
            return tiled(state_and_rainy, lambda part: self.noise(part[:, :3], part[:, 3:], times, **conditions))

        return sample(self.sde, estimate, rainy, self.sampling, show)

    def noise(
        self,
        state: Float[Tensor, "b 3 h w"],
        rainy: Float[Tensor, "b 3 h w"],
        times: Int[Tensor, " b"],
        **contexts: Any,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the estimated standard normal noise in states of the SDE.

        Args:
            state: States ``x(t)``.
            rainy: Rainy images ``μ`` in [0, 1].
            times: Times ``t`` from 1 to T, on the CPU.
            **contexts: Embeddings that the network is conditioned on, by name.
        """
        device_times = times.to(state.device, non_blocking=state.is_cuda)
        if self.hparams["residual"] is None:
            return cast(Tensor, self.network(state, rainy, device_times, **contexts))
        input_scale, slope, error = self.sde.precondition(times, self.hparams["residual"], state)
        distance = state - rainy
        estimated: Tensor = self.network(rainy + input_scale * distance, rainy, device_times, **contexts)
        return slope * distance + error * estimated.float()

    def pass_once(self, rainy: Float[Tensor, "b 3 h w"]) -> Any:
        """Run the network once, with embeddings of ones instead of CLIP's."""
        ones = rainy.new_ones(len(rainy), self.hparams["context"])
        return self.network(rainy, rainy, rainy.new_ones(len(rainy)), **dict.fromkeys(self.context_names, ones))

    def export_graph(self) -> Graph:
        """Return the network as a graph of one image; neither the solver nor preconditioning is part of it.

        Raises:
            DerainError: If the network is an exported graph itself.
        """
        network = self.network
        if not isinstance(network, ConditionalUNet):
            raise DerainError("cannot export an exported graph of DACLIPSDEModule; export the weights file instead")
        inputs = ["state", "rainy", "times", *self.context_names]
        return Graph(
            network,
            lambda *tensors: network(**dict(zip(inputs, tensors, strict=True))),
            inputs,
            self.hparams["context"],
        )

    @classmethod
    def from_graph(cls, metadata: Mapping[str, Any], network: nn.Module, inputs: list[str]) -> "DACLIPSDEModule":
        """Return the method with an exported graph as its network, in eval mode; arguments as in `RunsGraph`.

        Raises:
            ValueError: If the inputs of the graph do not match ``contexts``.
        """
        module = cls(**metadata["hyper_parameters"])
        if inputs != ["state", "rainy", "times", *module.context_names]:
            raise ValueError(f"inputs {', '.join(inputs)}: do not match contexts {module.hparams['contexts']}")
        module.restore_metadata(metadata)
        module.network = cast(ConditionalUNet, network)
        return module.eval()

    # Training.

    def on_fit_start(self) -> None:
        """Record the training sets, and load CLIP and the controller."""
        super().on_fit_start()
        self.fetch_requirements()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the matching loss at a random time for each image.

        With ``residual``, return instead the mean absolute error of the estimated noise, divided for each image by the
        standard deviation of the linear estimate's error.
        """
        rainy, clean = batch["rainy"], batch["clean"]
        times = torch.randint(1, self.sde.steps + 1, (len(rainy),))
        noise = torch.randn_like(rainy)
        state = self.sde.diffuse(clean, rainy, times, noise)
        estimated = self.noise(state, rainy, times, **self.encode(rainy))
        if self.hparams["residual"] is None:
            loss = matching_loss(self.sde, estimated, state, clean, rainy, times)
        else:
            _, _, error = self.sde.precondition(times, self.hparams["residual"], rainy)
            loss = ((estimated - noise).abs() / error).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(rainy))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW without weight decay and the learning rate schedule ``decay``, stepped per optimiser step."""
        rate, steps = self.hparams["learning_rate"], self.steps
        optimizer = torch.optim.AdamW(self.network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
        if self.hparams["decay"] == "halving":
            milestones = [max(1, round(steps * sevenths / 7)) for sevenths in (2, 4, 6)]
            factor = multiplied_at(milestones, 0.5)
        else:
            factor = warm_up_then_cosine(steps, 0.0, min(1.0, 1e-6 / rate))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Files.

    def metadata(self) -> dict[str, Any]:
        """Return the metadata with the schedule and the hashes of controller and CLIP."""
        hashes = self.daclip.hashes if self.daclip else {}
        return super().metadata() | {"sde": self.sde.state()} | hashes

    def restore_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Restore the schedule, and set the expected hashes of controller and CLIP.

        Raises:
            DerainError: If the schedule has a value out of its range, or does not have ``sde_steps`` steps.
        """
        super().restore_metadata(metadata)
        if "sde" in metadata:
            self.sde = MeanRevertingSDE.from_state(metadata["sde"])
            if self.sde.steps != self.hparams["sde_steps"]:
                raise DerainError(
                    f"metadata with sde of {self.sde.steps} steps and sde_steps {self.hparams['sde_steps']}; expected "
                    "equal numbers; use a file that derain wrote"
                )
        if self.daclip is not None:
            self.daclip.expect_hashes(metadata, self.is_fitting)

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "DerainModule | None":
        """Return the method with the authors' U-Net of IR-SDE or DA-CLIP, or None if the tensors are not theirs.

        The authors' files do not record λ. Without the option ``max_sigma``, the authors' value is assumed, with a
        warning.
        """
        unet_arguments = unet_options(state)
        if unet_arguments is None:
            return None
        module = cls(**unet_arguments | {name: float(value) for name, value in options.items()})
        module.published = True
        own = module.network.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            return None
        module.network.load_state_dict(dict(state), strict=True)
        if "max_sigma" not in options:
            log.warning(
                "%s: the file does not record λ; assuming the authors' value, FILE:max_sigma=%g; to use another "
                "value, append it to the file name",
                path or "weights",
                unet_arguments["max_sigma"],
            )
        return module
