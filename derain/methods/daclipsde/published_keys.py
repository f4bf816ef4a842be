"""The authors' checkpoints of IR-SDE and DA-CLIP: their names, and what can be read off their tensors."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from derain.errors import DerainError

CONTEXTS = {(True, True): "both", (True, False): "content", (False, True): "degradation", (False, False): "none"}
"""What a U-Net is told, by whether it has transformers and a prompt."""


def unet_options(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of `DACLIPSDEModule` for the authors' U-Net, whose parameters have our names; None if it is none.

    Sizes are read off the tensors. λ stands nowhere in them: it is 10 of 255 for IR-SDE's channels, which double at
    every level, else 50, as in the authors' settings.
    """
    if "init_conv.weight" not in state or "mid_block1.block1.proj.weight" not in state:
        return None
    channels = state["init_conv.weight"].shape[0]
    depth = sum(name.startswith("downs.") and name.endswith(".0.block1.proj.weight") for name in state)
    multipliers = [state[f"downs.{level}.3.weight"].shape[0] // channels for level in range(depth)]
    content = [value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.weight")]
    degradation = [state["text_mlp.0.weight"].shape[1]] if "text_mlp.0.weight" in state else []
    return {
        "contexts": CONTEXTS[bool(content), bool(degradation)],
        "channels": channels,
        "multipliers": multipliers,
        "context": (content + degradation + [512])[0],
        "max_sigma": 10.0 if multipliers[0] >= 2 else 50.0,
    }


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


def projection_of(state: Mapping[str, Tensor]) -> Tensor | None:
    """The last layer of the frozen vision tower in the authors' checkpoint of DA-CLIP, which tells CLIPs apart."""
    found = [value for name, value in state.items() if name.endswith("visual.proj")]
    return found[0].T if found else None


def controller_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
