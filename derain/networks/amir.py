"""AMIR: Restormer whose features are routed by an instruction vector, which is computed from the image.

Yang et al., All-In-One Medical Image Restoration via Task-Adaptive Routing, MICCAI 2024.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network
from derain.networks.shapes import restormer_options
from derain.nn.graphs import compiling_or_exporting, has_no_values
from derain.nn.padding import pad_to_minimum
from derain.nn.restormer import Downsample, PatchEmbedding, TransformerBlock, Upsample, pointwise, spatial

MIN_DEVIATION = 0.01
"""Minimum standard deviation of the noise that training adds to the logits of the gates."""


class Instruction(nn.Module):
    """Instruction vector of an image: GELU of a weighted sum of learned vectors ("RIN").

    Args:
        atoms: Number of learned vectors.
        channels: Length of a vector.
        hidden: Number of output channels of all convolutions but the last, which has 32.

    Shape:
        Images ``(b, 3, h, w)`` → ``(b, channels)``. Sides below 9 pixels are padded by repeating the border.

    References:
        AMIR, section 2.2.
    """

    def __init__(self, atoms: int, channels: int, hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in (
            (3, hidden, 3),
            (hidden, hidden, 3),
            (hidden, hidden, 1),
            (hidden, hidden, 1),
            (hidden, 32, 1),
        ):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride=kernel), nn.LeakyReLU(0.1, inplace=True)]
        self.condition = nn.Sequential(*layers[:-1])
        self.weights = nn.Linear(32, atoms)
        self.atoms = nn.Parameter(torch.randn(atoms, channels))

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b i"]:
        """Return the instruction vectors of images."""
        weights = self.weights(self.condition(pad_to_minimum(image, 9)).mean((2, 3))).softmax(-1)
        return F.gelu(weights @ self.atoms)


class ChannelRouting(nn.Module):
    """Scale and shift of each channel, weighted by a function of the instruction vector; both are 0 before training.

    Args:
        channels: Number of channels.
        instruction: Length of the instruction vector.

    References:
        AMIR, section 2.2.
    """

    def __init__(self, channels: int, instruction: int) -> None:
        super().__init__()
        self.instruction = nn.Linear(instruction, channels)
        self.scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b h w c"], instruction: Float[Tensor, "b i"]) -> Float[Tensor, "b h w c"]:
        """Return ``x + s (scale x + shift)``, where the instruction determines ``s`` in (0, 1) for each channel."""
        strength = self.instruction(instruction).sigmoid()[:, None, None]
        return torch.addcmul(strength * self.shift.flatten(), x, 1 + strength * self.scale.flatten())


class SpatialRouting(nn.Module):
    """Mixture of experts: each pixel selects experts by its features and the instruction vector.

    With expert outputs y and gates g, which sum to 1 over the selected experts, the result is
    ``x + log Σ g exp(y)`` for each channel. In training, noise is added to the logits of the gates.

    Args:
        channels: Number of channels.
        instruction: Length of the instruction vector.
        experts: Number of experts.
        selected: Number of experts that each pixel selects.
        expansion: Number of hidden channels of an expert divided by ``channels``.

    Raises:
        DerainError: If ``selected`` is not from 1 to ``experts - 1``.

    References:
        AMIR, section 2.2; noisy gates and their loss: Shazeer et al., Outrageously Large Neural Networks, ICLR 2017,
        eqs. 3 to 11.
    """

    def __init__(self, channels: int, instruction: int, experts: int, selected: int, expansion: float) -> None:
        super().__init__()
        if not 0 < selected < experts:
            raise DerainError(f"selected {selected}: expected 1 to {experts - 1}, fewer than the {experts} experts")
        self.selected = selected
        hidden = int(expansion * channels)
        self.instruction = nn.Linear(instruction, channels)
        self.gate = nn.Parameter(torch.randn(2 * channels, experts))
        self.noise = nn.Parameter(torch.zeros(2 * channels, experts))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)) for _ in range(experts)
        )

    def forward(
        self, x: Float[Tensor, "b h w c"], instruction: Float[Tensor, "b i"]
    ) -> tuple[Float[Tensor, "b h w c"], Tensor | None]:
        """Return the features and, in training mode, the loss that balances the experts, else None."""
        instruction = self.instruction(instruction)
        logits = self._logits(x, instruction, self.gate)
        loss = None
        if self.training:
            clean = logits
            deviation = F.softplus(self._logits(x, instruction, self.noise)) + MIN_DEVIATION
            logits = clean + torch.randn_like(clean) * deviation
            loss = self._imbalance(clean, logits, deviation)
        top, index = logits.topk(self.selected, dim=1)
        mix = self._mix_all if compiling_or_exporting() or has_no_values(x) else self._mix_selected
        mixed = mix(x.flatten(0, 2), index, top.log_softmax(1)).reshape(x.shape)
        return x + mixed, loss

    def extra_macs(self, inputs: tuple[Any, ...], output: Any) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: minus those of unselected experts, and those of the gates.

        When MACs are counted, all experts process all pixels. thop misses the gates.
        """
        pixels = inputs[0].numel() // inputs[0].shape[-1]
        weight_count = sum(layer.weight.numel() for layer in self.experts[0].modules() if isinstance(layer, nn.Linear))
        not_selected = len(self.experts) - self.selected
        return -not_selected * weight_count * pixels, self.gate.numel() * pixels

    def _logits(self, x: Tensor, instruction: Tensor, weight: Tensor) -> Float[Tensor, "n experts"]:
        """Return ``[x, instruction] · weight`` for each pixel; ``weight`` is ``(2c, experts)``."""
        of_features, of_instruction = weight.chunk(2)
        return (x @ of_features + (instruction @ of_instruction)[:, None, None]).flatten(0, 2)

    def _mix_selected(
        self, x: Float[Tensor, "n c"], index: Int[Tensor, "n k"], log_gates: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n c"]:
        """Apply each expert to the pixels that selected it, and mix the results.

        Args:
            x: Features of all pixels.
            index: Indices of the ``k`` experts that each pixel selected.
            log_gates: Logarithms of their gates.
        """
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=len(self.experts)).tolist()
        groups = torch.split(x[order // self.selected], counts)
        grouped = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        outputs = torch.empty_like(grouped)
        outputs[order] = grouped
        return reduce(torch.logaddexp, (outputs.reshape(*index.shape, -1) + log_gates[..., None]).unbind(1))

    def _mix_all(
        self, x: Float[Tensor, "n c"], index: Int[Tensor, "n k"], log_gates: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n c"]:
        """Return the same as `_mix_selected`, from all experts for all pixels, so that no size depends on values."""
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        lowest = torch.finfo(log_gates.dtype).min  # instead of -inf, which exported graphs must not contain
        log_gates = torch.full_like(outputs[..., 0], lowest, dtype=log_gates.dtype).scatter(1, index, log_gates)
        return torch.logsumexp(outputs + log_gates[..., None], dim=1)

    def _imbalance(self, clean: Tensor, noisy: Tensor, deviation: Tensor) -> Float[Tensor, ""]:
        """Return the loss that balances the experts.

        The loss is the sum of the squared coefficients of variation of two numbers per expert: the sum of its gates,
        and the expected number of pixels that select the expert.

        Args:
            clean: Logits ``(n, experts)`` without noise.
            noisy: The logits with noise.
            deviation: Standard deviation of the noise, ``(n, experts)``.
        """
        top, index = noisy.topk(self.selected + 1, dim=1)
        gates = top[:, :-1].softmax(1)
        importance = torch.zeros_like(noisy).scatter(1, index[:, :-1], gates).sum(0)
        # The k-th largest logit of the other experts, which an expert must exceed to be selected.
        threshold = torch.where(noisy > top[:, -1:], top[:, -1:], top[:, -2:-1])
        load = torch.special.ndtr((clean - threshold) / deviation).sum(0)
        return squared_variation(importance) + squared_variation(load)


def squared_variation(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation: unbiased variance divided by squared mean.

    Example:
        >>> squared_variation(torch.tensor([1.0, 3.0]))
        tensor(0.5000)
    """
    x = x.float()
    return x.var() / (x.mean().square() + 1e-10)


class AMIR(Network):
    """AMIR: Restormer with spatial routing in the encoder, and channel routing in the latent level and the decoder.

    Outputs are ``derained`` and, in training mode, ``routing_loss``: a scalar, the sum over the three spatial routings.
    The published loss is the mean absolute error plus 0.001 times ``routing_loss``.

    Args:
        dim: Number of channels at the finest level; it doubles at each level.
        blocks: Number of transformer blocks at each of the four levels; the decoder has as many as the encoder.
        refinement: Number of refinement blocks.
        heads: Number of attention heads at each of the four levels.
        expansion: Hidden channels of the feed-forward networks and of the experts divided by their channels.
        atoms: Number of learned vectors; their weighted sums are the instruction vectors.
        instruction: Length of the instruction vector.
        experts: Number of experts of each spatial routing.
        selected: Number of experts that each pixel selects; the authors' files do not record it.

    Raises:
        DerainError: If ``blocks`` or ``heads`` does not have four numbers, heads do not divide the channels of their
            level, or ``selected`` is not from 1 to ``experts - 1``.

    References:
        AMIR, section 2 and Figure 1. 23,543,918 parameters by default.
    """

    size_multiple: int = 8
    bytes_per_pixel: int = 5000
    signature: ClassVar[str] = "spatial_routing_encoder_level1.moe.w_gate"
    published_options: ClassVar[frozenset[str]] = frozenset({"selected"})
    published_names: ClassVar[Names] = (
        (r"spatial_routing_encoder_level\d\.moe\.(mean|std)", None),
        (r"^patch_embed\.", "embedding."),
        (r"^dict_generator\.CondNet\.", "instruction.condition."),
        (r"^dict_generator\.lastOut\.", "instruction.weights."),
        (r"^dict_generator\.dictionary$", "instruction.atoms"),
        (r"^spatial_routing_encoder_level(\d)\.(moe\.)?", r"spatial_routing.level\1."),
        (r"\.w_(gate|noise)$", r".\1"),
        (r"\.experts\.(\d+)\.fc1\.", r".experts.\1.0."),
        (r"\.experts\.(\d+)\.fc2\.", r".experts.\1.2."),
        (r"^channel_routing_(?:decoder_)?(level\d|latent)\.", r"channel_routing.\1."),
        (r"^(channel_routing\..*)\.gamma$", r"\1.scale"),
        (r"^(channel_routing\..*)\.beta$", r"\1.shift"),
        (r"^(\w+_routing\.\w+)\.fc\.", r"\1.instruction."),
        (r"^(en|de)coder_level(\d)\.", r"\1coder.level\2."),
        (r"^down(\d)_\d\.", r"downsample.level\1."),
        (r"^up\d_(\d)\.", r"upsample.level\1."),
        (r"^reduce_chan_level(\d)\.", r"fuse.level\1."),
    )

    def __init__(
        self,
        dim: int = 42,
        blocks: Sequence[int] = (5, 7, 7, 9),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        atoms: int = 32,
        instruction: int = 256,
        experts: int = 4,
        selected: int = 2,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or len(heads) != 4:
            raise DerainError(f"blocks {list(blocks)}, heads {list(heads)}: expected four numbers each, one per level")

        def level(channels: int, index: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads[index], expansion) for _ in range(count)))

        level_indices = {"level1": 0, "level2": 1, "level3": 2}
        widths = {"level1": dim, "level2": 2 * dim, "level3": 4 * dim}
        decoder_widths = {"level3": 4 * dim, "level2": 2 * dim, "level1": 2 * dim}  # in the order of computation
        routed_widths = {"latent": 8 * dim, **decoder_widths}
        self.instruction = Instruction(atoms, instruction)
        self.embedding = PatchEmbedding(dim)
        self.spatial_routing = nn.ModuleDict(
            {name: SpatialRouting(width, instruction, experts, selected, expansion) for name, width in widths.items()}
        )
        self.encoder = nn.ModuleDict(
            {name: level(width, level_indices[name], blocks[level_indices[name]]) for name, width in widths.items()}
        )
        self.downsample = nn.ModuleDict({name: Downsample(width) for name, width in widths.items()})
        self.latent = level(8 * dim, 3, blocks[3])
        self.upsample = nn.ModuleDict({name: Upsample(2 * widths[name]) for name in decoder_widths})
        self.fuse = nn.ModuleDict(
            {name: nn.Conv2d(2 * widths[name], widths[name], 1, bias=False) for name in ("level3", "level2")}
        )
        self.channel_routing = nn.ModuleDict(
            {name: ChannelRouting(width, instruction) for name, width in routed_widths.items()}
        )
        self.decoder = nn.ModuleDict(
            {
                name: level(width, level_indices[name], blocks[level_indices[name]])
                for name, width in decoder_widths.items()
            }
        )
        self.refinement = level(2 * dim, 0, refinement)
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=False)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``, and in training mode ``routing_loss``."""
        instruction = self.instruction(image)
        image = image.permute(0, 2, 3, 1).contiguous()
        x = self.embedding(image)
        skips, losses = {}, []
        for name, blocks in self.encoder.items():
            x, loss = self.spatial_routing[name](x, instruction)
            losses.append(loss)
            skips[name] = blocks(x)
            x = self.downsample[name](skips[name])
        x = self.latent(self.channel_routing["latent"](x, instruction))
        for name, blocks in self.decoder.items():
            x = torch.cat((self.upsample[name](x), skips.pop(name)), dim=-1)
            if name in self.fuse:
                x = pointwise(x, cast(nn.Conv2d, self.fuse[name]).weight)
            x = blocks(self.channel_routing[name](x, instruction))
        derained = spatial(self.refinement(x), self.output) + image
        outputs = {"derained": derained.permute(0, 3, 1, 2)}
        return outputs | {"routing_loss": torch.stack(losses).sum()} if self.training else outputs

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``selected``; None for another network."""
        if cls.signature not in state or (options := restormer_options(state)) is None:
            return None
        atoms, instruction = state["dict_generator.dictionary"].shape
        experts = state[cls.signature].shape[1]
        return options | {"atoms": atoms, "instruction": instruction, "experts": experts}
