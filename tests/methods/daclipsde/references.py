"""Plain reference of the conditional U-Net: the authors' arithmetic over a state dict, without modules.

Maps are ``(b, c, h, w)`` and contiguous; attention always computes its softmax, even over a single token. The benchmark
compares derain with it too. Imports nothing of derain.
"""

import math

import torch
import torch.nn.functional as F

HEAD = 32


class Textbook:
    """Estimator of noise, as ``ConditionalUNet`` with the same parameters.

    Args:
        state: Parameters under the authors' keys; gradients reach them.
    """

    def __init__(self, state):
        self.state = state
        self.depth = sum(name.startswith("downs.") and name.endswith(".3.weight") for name in state)

    def __call__(self, state, rainy, times, content=None, degradation=None):
        height, width = state.shape[2:]
        time = self.time(times, degradation)
        x = reflected(torch.cat((state - rainy, rainy), dim=1), 2**self.depth)
        stem = x = self.convolve(x, "init_conv", padding=3)
        skips = []
        for level in range(self.depth):
            x = self.block(x, time, f"downs.{level}.0")
            skips.append(x)
            x = self.block(x, time, f"downs.{level}.1")
            x = self.attend(x, content, f"downs.{level}.2")
            skips.append(x)
            stride = 1 if level == self.depth - 1 else 2
            x = self.convolve(x, f"downs.{level}.3", padding=1, stride=stride)
        x = self.block(x, time, "mid_block1")
        x = self.attend(x, content, "mid_attn")
        x = self.block(x, time, "mid_block2")
        for level in range(self.depth):
            x = self.block(torch.cat((x, skips.pop()), dim=1), time, f"ups.{level}.0")
            x = self.block(torch.cat((x, skips.pop()), dim=1), time, f"ups.{level}.1")
            x = self.attend(x, content, f"ups.{level}.2")
            if level == self.depth - 1:
                x = self.convolve(x, f"ups.{level}.3", padding=1)
            else:
                x = self.convolve(F.interpolate(x, scale_factor=2, mode="nearest"), f"ups.{level}.3.1", padding=1)
        x = self.block(torch.cat((x, stem), dim=1), time, "final_res_block")
        return self.convolve(x, "final_conv", padding=1)[:, :, :height, :width]

    def convolve(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def time(self, times, degradation):
        channels, _, _, _ = self.state["init_conv.weight"].shape
        half = channels // 2
        dtype = self.state["init_conv.weight"].dtype
        frequencies = torch.exp(torch.arange(half, dtype=dtype, device=times.device) * (-math.log(10000) / (half - 1)))
        angles = times.to(dtype)[:, None] * frequencies[None, :]
        features = torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)
        time = self.linear(F.gelu(self.linear(features, "time_mlp.1")), "time_mlp.3")
        if "prompt" not in self.state:
            return time
        weights = self.linear(F.silu(self.linear(degradation, "text_mlp.0")), "text_mlp.2").softmax(dim=1)
        return time + self.linear(weights * self.state["prompt"], "prompt_mlp")

    def block(self, x, time, name):
        scale, shift = self.linear(F.silu(time), f"{name}.mlp.1").chunk(2, dim=1)
        y = self.convolve(x, f"{name}.block1.proj", padding=1)
        y = F.silu(y * (scale[:, :, None, None] + 1) + shift[:, :, None, None])
        y = F.silu(self.convolve(y, f"{name}.block2.proj", padding=1))
        return y + (self.convolve(x, f"{name}.res_conv") if f"{name}.res_conv.weight" in self.state else x)

    def attend(self, x, content, name):
        """Apply the attention that the state has under this name, if any."""
        if f"{name}.fn.norm.g" not in self.state:
            return x
        y = channel_norm(x, self.state[f"{name}.fn.norm.g"])
        if f"{name}.fn.fn.to_qkv.weight" in self.state:
            return self.linear_attention(y, f"{name}.fn.fn") + x
        return self.transformer(y, content, f"{name}.fn.fn") + x

    def linear_attention(self, x, name):
        b, _, h, w = x.shape
        qkv = self.convolve(x, f"{name}.to_qkv").chunk(3, dim=1)
        q, k, v = (part.reshape(b, -1, HEAD, h * w) for part in qkv)
        q = q.softmax(dim=2) * HEAD**-0.5
        k = k.softmax(dim=3)
        v = v / (h * w)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        out = self.convolve(out.reshape(b, -1, h, w), f"{name}.to_out.0")
        return channel_norm(out, self.state[f"{name}.to_out.1.g"])

    def transformer(self, x, content, name):
        b, c, h, w = x.shape
        y = F.group_norm(x, 32, self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"], eps=1e-6)
        y = self.convolve(y, f"{name}.proj_in").reshape(b, c, h * w).permute(0, 2, 1)
        inner = f"{name}.transformer_blocks.0"
        tokens = content[:, None, :]
        if f"{inner}.norm1.weight" in self.state:
            own = self.layer_norm(y, f"{inner}.norm1")
            y = self.attention(own, own, f"{inner}.attn1") + y
        y = self.attention(self.layer_norm(y, f"{inner}.norm2"), tokens, f"{inner}.attn2") + y
        value, gate = self.linear(self.layer_norm(y, f"{inner}.norm3"), f"{inner}.ff.net.0.proj").chunk(2, dim=2)
        y = self.linear(value * F.gelu(gate), f"{inner}.ff.net.2") + y
        return self.convolve(y.permute(0, 2, 1).reshape(b, c, h, w), f"{name}.proj_out") + x

    def attention(self, x, tokens, name):
        q, k, v = (
            self.linear(of, f"{name}.{to}").unflatten(2, (-1, HEAD))
            for of, to in ((x, "to_q"), (tokens, "to_k"), (tokens, "to_v"))
        )
        likeness = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD**-0.5
        out = torch.einsum("bhij,bjhd->bihd", likeness.softmax(dim=3), v)
        return self.linear(out.flatten(2), f"{name}.to_out.0")

    def layer_norm(self, x, name):
        mean, variance = x.mean(dim=2, keepdim=True), x.var(dim=2, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]


def channel_norm(x, gain):
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain


def reflected(x, multiple):
    """Pad by reflecting rows and columns; small images repeat the last one instead."""
    height, width = x.shape[2:]
    small = min(height, width) < multiple
    for dim, size in ((2, height), (3, width)):
        indices = torch.arange(size + -size % multiple, device=x.device)
        mirrored = torch.full_like(indices, size - 1) if small else 2 * (size - 1) - indices
        x = x.index_select(dim, torch.where(indices < size, indices, mirrored))
    return x
