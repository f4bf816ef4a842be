"""Plain reference of PLNLIN and MCDDL: images ``(b, c, h, w)``, windows cut and masks built at each call.

Parameters have the names of derain's networks. Tests compare derain with it in float64; the benchmark measures it.
"""

import torch
import torch.nn.functional as F

WINDOW = 7


class Textbook:
    """Networks as functions of a state dict.

    Args:
        state: Parameters of the generator or the discriminator, with the default configuration.
        stages: N of the generator's PLNLIMs.
        heads: Attention heads.
    """

    def __init__(self, state, stages=(8, 4, 2, 2), heads=4):
        self.state, self.stages, self.heads = state, stages, heads

    def conv(self, name, x, padding=0):
        weight = self.state[f"{name}.weight"]
        weight = weight[:, :, None, None] if weight.dim() == 2 else weight
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=padding)

    def residual(self, name, x):
        return x + self.conv(f"{name}.conv2", F.leaky_relu(self.conv(f"{name}.conv1", x, 1), 0.2), 1)

    def norm(self, name, x):
        """Layer normalisation of the last axis."""
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        normed = (x - mean) / torch.sqrt(variance + 1e-5)
        return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def swin(self, name, x, shift):
        x = x.permute(0, 2, 3, 1).contiguous()
        batch, height, width, channels = x.shape
        down, right = (shift if length > WINDOW else 0 for length in (height, width))
        y = torch.roll(self.norm(f"{name}.norm1", x), (-down, -right), (1, 2))
        cut = (batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
        windows = y.reshape(cut).permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, WINDOW**2, channels)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in self.linear(f"{name}.attn.qkv", windows).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.bias(f"{name}.attn.relative_position_bias_table")
        if down or right:
            scores = scores + self.mask(height, width, down, right, x).unsqueeze(1)
        mixed = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
        mixed = self.linear(f"{name}.attn.proj", mixed)
        back = (batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
        mixed = mixed.reshape(back).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        x = x + torch.roll(mixed, (down, right), (1, 2))
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return (x + self.linear(f"{name}.mlp.fc2", hidden)).permute(0, 3, 1, 2).contiguous()

    def bias(self, name):
        """Bias of each head by the offset between two pixels of a window."""
        positions = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
        offsets = positions[:, None] - positions[None] + WINDOW - 1
        return self.state[name][offsets[..., 0] * (2 * WINDOW - 1) + offsets[..., 1]].permute(2, 0, 1)

    def mask(self, height, width, down, right, like):
        """-100 where two pixels of a window are on different sides of the border; ``(windows, 49, 49)``."""
        rows = torch.roll(torch.arange(height), -down)[:, None] < down
        columns = torch.roll(torch.arange(width), -right)[None] < right
        rows[: height - WINDOW], columns[:, : width - WINDOW] = False, False
        sides = rows.long() * 2 + columns.long()
        cut = sides.reshape(height // WINDOW, WINDOW, width // WINDOW, WINDOW).permute(0, 2, 1, 3)
        sides = cut.reshape(-1, WINDOW**2)
        return torch.where(sides[:, :, None] == sides[:, None], 0.0, -100.0).to(like.dtype)

    def sft(self, name, x, condition):
        half = condition.shape[1]
        weight, bias = (self.state[f"{name}.hidden.{part}"] for part in ("weight", "bias"))
        gamma = F.leaky_relu(F.conv2d(condition, weight[:half, :, None, None], bias[:half]), 0.1)
        beta = F.leaky_relu(F.conv2d(condition, weight[half:, :, None, None], bias[half:]), 0.1)
        return x * (1 + self.conv(f"{name}.scale", gamma)) + self.conv(f"{name}.shift", beta)

    def plnlim(self, name, x, stages):
        """Eqs. 2 to 6."""
        local = self.residual(f"{name}.local.0", x)
        non_local = self.swin(f"{name}.non_local.0", x, 0)
        fused = self.conv(f"{name}.fusions.0", torch.cat((local, non_local), 1))
        for i in range(1, stages + 1):
            pair = f"{name}.interactions.{i - 1}"
            local, non_local = self.sft(f"{pair}.0", local, non_local), self.sft(f"{pair}.1", non_local, local)
            if i > 1:
                fused = self.conv(f"{name}.fusions.{i - 1}", torch.cat((fused, local, non_local), 1))
            last = fused, local, non_local
            local = self.residual(f"{name}.local.{i}", local)
            non_local = self.swin(f"{name}.non_local.{i}", non_local, 3 * (i % 2))
        return local + non_local + self.conv(f"{name}.fusions.{stages}", torch.cat(last, 1))

    def generator(self, x, hierarchy=0):
        """Derained images, images of the hierarchy, and its features; height and width must be multiples of 56."""
        encoded, y = [], self.conv("embed", x, 1)
        for k, stages in enumerate(self.stages):
            y = self.plnlim(f"encoder.{k}", F.max_pool2d(y, 2) if k else y, stages)
            encoded.append(y)
        decoded = [self.plnlim("decoder.3", y, self.stages[3])]
        for k in (2, 1, 0):
            up = F.interpolate(decoded[0], scale_factor=2, mode="bilinear", align_corners=False)
            y = self.conv(f"up.{k}", up, 1) + encoded[k]
            decoded.insert(0, self.plnlim(f"decoder.{k}", y, self.stages[k]))
        features, images = [], []
        for k in range(4 if hierarchy else 0):
            y = self.conv(f"joins.{k}", torch.cat((encoded[k], decoded[k]), 1), 1)
            features.append(self.plnlim(f"supervised.{k}", y, hierarchy))
            images.append(self.conv(f"outputs.{k}", features[-1], 1))
        return self.conv("output", decoded[0], 1) + x, images, features

    def discriminator(self, image, features, stages=2):
        """Eq. 7: logits of every scale."""
        x = self.plnlim("first", self.conv("embed", image, 1), stages)
        logits = []
        for k, content in enumerate(features):
            x = F.max_pool2d(x, 2) if k else x
            x = self.plnlim(f"units.{k}", self.conv(f"joins.{k}", torch.cat((content, x), 1), 1), stages)
            logits.append(self.conv(f"logits.{k}", x, 1))
        return logits


def adversarial(real, fake):
    """Losses of the generator (eq. 8 as printed) and of the discriminator (its reverse) at one scale."""

    def likely(p, q):
        return 1 / (1 + torch.exp(-(p - q.mean())))

    generator = -torch.log(1 - likely(real, fake)).mean() - torch.log(likely(fake, real)).mean()
    discriminator = -torch.log(likely(real, fake)).mean() - torch.log(1 - likely(fake, real)).mean()
    return generator, discriminator
