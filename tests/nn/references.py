"""Restormer as published, and its layers written as sums over channels and pixels, for float64."""

import importlib.util
from pathlib import Path

import torch

_SPEC = importlib.util.spec_from_file_location(
    "benchmarks_restormer", Path(__file__).parents[2] / "benchmarks" / "restormer.py"
)
_BENCHMARK = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_BENCHMARK)
Published = _BENCHMARK.Published
"""Restormer with the modules of its authors."""

SMALL = {"dim": 8, "blocks": (1, 2, 1, 1), "refinement": 1, "heads": (1, 2, 2, 4), "expansion": 2.66}
"""Sizes of a small Restormer; its feed-forward networks have 21 to 170 hidden channels, not multiples of 16."""


def with_random_parameters(network, seed=0):
    """Return the network in float64 with all parameters, also norms and temperatures, changed at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1.3).add_(0.05 * noise)
    return network


def convolve(x, weight):
    """Convolve ``(b, h, w, i)`` with ``(o, i, k, k)`` and zero padding, as a sum of shifted images."""
    b, h, w, _ = x.shape
    side = weight.shape[-1]
    padded = torch.zeros(b, h + side - 1, w + side - 1, x.shape[-1], dtype=x.dtype)
    padded[:, side // 2 : side // 2 + h, side // 2 : side // 2 + w] = x
    out = torch.zeros(b, h, w, len(weight), dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            shifted = padded[:, row : row + h, column : column + w]
            out += torch.einsum("bhwi,oi->bhwo", shifted, weight[:, :, row, column])
    return out


def depthwise(x, weight):
    """Convolve each channel with its own kernel, ``(c, 1, k, k)``."""
    return torch.cat([convolve(x[..., i : i + 1], weight[i : i + 1]) for i in range(x.shape[-1])], dim=-1)


def attention(query, key, value, temperature, project_out):
    """Restormer's eq. 1, channel by channel: ``(b, h, w, c)`` three times, ``(heads, 1, 1)``, ``(c, c, 1, 1)``."""
    mixed = torch.zeros_like(value)
    heads = len(temperature)
    size = value.shape[-1] // heads
    for image in range(len(value)):
        for head in range(heads):
            channels = range(head * size, (head + 1) * size)
            for i in channels:
                q = query[image, ..., i]
                cosines = torch.stack(
                    [(q * key[image, ..., j]).sum() / (q.norm() * key[image, ..., j].norm()) for j in channels]
                )
                weights = torch.exp(cosines * temperature[head, 0, 0])
                for j, weight in zip(channels, weights / weights.sum(), strict=True):
                    mixed[image, ..., i] += weight * value[image, ..., j]
    return torch.einsum("bhwi,oi->bhwo", mixed, project_out[:, :, 0, 0])


def cross_attention(state, query, key, value):
    """CLIP-RPN's eqs. 8 and 9 with the parameters of a ``CrossAttention``."""
    maps = [
        depthwise(convolve(x, state[f"{name}.weight"]), state[f"{name}_dwconv.weight"])
        for name, x in (("query", query), ("key", key), ("value", value))
    ]
    return attention(*maps, state["temperature"], state["project_out.weight"])
