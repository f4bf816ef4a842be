"""Overhead of routing and CLIP in CLIP-RPN.

Targets: with routing, the network takes at most 1.03 times as long as a network with one route; CLIP (ViT-B/32, text
features cached) adds at most 5 % to the time for an image of 256×256. Similarities of images and texts are cached after
the first pass; the time of a look-up is shown. CLIP has random weights, which do not change its speed.
"""

import sys
import tempfile
from pathlib import Path

import torch
from _timing import time_alternately
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from derain.memory import keep_freed_memory
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.network import CLIPRPN
from derain.methods.cliprpn.perception import RainPerception

ROUNDS = 5


def random_perception(folder: Path) -> RainPerception:
    """Return rain perception with a ViT-B/32 with random weights, and with cached text features."""
    model = CLIPModel(CLIPConfig()).eval()
    clip = FrozenCLIP(str(folder))
    clip.__dict__["_loaded"] = (model, None, CLIPImageProcessorPil())
    perception = RainPerception(str(folder), ("no rain", "rain"))
    perception.clip = clip
    perception.__dict__["_text_features"] = torch.rand(2, model.config.projection_dim)
    perception.__dict__["_cached"], perception.__dict__["_file"] = {}, folder / "routes.jsonl"
    return perception


@torch.inference_mode()
def main() -> int:
    """Print the ratios; return 1 if a target is missed."""
    keep_freed_memory()
    torch.manual_seed(0)
    routed, single = CLIPRPN(route_count=2).eval(), CLIPRPN(route_count=1).eval()
    image, batch = torch.rand(1, 3, 256, 256), torch.rand(4, 3, 128, 128)
    pixels = (image[0] * 255).byte().permute(1, 2, 0).numpy()
    perception = random_perception(Path(tempfile.mkdtemp()))

    def encode() -> None:
        perception._cached.clear()
        perception.similarities([pixels])

    times = time_alternately(
        {
            "one image, one route": lambda: single(image),
            "one image, routed": lambda: routed(image, [1]),
            "four crops, one route": lambda: single(batch),
            "four crops, two routes": lambda: routed(batch, [0, 1, 1, 0]),
            "CLIP": encode,
            "cached": lambda: perception.similarities([pixels]),
        },
        ROUNDS,
    )
    seconds = {name: wall for name, (wall, _) in times.items()}
    image_ratio = seconds["one image, routed"] / seconds["one image, one route"]
    batch_ratio = seconds["four crops, two routes"] / seconds["four crops, one route"]
    clip_share = seconds["CLIP"] / seconds["one image, routed"]
    cached = seconds["cached"]
    print(f"routed against one route: {image_ratio:.3f} for an image, {batch_ratio:.3f} for four crops (at most 1.03)")
    print(f"CLIP: {clip_share:.1%} of {seconds['one image, routed']:.2f} s (at most 5 %)")
    print(f"cached similarities: {cached * 1e3:.2f} ms, {cached / seconds['CLIP']:.1%} of CLIP")
    return int(max(image_ratio, batch_ratio) > 1.03 or clip_share > 0.05)


if __name__ == "__main__":
    sys.exit(main())
