"""Controller of DA-CLIP: it corrects the image embedding of a frozen CLIP, and embeds the degradation.

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
"""Degradation words for controllers whose file records fewer than two, such as the authors' file."""


class DACLIPMetadata(Metadata):
    """Metadata of `DACLIPModule`.

    Attributes:
        clip_sha256: Hash of the CLIP that the controller was trained with.
        words: Degradation words that the controller was trained to distinguish.
    """

    clip_sha256: NotRequired[str | None]
    words: NotRequired[Sequence[str]]


class Embeddings(NamedTuple):
    """Embeddings of images.

    Attributes:
        content: Embeddings of the content, as if the images were clean; not normalised.
        degradation: Embeddings of the degradation; not normalised.
    """

    content: Float[Tensor, "b d"]
    degradation: Float[Tensor, "b d"]


class Controller(nn.Module):
    """Trainable copy of CLIP's vision tower, connected to the frozen tower by zero-initialised layers.

    The output of each block of the copy passes through a zero-initialised layer and is added to the output of a frozen
    block. Before training, the content embedding is therefore CLIP's own. The degradation embedding is the projected
    output of the copy itself; the zero-initialised layers do not affect it.

    Args:
        clip_model: ``CLIPModel`` of transformers.
        order: Order in which blocks of the copy are connected to frozen blocks. ``aligned``: the first block to the
            first, and so on; ``reversed``: the last block of the copy to the first frozen block, and so on, as in the
            authors' code.
    """

    def __init__(self, clip_model: Any, order: Order = "reversed") -> None:
        super().__init__()
        self.order = order
        self.vision: Any = copy.deepcopy(clip_model.vision_model)
        self.projection: nn.Linear = copy.deepcopy(clip_model.visual_projection)
        width = clip_model.config.vision_config.hidden_size
        self.zero = nn.ModuleList(nn.Linear(width, width) for _ in self.vision.encoder.layers)
        for layer in self.zero:
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)
        self.logit_scale = nn.Parameter(clip_model.logit_scale.detach().clone())
        self.train().requires_grad_(True)

    def forward(self, clip_model: Any, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
        """Return the embeddings of images.

        Args:
            clip_model: The ``CLIPModel`` that the controller was built from, frozen.
            pixels: Images, as `FrozenCLIP.pixels` returns them.
        """
        x = _embed(self.vision, pixels)
        controls = []
        for block, zero in zip(self.vision.encoder.layers, self.zero, strict=True):
            x = _block(block, x)
            controls.append(zero(x))
        degradation = self.projection(self.vision.post_layernorm(x[:, 0]))
        if self.order == "reversed":
            controls.reverse()
        x = _embed(clip_model.vision_model, pixels)
        for block, control in zip(clip_model.vision_model.encoder.layers, controls, strict=True):
            x = _block(block, x) + control
        content = clip_model.visual_projection(clip_model.vision_model.post_layernorm(x[:, 0]))
        return Embeddings(content, degradation)


def _embed(vision: Any, pixels: Tensor) -> Tokens:
    return cast(Tensor, vision.pre_layrnorm(vision.embeddings(pixels)))


def _block(block: Any, x: Tokens) -> Tokens:
    out = block(x, None)
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def load_controller(file: Path, clip: FrozenCLIP) -> tuple[Controller, Mapping[str, Any]]:
    """Load a controller from weights of `DACLIPModule`, or from the authors' checkpoint of DA-CLIP.

    Args:
        file: Path of the file.
        clip: CLIP to connect the controller to. If the file records the hash of a different one, a warning is logged.

    Returns:
        The controller, and the metadata of its file; for the authors' checkpoint, the metadata is empty.

    Raises:
        DerainError: If CLIP is not available, or the file cannot be read, contains no controller, or does not fit CLIP.
    """
    content = weights.read(file)
    state, metadata = content.state, content.metadata
    if metadata.get("method") not in {None, "DACLIPModule"}:
        raise DerainError(
            f"--model.controller {file}: contains {shorten(metadata['method'])}; expected weights of DACLIPModule or "
            "the authors' checkpoint of DA-CLIP"
        )
    projection = None
    if metadata:
        check(file, metadata, DACLIPMetadata, Controller)
    else:
        projection, state = _from_published(file, state)
    controller = Controller(clip.model, metadata.get("hyper_parameters", {}).get("order", "reversed"))
    if _shapes(state) != _shapes(controller.state_dict()) or not _matches_clip(projection, clip):
        raise DerainError(
            f"--model.controller {file}: does not fit CLIP {clip.name}; select the CLIP that it was trained with by "
            "--model.clip or DERAIN_CLIP"
        )
    if metadata.get("clip_sha256") not in {None, clip.sha256}:
        log.warning(
            "%s was trained with a CLIP other than %s; select that one by --model.clip or DERAIN_CLIP", file, clip.name
        )
    controller.load_state_dict(dict(state))
    weights.check_network(file, controller, state)
    return controller, metadata


def _from_published(file: Path, state: Mapping[str, Tensor]) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """Return the projection of the frozen CLIP, if there is one, and the controller of the authors' checkpoint."""
    try:
        return projection_of(state), controller_of(state)
    except DerainError:
        raise
    except weights.BUILD_ERRORS as error:  # tensors of unexpected shapes
        raise DerainError(f"--model.controller {file}: damaged ({shorten(error)}); download it again") from error


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _matches_clip(projection: Tensor | None, clip: FrozenCLIP) -> bool:
    """Return whether a projection is that of a CLIP: shapes are not enough, since different CLIPs can have equal ones.

    Args:
        projection: Projection of the frozen CLIP in the authors' checkpoint; None: not known, the result is true.
        clip: CLIP in use.
    """
    if projection is None:
        return True
    expected = clip.model.visual_projection.weight.cpu()
    return projection.shape == expected.shape and torch.allclose(projection.float(), expected, atol=1e-3)


class FrozenDACLIP:
    """Trained controller with its CLIP, both frozen, loaded when first needed.

    It is not an ``nn.Module``, so that its parameters are not part of the method that uses it.

    Args:
        clip: Id on the Hugging Face hub or a local directory; ``$DERAIN_CLIP`` takes precedence.
        controller: Weights of `DACLIPModule`, or the authors' checkpoint; ``$DERAIN_CONTROLLER`` takes precedence.
            None: an untrained controller, with which both embeddings are CLIP's own.

    Attributes:
        file: Path of the controller's file; None for an untrained controller.
        hashes: SHA-256 of CLIP and of the controller's file (``clip_sha256``, ``controller_sha256``). Before they are
            loaded, the expected values, see `expect_hashes`; initially empty.
        words: Degradation words that `probabilities` distinguishes. Once the controller is loaded: those that its
            file records, if there are at least two; otherwise `WORDS`.
    """

    def __init__(self, clip: str, controller: str | None) -> None:
        self.clip = FrozenCLIP(clip, "train without it by --model.contexts none")
        self.file = os.environ.get("DERAIN_CONTROLLER") or controller
        if controller is not None and self.file != controller:
            log.info("controller: %s (DERAIN_CONTROLLER) instead of %s", self.file, controller)
        self.hashes: dict[str, str | None] = {}
        self.words: Sequence[str] = WORDS
        self._resumed_options: Mapping[str, Any] | None = None

    def expect_hashes(self, metadata: Mapping[str, Any], resuming: bool) -> None:
        """Set the hashes that CLIP and controller should have.

        Args:
            metadata: Metadata of a weights file or checkpoint.
            resuming: Whether a run is being resumed. If so, loading a CLIP or controller with another hash raises an
                error; otherwise a warning is logged.
        """
        self.hashes = {name: metadata[name] for name in ("clip_sha256", "controller_sha256") if name in metadata}
        self._resumed_options = metadata.get("hyper_parameters", {}) if resuming else None

    @cached_property
    def controller(self) -> Controller:
        """The controller, loaded at the first access.

        Raises:
            DerainError: If CLIP or the controller's file cannot be loaded, they do not fit each other, or a resumed run
                was started with a different CLIP or controller.
        """
        controller = self._load()
        file_hash = weights.sha256(Path(self.file)) if self.file is not None else None
        self._compare("clip", self.clip.name, self.clip.sha256)
        self._compare("controller", self.file, file_hash)
        self.hashes = {"clip_sha256": self.clip.sha256, "controller_sha256": file_hash}
        return controller.eval().requires_grad_(False)

    def _load(self) -> Controller:
        if self.file is None:
            log.warning("no --model.controller: both embeddings are those of plain CLIP")
            return Controller(self.clip.model)
        if not Path(self.file).is_file():
            raise DerainError(
                f"--model.controller {self.file}: no such file; correct the path, or set DERAIN_CONTROLLER, which "
                "overrides the path in weights"
            )
        controller, metadata = load_controller(Path(self.file), self.clip)
        words = metadata.get("words", ())
        self.words = words if len(words) > 1 else WORDS
        return controller

    def _compare(self, option: str, name: str | None, sha256: str | None) -> None:
        """Compare the hash of CLIP or the controller with the expected one; log a warning if they differ.

        Raises:
            DerainError: If they differ and a run is being resumed.
        """
        if self.hashes.get(f"{option}_sha256", sha256) == sha256:
            return
        if self._resumed_options is not None:
            raise DerainError(
                f"cannot resume with --model.{option} {name}: the run was started with a different one "
                f"({self._resumed_options.get(option)}); use that one"
            )
        variable = f"DERAIN_{option.upper()}"
        log.warning(
            "these weights were trained with a different %s: expect worse results, or set %s to the right one",
            option,
            variable,
        )

    @torch.no_grad()
    def __call__(self, rainy: Float[Tensor, "b 3 h w"]) -> Embeddings:
        """Return the embeddings of images in [0, 1] of any size, in float32."""
        controller = self.controller.to(rainy.device)
        with torch.autocast(rainy.device.type, enabled=False):
            clip_model = self.clip.model.to(rainy.device)
            return cast(Embeddings, controller(clip_model, self.clip.pixels(rainy.float())))

    def probabilities(self, degradation: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        """Return the probability of each of the ``words``, on the CPU.

        The cosines of degradation embedding and words are multiplied by the trained scale; the probabilities are the
        softmax of the products.

        Args:
            degradation: Degradation embeddings.
        """
        controller = self.controller  # loading it sets ``words``
        text_embeddings = nn.functional.normalize(self.clip.text_features(self.words), dim=-1)
        cosines = nn.functional.normalize(degradation.float().cpu(), dim=-1) @ text_embeddings.T
        return (controller.logit_scale.exp().cpu() * cosines).softmax(dim=-1)
