"""The controller of DA-CLIP: it bends frozen CLIP's image embedding and tells how an image is degraded.

Luo et al., Controlling Vision-Language Models for Multi-Task Image Restoration, ICLR 2024; Pullabhotla, section III.A.
"""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.files import weights
from derain.files.metadata import Metadata, check, shorten
from derain.methods.clip import FrozenCLIP
from derain.methods.daclipsde.published_keys import controller_of, projection_of

log = logging.getLogger("derain")

Order = Literal["reversed", "aligned"]
Tokens = Float[Tensor, "b n c"]

WORDS = ("rainy", "clean")
"""Degradations that images are compared with where a controller's file names none of its own, as the authors' does."""


class DACLIPMetadata(Metadata):
    """Metadata of a controller, with CLIP's hash and the words for degradations."""

    clip_sha256: NotRequired[str | None]
    words: NotRequired[Sequence[str]]


class Embeddings(NamedTuple):
    """What is perceived of images.

    Attributes:
        content: ``(b, d)``, of what they show, as if they were clean; not normalised.
        degradation: ``(b, d)``, of how they are degraded; not normalised.
    """

    content: Float[Tensor, "b d"]
    degradation: Float[Tensor, "b d"]


class Controller(nn.Module):
    """A trainable copy of CLIP's vision tower, whose blocks feed the frozen one through layers that begin as zeros.

    The copy's own way is not touched by those layers, so that at first the content embedding is CLIP's own.

    Args:
        clip: CLIP of transformers.
        order: Which frozen block a block feeds: ``aligned``, the same one; ``reversed``, the mirrored one, as in the
            authors' code, which takes the last hidden state first.
    """

    def __init__(self, clip: Any, order: Order = "reversed") -> None:
        super().__init__()
        self.order = order
        self.vision: Any = copy.deepcopy(clip.vision_model)
        self.projection: nn.Linear = copy.deepcopy(clip.visual_projection)
        width = clip.config.vision_config.hidden_size
        self.zero = nn.ModuleList(nn.Linear(width, width) for _ in self.vision.encoder.layers)
        for layer in self.zero:
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone())
        self.train().requires_grad_(True)

    def forward(self, clip: Any, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
        """Perceives images.

        Args:
            clip: The same CLIP, frozen.
            pixels: As `FrozenCLIP.pixels` gives them.
        """
        x, controls = _embed(self.vision, pixels), []
        for block, zero in zip(self.vision.encoder.layers, self.zero, strict=True):
            x = _block(block, x)
            controls.append(zero(x))
        degradation = self.projection(self.vision.post_layernorm(x[:, 0]))
        if self.order == "reversed":
            controls.reverse()
        x = _embed(clip.vision_model, pixels)
        for block, control in zip(clip.vision_model.encoder.layers, controls, strict=True):
            x = _block(block, x) + control
        content = clip.visual_projection(clip.vision_model.post_layernorm(x[:, 0]))
        return Embeddings(content, degradation)


def _embed(vision: Any, pixels: Tensor) -> Tokens:
    return cast(Tensor, vision.pre_layrnorm(vision.embeddings(pixels)))


def _block(block: Any, x: Tokens) -> Tokens:
    out = block(x, None)
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def load_controller(file: Path, clip: FrozenCLIP) -> tuple[Controller, Mapping[str, Any]]:
    """Reads a controller: weights of `DACLIPModule`, or the authors' checkpoint of DA-CLIP.

    Returns:
        The controller, and what its file says of itself: nothing where it is the authors'.

    Raises:
        DerainError: If the file is absent, is none, or does not fit CLIP.
    """
    state, metadata, _ = weights.read(file)
    if metadata.get("method") not in {None, "DACLIPModule"}:
        raise DerainError(
            f"--model.controller {file}: holds {shorten(metadata['method'])}; give weights of DACLIPModule "
            "or the authors' checkpoint of DA-CLIP"
        )
    if metadata:
        check(file, metadata, DACLIPMetadata, Controller)
    found = Controller(clip.model, metadata.get("hyper_parameters", {}).get("order", "reversed"))
    projection = None
    if not metadata:
        try:
            projection, state = projection_of(state), controller_of(state)
        except DerainError:
            raise
        except weights.BUILD_ERRORS as error:  # tensors of other shapes
            raise DerainError(f"--model.controller {file}: damaged ({shorten(error)})") from error
    own = {name: value.shape for name, value in found.state_dict().items()}
    fits = {name: value.shape for name, value in state.items()} == own
    if fits and projection is not None:  # sizes alone do not tell one CLIP from another
        here = clip.model.visual_projection.weight.cpu()
        fits = projection.shape == here.shape and torch.allclose(projection.float(), here, atol=1e-3)
    if not fits:
        raise DerainError(
            f"--model.controller {file}: does not fit CLIP {clip.name}; give the CLIP that it was trained with by "
            "--model.clip or DERAIN_CLIP"
        )
    if metadata.get("clip_sha256") not in {None, clip.sha256}:
        log.warning("%s was trained with another CLIP than %s", file, clip.name)
    found.load_state_dict(dict(state))
    weights.check_network(file, found, state)
    return found, metadata


class Perception:
    """A trained controller and its CLIP, both frozen; loaded when first needed, and part of no method's parameters.

    Attributes:
        hashes: Of CLIP and of the controller's file: those in use, before they are loaded those of `expect`.
        words: Degradations that the controller has learnt to tell apart.

    Args:
        clip: Id on the Hugging Face hub or a local directory; ``$DERAIN_CLIP`` goes before it.
        controller: A file of weights of `DACLIPModule`, or the authors'; ``$DERAIN_CONTROLLER`` goes before it. None:
            a controller at its start, so that both embeddings are CLIP's own.
    """

    def __init__(self, clip: str, controller: str | None) -> None:
        self.clip = FrozenCLIP(clip, "train without it by --model.contexts none")
        self.file = os.environ.get("DERAIN_CONTROLLER") or controller
        if controller is not None and self.file != controller:
            log.info("controller: %s (DERAIN_CONTROLLER) instead of %s", self.file, controller)
        self.hashes: dict[str, str | None] = {}
        self.words: Sequence[str] = WORDS
        self._began: Mapping[str, Any] | None = None

    def expect(self, description: Mapping[str, Any], resuming: bool) -> None:
        """Takes the hashes that a file of weights names.

        Args:
            description: Of the file.
            resuming: Whether its training goes on: another CLIP or controller is then refused, else warned of.
        """
        self.hashes = {name: description[name] for name in ("clip_sha256", "controller_sha256") if name in description}
        self._began = description.get("hyper_parameters", {}) if resuming else None

    @cached_property
    def controller(self) -> Controller:
        """The controller.

        Raises:
            DerainError: If its file is absent or does not fit CLIP, or is another one than a resumed run began with.
        """
        if self.file is None:
            log.warning("no --model.controller: both embeddings are CLIP's own, as before the controller is trained")
            found = Controller(self.clip.model)
        else:
            if not Path(self.file).is_file():
                raise DerainError(
                    f"--model.controller {self.file}: no such file; name it by --model.controller, or by "
                    "DERAIN_CONTROLLER for weights that name another"
                )
            found, description = load_controller(Path(self.file), self.clip)
            learnt = description.get("words", ())
            self.words = learnt if len(learnt) > 1 else WORDS
        hashes = {"clip_sha256": self.clip.sha256, "controller_sha256": self.file and weights.sha256(Path(self.file))}
        for name in (name for name, expected in self.hashes.items() if hashes[name] != expected):
            option = name.removesuffix("_sha256")
            if self._began is not None:
                now = {"clip": self.clip.name, "controller": self.file}[option]
                told = f"this run began with another one ({self._began.get(option)})"
                raise DerainError(f"--model.{option} {now}: {told}; give that one to go on")
            told = {"clip": "CLIP (DERAIN_CLIP)", "controller": "controller (DERAIN_CONTROLLER)"}[option]
            log.warning("these weights were trained with another %s: expect worse, or name the right one", told)
        self.hashes = hashes
        return found.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, rainy: Float[Tensor, "b 3 h w"]) -> Embeddings:
        """Perceives images in [0, 1] of any size, in float32."""
        controller = self.controller.to(rainy.device)
        with torch.autocast(rainy.device.type, enabled=False):
            clip = self.clip.model.to(rainy.device)
            return cast(Embeddings, controller(clip, self.clip.pixels(rainy.float())))

    def shares(self, degradation: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        """How much each of ``words`` fits: soft maxima of cosines, as sharp as the controller has learnt."""
        controller = self.controller  # which brings its words
        texts = nn.functional.normalize(self.clip.texts(self.words), dim=-1)
        cosines = nn.functional.normalize(degradation.float().cpu(), dim=-1) @ texts.T
        return (controller.logit_scale.exp().cpu() * cosines).softmax(dim=-1)
