"""NLEDN: encoder-decoder of dense blocks, each of which begins with non-local attention.

Li et al., Non-locally Enhanced Encoder-Decoder Network for Single Image De-raining, ACM Multimedia 2018. The decoder
puts its features back to the positions of the maxima that the encoder found in max pooling.

Pixels attend to each other within the pieces of a grid. All pieces are processed as one batch. If the size of a map is
not a multiple of the grid, the map is padded at the bottom and the right, and the padding is masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.graphs import exporting
from derain.nn.padding import pad_to_minimum

MAX_GRID = 64
"""Maximum number of pieces along a side. It is limited, since the size to which images are padded grows with it."""


class NonLocal(nn.Module):
    """Non-local attention: each pixel attends to the keys and values of its piece, both max-pooled by 2.

    Args:
        channels: Number of channels.
        inner: Number of channels of queries, keys and values.
        grid: Number of pieces along each side; 1 for attention to the whole map.

    Shape:
        ``(b, channels, h, w)`` → same; ``h, w > grid``, so that pieces have at least 2×2 pixels.

    References:
        NLEDN, eqs. 1 to 4: ``y = W softmax(θ(x)ᵀ φ(x)) g(x) + x``, without scaling.
    """

    def __init__(self, channels: int, inner: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.project = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Attend within each piece, and add the input."""
        height, width = x.shape[2:]
        grid = self.grid
        rows, columns = ((side + grid - 1) // grid for side in (height, width))  # of a piece
        query = self.pieces(self.query(x), rows, columns)
        key, value = (
            F.max_pool2d(self.pieces(layer(x), rows, columns).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            for layer in (self.key, self.value)
        )
        query, key, value = (features.flatten(1, 2)[:, None] for features in (query, key, value))
        mask = self.mask(x, rows, columns)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        inner = attended.shape[-1]
        whole = attended.reshape(-1, grid, grid, rows, columns, inner).permute(0, 5, 1, 3, 2, 4)
        whole = whole.reshape(-1, inner, grid * rows, grid * columns)[..., :height, :width]
        return cast(Tensor, self.project(whole) + x)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: 0, and those of attention, which thop misses."""
        batch, _, height, width = output.shape
        rows, columns = ((side + self.grid - 1) // self.grid for side in (height, width))
        keys = (rows // 2) * (columns // 2)
        return 0, 2 * batch * height * width * keys * self.query.out_channels

    def pieces(self, x: Float[Tensor, "b c h w"], rows: Any, columns: Any) -> Float[Tensor, "n rows columns c"]:
        """Split a map, padded at the bottom and the right by repeating the border, into pieces of equal size.

        Args:
            x: The map.
            rows: Number of rows of a piece.
            columns: Number of columns of a piece.
        """
        grid, (height, width) = self.grid, x.shape[2:]
        if grid > 1 and (exporting() or height % grid or width % grid):
            x = F.pad(x, (0, grid * columns - width, 0, grid * rows - height), "replicate")
        split = x.reshape(-1, x.shape[1], grid, rows, grid, columns).permute(0, 2, 4, 3, 5, 1)
        return split.reshape(-1, rows, columns, x.shape[1])

    def mask(self, x: Float[Tensor, "b c h w"], rows: Any, columns: Any) -> Tensor | None:
        """Return the summand of the attention scores, ``(b · pieces, 1, 1, keys)``, or None if `pieces` does not pad.

        It is 0 for keys inside the map, and the lowest number for keys of the padding.

        Args:
            x: The map.
            rows: Number of rows of a piece.
            columns: Number of columns of a piece.
        """
        grid, (height, width) = self.grid, x.shape[2:]
        if grid == 1 or not (exporting() or height % grid or width % grid):
            return None

        def inside(side: Any, length: Any) -> Tensor:
            """Return whether keys are inside along an axis of ``side`` pixels, ``(grid, keys)``.

            A key is inside if both of its pixels are. The first key of each piece counts as inside, so that no piece is
            without keys.
            """
            key = torch.arange(length // 2, device=x.device)
            piece = torch.arange(grid, device=x.device)[:, None]
            has_both_pixels: Tensor = piece * length + 2 * key + 1 < side
            return has_both_pixels | (key == 0)

        inside_map = inside(height, rows)[:, None, :, None] & inside(width, columns)[None, :, None, :]
        mask = torch.zeros_like(inside_map, dtype=x.dtype).masked_fill(~inside_map, torch.finfo(x.dtype).min)
        mask = mask.reshape(1, grid * grid, 1, 1, -1)
        return mask.expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)


class DenseBlock(nn.Module):
    """Non-local attention and densely connected convolutions ("NEDB").

    Args:
        channels: Number of channels.
        growth: Number of output channels of each convolution.
        convolutions: Number of convolutions.
        inner: Number of channels of queries, keys and values.
        grid: Number of pieces along each side; see `NonLocal`.

    Shape:
        ``(b, channels, h, w)`` → same; ``h, w > grid``.

    References:
        NLEDN, Figure 3 and section 3.2.
    """

    def __init__(self, channels: int, growth: int, convolutions: int, inner: int, grid: int) -> None:
        super().__init__()
        self.attention = NonLocal(channels, inner, grid)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels + index * growth, growth, 3, padding=1) for index in range(convolutions)
        )
        self.fusion = nn.Conv2d(channels + convolutions * growth, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        dense = self.attention(x)
        for convolution in self.convolutions:
            dense = torch.cat((dense, F.relu(convolution(dense), inplace=True)), dim=1)
        return cast(Tensor, self.fusion(dense) + x)


def unpool(
    x: Float[Tensor, "b c h2 w2"], indices: Int[Tensor, "b c h2 w2"], like: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Return a map with values at the indices of max pooling, and 0 elsewhere.

    The result is that of `torch.nn.functional.max_unpool2d`, but deterministic on a GPU.

    Args:
        x: The values.
        indices: Indices of the maxima from `torch.nn.functional.max_pool2d`.
        like: A map with the shape before pooling.

    Example:
        >>> unpool(torch.ones(1, 1, 1, 1), torch.tensor([[[[3]]]]), torch.empty(1, 1, 2, 2)).tolist()
        [[[[0.0, 0.0], [0.0, 1.0]]]]
    """
    zeros = torch.zeros_like(like).flatten(2)
    return zeros.scatter(2, indices.flatten(2), x.flatten(2)).reshape(like.shape)


class NLEDN(Network):
    """NLEDN: encoder and decoder with three levels of dense blocks.

    Args:
        channels: Number of channels at all levels.
        growth: Number of output channels of each convolution of a dense block.
        convolutions: Number of convolutions of a dense block.
        inner: Number of channels of queries, keys and values.
        grids: Number of pieces along each side at each of the three levels, finest first; 1 to 64.

    Outputs:
        ``derained``: The rainy image minus the rain.
        ``rain``: The rain, in [-1, 1].

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped. Sides below 16 pixels (more for larger ``grids``), which the
        authors' code cannot process, are padded by repeating the border.

    Raises:
        DerainError: If ``grids`` is not three numbers from 1 to 64.

    References:
        NLEDN, Figure 2. 1,005,379 parameters by default.
    """

    bytes_per_pixel: int = 3600
    signature: ClassVar[str] = "up_1.region_non_local.non_local_block.theta.weight"
    published_options: ClassVar[frozenset[str]] = frozenset({"grids"})
    published_names: ClassVar[Names] = (
        (r"^conv1\.", "head."),
        (r"^conv2\.", "features."),
        (r"^up_1\.", "encoder.0."),
        (r"^up_2\.", "encoder.1."),
        (r"^up_3\.", "encoder.2."),
        (r"^down_3\.", "bottom."),
        (r"^down_2\.", "decoder.1."),
        (r"^down_1\.", "decoder.0."),
        (r"^down_2_fusion\.", "joins.1."),
        (r"^down_1_fusion\.", "joins.0."),
        (r"^fusion\.0\.", "join."),
        (r"^fusion\.1\.", "refinement."),
        (r"^final_conv\.0\.", "tail."),
        (r"\.(region_non_local\.non_local_block|non_local)\.", ".attention."),
        (r"\.theta\.", ".query."),
        (r"\.phi\.0\.", ".key."),
        (r"\.g\.0\.", ".value."),
        (r"\.W\.", ".project."),
        (r"\.group_(\d+)\.0\.", r".convolutions.\1."),
        (r"\.fusion\.0\.", ".fusion."),
    )

    def __init__(
        self,
        channels: int = 64,
        growth: int = 32,
        convolutions: int = 4,
        inner: int = 32,
        grids: Sequence[int] = (8, 4, 2),
    ) -> None:
        super().__init__()
        if len(grids) != 3 or not all(1 <= grid <= MAX_GRID for grid in grids):
            raise DerainError(f"grids {list(grids)}: expected three numbers from 1 to {MAX_GRID}, one per level")
        # The pieces of each level, and the map at 1/8 of the size, need at least 2×2 pixels.
        self.smallest_side = max(16, *((grid + 1) << level for level, grid in enumerate(grids)))

        def block(grid: int) -> DenseBlock:
            return DenseBlock(channels, growth, convolutions, inner, grid)

        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        self.encoder = nn.ModuleList(block(grid) for grid in grids)
        self.bottom = block(1)
        self.joins = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in range(2))
        self.decoder = nn.ModuleList(block(grid) for grid in grids[1:])
        self.join = nn.Conv2d(3 * channels, channels, 1)
        self.refinement = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained`` and ``rain``."""
        height, width = image.shape[2:]
        rain = self.rain(pad_to_minimum(image, self.smallest_side))[..., :height, :width]
        return {"derained": image - rain, "rain": rain}

    def rain(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the rain, in [-1, 1], of images with sides of at least ``smallest_side`` pixels."""
        shallow = self.head(image)
        features = x = self.features(shallow)
        finest, maps, maxima = None, [], []
        for block in self.encoder:
            maps.append(x)
            x = block(x)
            finest = x if finest is None else finest
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            maxima.append(indices)
        x = self.bottom(x)
        for level in (1, 0):
            pooled = maps[level + 1]
            x = unpool(x, maxima[level + 1], pooled)
            x = self.decoder[level](self.joins[level](torch.cat((pooled, x), dim=1)))
        x = self.join(torch.cat((features, unpool(x, maxima[0], features), cast(Tensor, finest)), dim=1))
        return torch.tanh(self.tail(self.refinement(x) + shallow))

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the clean image, and as the rain the rainy minus the clean image."""
        return {"derained": clean, "rain": rainy - clean}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``grids``; None for another network."""
        if cls.signature not in state:
            return None
        inner, channels = state[cls.signature].shape[:2]
        return {
            "channels": channels,
            "growth": state["up_1.group_0.0.weight"].shape[0],
            "convolutions": count_numbered(state, r"up_1\.group_(\d+)\."),
            "inner": inner,
        }
