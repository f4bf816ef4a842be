"""What routing and perceiving cost CLIP-RPN.

Asked for: routed, a network takes at most 1.03 times the time of one with a single route; CLIP (ViT-B/32, text features
cached) at most 5 % on top of an image of 256×256. After the first pass, CLIP runs no more: looking a route up is shown.
CLIP has random weights here, which take the same time.
"""

import sys
import tempfile
from pathlib import Path

import torch
from _turns import in_turns
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from derain.memory import keep_freed_memory
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.network import CLIPRPN
from derain.methods.cliprpn.perception import RainPerception

ROUNDS = 5


def perception(folder: Path) -> RainPerception:
    """ViT-B/32 of random weights, with text features at hand."""
    model = CLIPModel(CLIPConfig()).eval()
    clip = FrozenCLIP(str(folder))
    clip.__dict__["_loaded"] = (model, None, CLIPImageProcessorPil())
    found = RainPerception(str(folder), ("no rain", "rain"))
    found.clip = clip
    found.__dict__["_text_features"] = torch.rand(2, model.config.projection_dim)
    found.__dict__["_known"], found.__dict__["_file"] = {}, folder / "routes.jsonl"
    return found


@torch.inference_mode()
def main() -> int:
    """Prints the ratios; 1 if an aim is missed."""
    keep_freed_memory()
    torch.manual_seed(0)
    routed, single = CLIPRPN(routes=2).eval(), CLIPRPN(routes=1).eval()
    image, batch = torch.rand(1, 3, 256, 256), torch.rand(4, 3, 128, 128)
    pixels = (image[0] * 255).byte().permute(1, 2, 0).numpy()
    perceive = perception(Path(tempfile.mkdtemp()))

    def anew() -> None:
        perceive._known.clear()
        perceive.similarities([pixels])

    times = in_turns(
        {
            "one image, one route": lambda: single(image),
            "one image, routed": lambda: routed(image, [1]),
            "four crops, one route": lambda: single(batch),
            "four crops, two routes": lambda: routed(batch, [0, 1, 1, 0]),
            "CLIP": anew,
            "looked up": lambda: perceive.similarities([pixels]),
        },
        ROUNDS,
    )
    found = {name: clock for name, (clock, _) in times.items()}
    one = found["one image, routed"] / found["one image, one route"]
    four = found["four crops, two routes"] / found["four crops, one route"]
    share = found["CLIP"] / found["one image, routed"]
    print(f"routed against one route: {one:.3f} for an image, {four:.3f} for four crops (at most 1.03)")
    print(f"CLIP on top of {found['one image, routed']:.2f} s: {share:.1%} (at most 5 %)")
    print(f"a route looked up: {found['looked up'] * 1e3:.2f} ms, {found['looked up'] / found['CLIP']:.1%} of CLIP")
    return int(max(one, four) > 1.03 or share > 0.05)


if __name__ == "__main__":
    sys.exit(main())
