"""Training on a CPU core: time of the added rain, and memory and time of gradient checkpointing.

Targets: the preset ``varied`` takes at most a tenth of the processor time of a training step of a small Restormer on 8
crops of 96×96; with checkpointing, activations take at most 0.4 times the bytes that they take without.
"""

import sys

import torch
from _timing import report, time_alternately
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from derain.callbacks import GradientCheckpointing
from derain.data.rain_operators import RainDegradation
from derain.data.rain_ranges import RAIN_RANGES
from derain.methods import RestormerModule

MAX_STORED = 0.4
MAX_RAIN = 0.1


def stored_bytes(network: nn.Module, rainy: Tensor) -> int:
    """Return the bytes of all tensors that autograd stores in the forward pass, for the backward pass."""
    stored = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal stored
        stored += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(rainy)
    return stored


def main() -> int:
    """Print tables of times and ratios; return 1 if a target is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clean = nn.functional.interpolate(torch.rand(8, 3, 12, 12), size=96, mode="bicubic").clamp(0, 1)
    plain, recomputed = (RestormerModule(dim=16, blocks=[1, 2, 2, 2], refinement=1) for _ in range(2))
    callback = GradientCheckpointing()
    callback.setup(None, recomputed, "fit")

    def step(module: RestormerModule) -> None:
        module.zero_grad()
        (module.network(clean) - clean).abs().mean().backward()

    seeds = iter(range(10**6))
    variants = {"training step": lambda: step(plain), "with checkpointing": lambda: step(recomputed)}
    for preset in ("medium", "varied"):
        degradation = RainDegradation(RAIN_RANGES[preset])
        variants[f"rain: {preset}"] = lambda degradation=degradation: degradation(clean, next(seeds))
    times = time_alternately(variants, rounds=8)
    report("8 crops of 96×96", times)
    ratio = stored_bytes(recomputed.network, clean) / stored_bytes(plain.network, clean)
    share = times["rain: varied"][1] / times["training step"][1]
    table = Table("quantity", "measured", "target")
    table.add_row("activations stored with checkpointing, ratio", f"{ratio:.2f}", f"at most {MAX_STORED}")
    table.add_row("processor time of varied rain / training step", f"{share:.2f}", f"at most {MAX_RAIN}")
    Console().print(table)
    return int(ratio > MAX_STORED or share > MAX_RAIN)


if __name__ == "__main__":
    sys.exit(main())
