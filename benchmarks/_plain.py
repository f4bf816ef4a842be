"""Plain forms of derain's optimised blocks: computed as the papers write them, with the same weights.

The context manager `plain` replaces the blocks in all networks. Maps between blocks keep derain's layout, mostly
``(b, h, w, c)``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from derain.networks import airnet, nafnet, nledn, rcdnet, spanet
from derain.networks.drsformer import MixedScaleFeedForward, SparseAttention
from derain.networks.restormer import BiasFreeNorm
from derain.nn.experts import DilatedExpert, ExpertLayer, SeparableExpert
from derain.nn.inner_scale import DenseConnection, ScaleFusion, activate, resize
from derain.nn.restormer import GatedFeedForward, Norm, SelfAttention, TransformerBlock
from derain.nn.shifted_windows import WindowBlock


def channels_first(x: Tensor) -> Tensor:
    """Return a map ``(b, h, w, c)`` as a contiguous one ``(b, c, h, w)``."""
    return x.permute(0, 3, 1, 2).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Return a map ``(b, c, h, w)`` as a view ``(b, h, w, c)``."""
    return x.permute(0, 2, 3, 1)


# Restormer and networks of its blocks.


def norm(self: Norm, x: Tensor) -> Tensor:
    """Normalise the channels of each pixel to mean 0 and variance 1, then scale and shift them."""
    pixels = x.contiguous().flatten(1, 2)
    deviation = torch.sqrt(pixels.var(-1, keepdim=True, unbiased=False) + self.body.eps)
    normal = (pixels - pixels.mean(-1, keepdim=True)) / deviation * self.body.weight + self.body.bias
    return channels_last(channels_first(normal.reshape(x.shape)))


def bias_free_norm(self: BiasFreeNorm, x: Tensor) -> Tensor:
    """Divide the channels of each pixel by their standard deviation, then scale them."""
    pixels = x.contiguous().flatten(1, 2)
    deviation = torch.sqrt(pixels.var(-1, keepdim=True, unbiased=False) + self.eps)
    return channels_last(channels_first((pixels / deviation * self.weight).reshape(x.shape)))


