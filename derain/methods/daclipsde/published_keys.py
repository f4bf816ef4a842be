"""Keys of the authors' checkpoints of IR-SDE and DA-CLIP, and options inferred from their tensors."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from derain.errors import DerainError

CONTEXTS = {(True, True): "both", (True, False): "content", (False, True): "degradation", (False, False): "none"}
"""Hyper-parameter ``contexts`` of a U-Net, by whether it has cross-attention and whether it has a prompt."""


def unet_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the arguments of `DACLIPSDEModule` for the authors' U-Net, or None for another state dict.

    Sizes follow from the shapes of the tensors. The files do not record λ. As in the authors' settings, it is 10/255 if
    the first level at least doubles the channels (IR-SDE), and 50/255 otherwise (DA-CLIP).
    """
    if "init_conv.weight" not in state or "mid_block1.block1.proj.weight" not in state:
        return None
    channels = state["init_conv.weight"].shape[0]
    depth = sum(name.startswith("downs.") and name.endswith(".0.block1.proj.weight") for name in state)
    multipliers = [state[f"downs.{level}.3.weight"].shape[0] // channels for level in range(depth)]
    content = [value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.weight")]
    degradation = [value.shape[1] for name, value in state.items() if name == "text_mlp.0.weight"]
    return {
        "contexts": CONTEXTS[bool(content), bool(degradation)],
        "channels": channels,
        "multipliers": multipliers,
        "context": next(iter(content + degradation), 512),
        "max_sigma": 10.0 if multipliers[0] >= 2 else 50.0,
    }


_KEYS = (
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
"""Regular expressions of the authors' keys, without the prefix ``visual_control.``, and their replacements."""


def projection_of(state: Mapping[str, Tensor]) -> Tensor | None:
    """Return the projection of the frozen vision tower in the authors' checkpoint of DA-CLIP; None if there is none.

    It has the shape of ``visual_projection.weight`` of transformers.
    """
    for key, value in state.items():
        if key.endswith("visual.proj"):
            return value.T
    return None


def controller_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the controller in the authors' checkpoint of DA-CLIP, with derain's keys; the frozen CLIP is ignored.

    ``visual_control.*`` is renamed by ``_KEYS``, each ``in_proj`` is split into queries, keys and values, and ``proj``
    is transposed.

    Args:
        state: The state dict, with or without the prefix ``module.`` of parallel training.

    Raises:
        DerainError: If the state dict contains no controller, or no ``logit_scale``.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    prefix = "visual_control."
    published = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    if not published or "logit_scale" not in plain:
        raise DerainError(
            "no controller of DA-CLIP in this file; expected logit_scale and keys that begin with visual_control"
        )
    controller = {"logit_scale": plain["logit_scale"]}
    for published_key, value in published.items():
        key = _derain_key(published_key)
        if ".attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                controller[key.replace(".attn.in_proj_", f".self_attn.{name}_proj.")] = part
        elif key == "projection.weight":
            controller[key] = value.T
        else:
            controller[key] = value
    return controller


def _derain_key(key: str) -> str:
    for pattern, replacement in _KEYS:
        key = re.sub(pattern, replacement, key)
    return key
