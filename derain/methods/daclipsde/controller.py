"""The controller of DA-CLIP: it bends frozen CLIP's image embedding and tells how an image is degraded.

Luo et al., Controlling Vision-Language Models for Multi-Task Image Restoration, ICLR 2024; S1, section III.A.
"""

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP

log = logging.getLogger("derain")

Order = Literal["reversed", "aligned"]
Tokens = Float[Tensor, "b n c"]


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


class Perception:
    """A trained controller and its CLIP, both frozen; loaded when first needed, and part of no method's parameters.

    Attributes:
        hashes: Of CLIP and of the controller's file: those in use, before they are loaded those of `expect`.

    Args:
        clip: Id on the Hugging Face hub or a local directory; ``$DERAIN_CLIP`` goes before it.
        controller: A file of weights of `DACLIPModule`, or the authors'; ``$DERAIN_CONTROLLER`` goes before it. None:
            a controller at its start, so that both embeddings are CLIP's own.
    """

    def __init__(self, clip: str, controller: str | None) -> None:
        self.clip = FrozenCLIP(clip)
        self.file = os.environ.get("DERAIN_CONTROLLER") or controller
        self.hashes: dict[str, str | None] = {}

    def expect(self, description: Mapping[str, Any]) -> None:
        """Takes the hashes that a file of weights names; another CLIP or controller is used with a warning."""
        self.hashes = {name: description[name] for name in ("clip_sha256", "controller_sha256") if name in description}

    @cached_property
    def controller(self) -> Controller:
        """The controller.

        Raises:
            DerainError: If its file is absent or does not fit CLIP.
        """
        from derain.methods import weights

        if self.file is None:
            log.warning("no --model.controller: both embeddings are CLIP's own, as before the controller is trained")
            found = Controller(self.clip.model)
        else:
            state, description, _ = weights.read(Path(self.file))
            if description.get("method") not in {None, "DACLIPModule"}:
                raise DerainError(
                    f"--model.controller {self.file}: holds {description['method']}; give weights of DACLIPModule or "
                    "the authors' checkpoint of DA-CLIP"
                )
            order = description.get("hyper_parameters", {}).get("order", "reversed")
            found = Controller(self.clip.model, order)
            own = {name: value.shape for name, value in found.state_dict().items()}
            state = state if description else from_published(state)
            if {name: value.shape for name, value in state.items()} != own:
                raise DerainError(
                    f"--model.controller {self.file}: does not fit CLIP {self.clip.name}; give the CLIP that it was "
                    "trained with by --model.clip or DERAIN_CLIP"
                )
            trained_with = description.get("clip_sha256")
            if trained_with not in {None, self.clip.sha256}:
                log.warning("%s was trained with another CLIP than %s", self.file, self.clip.name)
            found.load_state_dict(dict(state))
        hashes = {"clip_sha256": self.clip.sha256, "controller_sha256": self.file and weights.sha256(Path(self.file))}
        for name in (name for name, expected in self.hashes.items() if hashes[name] != expected):
            log.warning("these weights were trained with another %s: expect worse", name.removesuffix("_sha256"))
        self.hashes = hashes
        return found.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, rainy: Float[Tensor, "b 3 h w"]) -> Embeddings:
        """Perceives images in [0, 1] of any size, in float32."""
        controller = self.controller.to(rainy.device)
        with torch.autocast(rainy.device.type, enabled=False):
            clip = self.clip.model.to(rainy.device)
            return cast(Embeddings, controller(clip, self.clip.pixels(rainy.float())))

    def shares(self, degradation: Float[Tensor, "b d"], words: Sequence[str]) -> Float[Tensor, "b n"]:
        """How much each of the words fits: soft maxima of cosines, as sharp as the controller has learnt."""
        texts = nn.functional.normalize(self.clip.texts(words), dim=-1)
        cosines = nn.functional.normalize(degradation.float().cpu(), dim=-1) @ texts.T
        return (self.controller.logit_scale.exp().cpu() * cosines).softmax(dim=-1)


# The authors' checkpoint.

_NAMES = (
    (r"^conv1\.", "vision.embeddings.patch_embedding."),
    (r"^class_embedding$", "vision.embeddings.class_embedding"),
    (r"^positional_embedding$", "vision.embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "vision.pre_layrnorm."),
    (r"^ln_post\.", "vision.post_layernorm."),
    (r"^proj$", "projection.weight"),
    (r"^transformer\.zero_modules\.", "zero."),
    (r"^transformer\.transformer\.resblocks\.", "vision.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
"""Names of the authors (open_clip's, below ``visual_control.``) and ours (transformers')."""


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The controller in the authors' checkpoint of DA-CLIP, with our names; the frozen CLIP in it is left out.

    ``visual_control.*`` becomes ours by the table above; ``in_proj`` is cut into queries, keys and values, ``proj`` is
    transposed.

    Args:
        state: The state dict, with or without the prefix ``module.`` of parallel training.

    Raises:
        DerainError: If there is no controller in it.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    prefix = "visual_control."
    theirs = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
    if not theirs or "logit_scale" not in plain:
        raise DerainError("no controller of DA-CLIP in this file (its authors' names begin with visual_control)")
    ours = {"logit_scale": plain["logit_scale"]}
    for name, value in theirs.items():
        for pattern, ours_is in _NAMES:
            name = re.sub(pattern, ours_is, name)
        if ".attn.in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                ours[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = piece
        else:
            ours[name] = value.T if name == "projection.weight" else value
    return ours