def cosines_and_values(self: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines times the temperature ``(b, heads, d, d)``, and the values ``(b, heads, d, h * w)``."""
    queries_keys_values = self.qkv_dwconv(self.qkv(channels_first(x))).chunk(3, dim=1)
    q, k, v = (t.reshape(len(x), len(self.temperature), -1, x.shape[1] * x.shape[2]) for t in queries_keys_values)
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature, v


def self_attention(self: SelfAttention, x: Tensor) -> Tensor:
    """Attend between channels (Restormer, eq. 1)."""
    cosines, values = cosines_and_values(self, x)
    attended = (cosines.softmax(-1) @ values).reshape(len(x), -1, *x.shape[1:3])
    return channels_last(self.project_out(attended))


def sparse_attention(self: SparseAttention, x: Tensor) -> Tensor:
    """Attend to the largest cosines, in four branches (DRSformer, "TKSA")."""
    cosines, values = cosines_and_values(self, x)
    total: Tensor | float = 0.0
    for index, count in enumerate(self.counts, 1):
        kept = torch.zeros_like(cosines).scatter_(-1, cosines.topk(count, dim=-1).indices, 1.0)
        attention = torch.where(kept > 0, cosines, -torch.inf).softmax(-1)
        total = total + (attention @ values) * self.get_parameter(f"factor{index}")
    return channels_last(self.project_out(total.reshape(len(x), -1, *x.shape[1:3])))


def gated_feed_forward(self: GatedFeedForward, x: Tensor, kernels: object = None) -> Tensor:
    """Apply the feed-forward network (Restormer, eq. 2)."""
    gate, gated = self.dwconv(self.project_in(channels_first(x))).chunk(2, dim=1)
    return channels_last(self.project_out(F.gelu(gate) * gated))


def mixed_scale_feed_forward(self: MixedScaleFeedForward, x: Tensor, kernels: object = None) -> Tensor:
    """Apply the feed-forward network (DRSformer, "MSFN")."""
    hidden = self.project_in(channels_first(x))
    fine, wide = (F.relu(layer(hidden)).chunk(2, dim=1) for layer in (self.first3, self.first5))
    second3 = F.relu(self.second3(torch.cat((fine[0], wide[0]), dim=1)))
    second5 = F.relu(self.second5(torch.cat((fine[1], wide[1]), dim=1)))
    return channels_last(self.project_out(torch.cat((second3, second5), dim=1)))


def transformer_block(self: TransformerBlock, x: Tensor) -> Tensor:
    """Apply attention and feed-forward network to the whole map."""
    x = x + self.attn(self.norm1(x))
    return x + self.ffn(self.norm2(x), None)


def expert(module: nn.Module, x: Tensor) -> Tensor:
    """Apply all layers of an expert."""
    y = module.pointwise(module.depthwise(x))
    return module.pointwise2(module.depthwise2(F.relu(y))) if isinstance(module, SeparableExpert) else y


def expert_layer(self: ExpertLayer, x: Tensor, weights: Tensor) -> Tensor:
    """Concatenate the weighted experts, then join them ("MEFC")."""
    x = channels_first(x)
    modules: list[SeparableExpert | DilatedExpert] = list(self.experts)
    outputs = [expert(module, x) for module in modules]
    outputs.append(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    weighted = [y * weight[:, None, None, None] for y, weight in zip(outputs, weights.unbind(1), strict=True)]
    return channels_last(self.join(torch.cat(weighted, dim=1)))


def naf_block(self: nafnet.NAFBlock, x: Tensor) -> Tensor:
    """Transform the whole map (NAFNet, eqs. 4 to 6)."""

    def normal(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        variance, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + layer.eps)
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    def gated(x: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=1)
        return values * gates

    x = channels_first(x)
    y = gated(self.depthwise(self.expand(normal(x, self.norm1))))
    x = x + self.project(y * self.attention(y.mean((2, 3), keepdim=True))) * self.factor1
    return channels_last(x + self.feed_out(gated(self.feed_in(normal(x, self.norm2)))) * self.factor2)


# Dense concatenations.


def scale_fusion(self: ScaleFusion, maps: list[Tensor], like: Tensor | None = None) -> Tensor:
    """Resize the maps, concatenate them, then convolve."""
    like = maps[0] if like is None else like
    return self.mix(torch.cat([x if x is like else resize(x, like) for x in maps], dim=1))


def dense_connection(self: DenseConnection, x: Tensor, skips: Any = ()) -> tuple[Tensor, list[Tensor]]:
    """Concatenate all maps before each convolution."""
    maps = [x := x.contiguous()]
    for index, block in enumerate([*self.blocks] * self.repeats):
        maps.append(x := block(x + skips[index] if skips else x))
        if index < len(self.transitions):
            x = activate(self.transitions[index](torch.cat(maps, dim=1)))
    return x, maps[1:]


# Single functions.


def deformable_convolution(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Convolve by torchvision's operator."""
    return torchvision.ops.deform_conv2d(x, offset, weight, padding=weight.shape[-1] // 2, mask=mask)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Return ``softmax(Q Kᵀ · scale + mask) V``."""
    scale = options.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def unpool(x: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Put values back at the indices of max pooling."""
    return F.max_unpool2d(x, indices, 2, output_size=like.shape[2:])


def transposed_convolution(rain: Tensor, kernels: Tensor) -> Tensor:
    """Convolve by PyTorch's transposed convolution."""
    return F.conv_transpose2d(rain, kernels, padding=kernels.shape[-1] // 2)


def scan(steps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the hidden states of recurrent units, step by step."""
    hidden = [torch.relu(steps[:, :, :, 0])]
    for index in range(1, steps.shape[3]):
        hidden.append(torch.relu(weight * hidden[-1] + bias + steps[:, :, :, index]))
    return torch.stack(hidden, dim=3)


def whole_height(self: WindowBlock, x: Tensor) -> int:
    """Return the number of rows of a strip: all rows of the map."""
    return x.shape[1]


REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (Norm, "forward", norm),
    (BiasFreeNorm, "forward", bias_free_norm),
    (SelfAttention, "forward", self_attention),
    (SparseAttention, "forward", sparse_attention),
    (GatedFeedForward, "forward", gated_feed_forward),
    (MixedScaleFeedForward, "forward", mixed_scale_feed_forward),
    (TransformerBlock, "forward", transformer_block),
    (ExpertLayer, "forward", expert_layer),
    (nafnet.NAFBlock, "forward", naf_block),
    (ScaleFusion, "forward", scale_fusion),
    (DenseConnection, "forward", dense_connection),
    (WindowBlock, "_strip_rows", whole_height),
    (airnet, "deformable_convolution", deformable_convolution),
    (F, "scaled_dot_product_attention", attend),
    (nledn, "unpool", unpool),
    (rcdnet, "transposed_convolution", transposed_convolution),
    (spanet, "scan", scan),
)
"""Class or module, name of the replaced function, and its plain form."""


@contextmanager
def plain() -> Iterator[set[str]]:
    """Use the plain forms within a ``with`` block; yield a set that collects the names of those that are called."""
    used: set[str] = set()

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            used.add(function.__name__)
            return function(*inputs, **options)

        return call

    with ExitStack() as stack:
        for owner, name, function in REPLACED:
            stack.enter_context(patch.object(owner, name, recorded(function)))
        yield used
