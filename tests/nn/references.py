"""Restormer's published form, and what networks are made of written as sums, for float64."""

import importlib.util
from pathlib import Path

import torch

_SPEC = importlib.util.spec_from_file_location(
    "benchmarks_restormer", Path(__file__).parents[2] / "benchmarks" / "restormer.py"
)
_BENCHMARK = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_BENCHMARK)
Published = _BENCHMARK.Published
"""Restormer as its authors arranged it."""

SMALL = {"dim": 8, "blocks": (1, 2, 1, 1), "refinement": 1, "heads": (1, 2, 2, 4), "expansion": 2.66}
"""Sizes of a small Restormer; its feed-forward networks have 21 to 170 hidden channels, no multiples of 16."""


def lively(network, seed=0):
    """The network in float64 with every parameter, norms and temperatures too, off its first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1.3).add_(0.05 * noise)
    return network


def convolve(x, weight):
    """A convolution of ``(b, h, w, i)`` by ``(o, i, k, k)``, zeros around, as a sum of shifted images."""
    b, h, w, _ = x.shape
    side = weight.shape[-1]
    around = torch.zeros(b, h + side - 1, w + side - 1, x.shape[-1], dtype=x.dtype)
    around[:, side // 2 : side // 2 + h, side // 2 : side // 2 + w] = x
    out = torch.zeros(b, h, w, len(weight), dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            shifted = around[:, row : row + h, column : column + w]
            out += torch.einsum("bhwi,oi->bhwo", shifted, weight[:, :, row, column])
    return out


def depthwise(x, weight):
    """The same where a channel has a kernel of its own, ``(c, 1, k, k)``."""
    return torch.cat([convolve(x[..., i : i + 1], weight[i : i + 1]) for i in range(x.shape[-1])], dim=-1)


def attention(query, key, value, temperature, project_out):
    """Restormer's eq. 1, channel by channel: ``(b, h, w, c)`` three times, ``(heads, 1, 1)``, ``(c, c, 1, 1)``."""
    mixed = torch.zeros_like(value)
    heads = len(temperature)
    size = value.shape[-1] // heads
    for image in range(len(value)):
        for head in range(heads):
            own = range(head * size, (head + 1) * size)
            for i in own:
                q = query[image, ..., i]
                likeness = torch.stack(
                    [(q * key[image, ..., j]).sum() / (q.norm() * key[image, ..., j].norm()) for j in own]
                )
                shares = torch.exp(likeness * temperature[head, 0, 0])
                for j, share in zip(own, shares / shares.sum(), strict=True):
                    mixed[image, ..., i] += share * value[image, ..., j]
    return torch.einsum("bhwi,oi->bhwo", mixed, project_out[:, :, 0, 0])


def cross_attention(state, query, key, value):
    """CLIP-RPN's eqs. 8 and 9 by the parameters of a ``CrossAttention``."""
    maps = [
        depthwise(convolve(x, state[f"{name}.weight"]), state[f"{name}_dwconv.weight"])
        for name, x in (("query", query), ("key", key), ("value", value))
    ]
    return attention(*maps, state["temperature"], state["project_out.weight"])
