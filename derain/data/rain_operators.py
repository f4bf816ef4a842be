"""Rain and camera degradations of batches during training, as operators of kornia, on the device of the batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from kornia.augmentation import AugmentationSequential, IntensityAugmentationBase2D
from kornia.filters import gaussian_blur2d
from torch import Tensor

from derain.data.jpeg import jpeg
from derain.data.rain import SKY
from derain.data.rain_ranges import Number, RainRanges, Range
from derain.data.rain_streaks import StreakLayers, draw_lanes, measured_opacity, read_streak_images, streak_opacity

Params = dict[str, Tensor]
"""Drawn parameters by name; the first dimension of each is that of the batch."""

MIN_ASPECT_RATIO = 5
"""Smallest mean length of streaks, in multiples of their width; shorter ones would look like snow."""


def uniform(limits: Range, count: int) -> Tensor:
    """Draw ``count`` numbers uniformly."""
    return torch.empty(count).uniform_(*limits)


def log_uniform(limits: Range, count: int) -> Tensor:
    """Draw ``count`` numbers with a uniform logarithm; the lower limit is raised to at least 0.001 of the upper one."""
    low, high = torch.tensor(limits).clamp(min=1e-3 * max(limits[1], 1e-9)).log().tolist()
    return uniform((low, high), count).exp()


def integers(limits: Range, count: int) -> Tensor:
    """Draw ``count`` integers uniformly, both limits included."""
    return torch.randint(int(limits[0]), int(limits[1]) + 1, (count,))


def per_image(values: Tensor, image: Tensor) -> Tensor:
    """Return one number per image with the shape ``(b, 1, 1, 1)``, and the device and type of the images."""
    return values.to(image.device, image.dtype)[:, None, None, None]


def brightness_quantile(image: Float[Tensor, "b 3 h w"], quantile: float) -> Float[Tensor, "b 1 1 1"]:
    """Return a quantile of the values of each image in all channels, from every fourth row and column."""
    values = image[:, :, ::4, ::4].flatten(1)
    rank = max(1, round(quantile * values.shape[1]))
    return values.kthvalue(rank, dim=1).values[:, None, None, None]


class SampleOperator(IntensityAugmentationBase2D, ABC):
    """Operator that computes only the samples that it changes; kornia's operators compute all samples.

    Args:
        share: Probability that a sample is changed.
    """

    def __init__(self, share: Number) -> None:
        super().__init__(p=share)

    @abstractmethod
    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Return the degraded images, same shape and range.

        Args:
            image: ``(b, 3, h, w)`` in [0, 1]; operators of the camera also accept ``(b, 6, h, w)``, pairs of images.
            params: Parameters drawn by ``generate_parameters``, one row for each of these images.
        """

    def transform_inputs(
        self,
        input: Tensor,
        params: Params,
        flags: Mapping[str, Any],
        transform: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the batch with the drawn samples degraded; kornia's method would compute all samples."""
        drawn = params["batch_prob"].gt(0.5).nonzero().flatten()
        if len(drawn) == 0:
            return input
        tensors = {name: value for name, value in params.items() if isinstance(value, Tensor)}  # kornia adds others
        drawn_params = {name: value[drawn] for name, value in tensors.items() if name != "forward_input_shape"}
        batch = self.transform_tensor(input)
        if len(drawn) == len(batch):
            return self.transform(batch, drawn_params)
        index = drawn.to(batch.device)
        return batch.index_copy(0, index, self.transform(batch[index], drawn_params))


def smooth_map(grid: Float[Tensor, "b 4 4"], image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Interpolate ``4 × 4`` values to the size of the images; the result is at least 0."""
    coarse = grid[:, None].to(image.device, image.dtype)
    return F.interpolate(coarse, size=image.shape[2:], mode="bicubic", align_corners=False).clamp_(min=0)


def add_veil(image: Tensor, amount: Tensor, grid: Tensor) -> Tensor:
    """Mix images with mist; its light is 1.15 times the 90 % quantile of the image, limited to 0.4 to 0.97.

    Args:
        image: ``(b, 3, h, w)`` in [0, 1].
        amount: ``(b,)`` in [0, 1], opacity of the mist.
        grid: ``(b, 4, 4)``, at least 0: factors of the opacity in parts of the image.
    """
    light = (1.15 * brightness_quantile(image, 0.9)).clamp(0.4, 0.97)
    opacity = (smooth_map(grid, image) * per_image(amount, image)).clamp_(max=1)
    return torch.lerp(image, light.expand_as(image), opacity.expand_as(image))


class RandomMist(SampleOperator):
    """Patchy mist.

    Args:
        opacity: Range of the opacity, which is multiplied by about 0.6 to 1.1 in parts of the image.
        share: Probability that a sample is changed.
    """

    def __init__(self, opacity: Range, share: Number) -> None:
        super().__init__(share)
        self.opacity = opacity

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the opacity, and its factors in parts of the image."""
        count = batch_shape[0]
        return {"amount": uniform(self.opacity, count), "grid": 0.6 + 0.5 * torch.rand(count, 4, 4)}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Add the mist."""
        return add_veil(image, params["amount"], params["grid"])


class RandomExposure(SampleOperator):
    """Exposure: ``image ** gamma``.

    Args:
        gamma: Range of the exponent; above 1, images become darker.
        share: Probability that a sample is changed.
    """

    def __init__(self, gamma: Range, share: Number) -> None:
        super().__init__(share)
        self.gamma = gamma

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the exponents."""
        return {"gamma": log_uniform(self.gamma, batch_shape[0])}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Raise the images to the exponents."""
        return image.pow(per_image(params["gamma"], image))


class RandomLight(SampleOperator):
    """Colour of the light: a factor of each channel; values above 1 are clipped.

    Args:
        gain: Range of the factors.
        share: Probability that a sample is changed.
    """

    def __init__(self, gain: Range, share: Number) -> None:
        super().__init__(share)
        self.gain = gain

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the factors."""
        return {"gain": uniform(self.gain, 3 * batch_shape[0]).reshape(-1, 3)}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Multiply the channels of the images."""
        return image.mul(params["gain"].to(image.device, image.dtype)[:, :, None, None]).clamp_(max=1)


class RandomRain(SampleOperator):
    """Streaks, and the veil of distant rain; streaks are synthesized in depth layers, or cut from images of streaks.

    Args:
        ranges: Ranges of the parameters.
        share: Probability that a sample is changed.

    Raises:
        DerainError: If there are no images of streaks in the folder that ``ranges`` names, or one cannot be read or is
            not dark.

    References:
        Garg and Nayar, Vision and Rain, IJCV 2007 (streaks are translucent and show the light of their surroundings);
        Yang et al., CVPR 2017 (added streaks); Luo et al., ICCV 2015 (screen blend).
    """

    def __init__(self, ranges: RainRanges, share: Number) -> None:
        super().__init__(share)
        self.ranges = ranges
        images = read_streak_images(Path(ranges.streak_images)) if ranges.streak_images else None
        self.register_buffer("streak_images", images, persistent=False)

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the rain of each image, and the angles of its layers."""
        ranges, count = self.ranges, batch_shape[0]
        max_layers = int(ranges.layers[1])
        angle = uniform(ranges.angle, count)
        angle = torch.where(torch.rand(count) < ranges.oblique_share, (1.6 * angle).clamp(-90, 90), angle)
        spread = log_uniform(ranges.spread, count)[:, None] * torch.randn(count, max_layers)
        veiled = torch.rand(count) < ranges.veil_share
        return {
            "density": log_uniform(ranges.density, count),
            "length": log_uniform(ranges.length, count),
            "width": log_uniform(ranges.width, count),
            "angle": torch.deg2rad(angle[:, None] + spread),
            "layers": integers(ranges.layers, count),
            "brightness": uniform(ranges.brightness, count),
            "hardness": torch.where(torch.rand(count) < ranges.hard_share, 1 + 1.5 * torch.rand(count), 1),
            "measured": torch.rand(count) < ranges.measured_share,
            "limit": uniform(ranges.mean_opacity, count),
            "veil": veiled * uniform(ranges.veil, count),
            "grid": 0.6 + 0.5 * torch.rand(count, 4, 4),
            "blend": torch.rand(count),
            "tint": 1 + 0.012 * torch.randn(count, 3) * (torch.rand(count, 1) < 0.5),
            "sky": 0.9 + 0.7 * torch.rand(count),
        }

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Add the rain."""
        opacity = self.opacity(image, params)[:, None]
        mean = opacity.mean((1, 2, 3), keepdim=True)
        opacity = opacity * (per_image(params["limit"], image) / mean.clamp(min=1e-6)).clamp(max=1)
        fullness = (4 * opacity.mean((1, 2, 3))).clamp(max=1)  # 1 for dense streaks
        veil = params["veil"].to(image.device) * (0.3 + 0.7 * fullness)
        scene = add_veil(image, veil, params["grid"])
        return self.blend(scene, opacity, params)

    def opacity(self, image: Tensor, params: Params) -> Float[Tensor, "b h w"]:
        """Return the opacity of the streaks, in [0, 1], before its mean is limited."""
        size = image.shape[2:]
        measured = params["measured"].nonzero().flatten()
        synthesized = (~params["measured"]).nonzero().flatten()
        opacity = image.new_zeros(len(image), *size)
        if len(synthesized):
            opacity[synthesized.to(image.device)] = _layered_opacity(
                {name: value[synthesized] for name, value in params.items()}, size, image.device
            )
        if len(measured):
            opacity[measured.to(image.device)] = measured_opacity(cast(Tensor, self.streak_images), len(measured), size)
        return opacity

    def blend(self, scene: Tensor, opacity: Float[Tensor, "b 1 h w"], params: Params) -> Tensor:
        """Return the scene behind streaks that are added, are screened, or show the light of the sky."""
        tint = params["tint"].to(scene.device, scene.dtype)[:, :, None, None]
        sky = per_image(params["sky"], scene) * brightness_quantile(scene, 0.92)
        sky = sky.clamp(SKY[0] / 255 * 0.7, 1) * tint
        blend = per_image(params["blend"], scene)
        added = blend < self.ranges.added_share
        screened = ~added & (blend < self.ranges.added_share + self.ranges.screened_share)
        # scene + S (light − hidden · scene): the blends differ in the light of a streak and in how much it hides.
        light = torch.where(added | screened, tint, sky)
        hidden = torch.where(screened, tint, (~added).to(scene.dtype))
        return (scene + opacity * (light - hidden * scene)).clamp_(0, 1)


def _layered_opacity(params: Params, size: torch.Size, device: torch.device) -> Float[Tensor, "b h w"]:
    """Return ``1 − Π (1 − S)`` over the depth layers of each image; near streaks are longer, wider and brighter."""
    count, max_layers = params["angle"].shape
    index = torch.arange(max_layers)
    used = index < params["layers"][:, None]
    farthest = (params["layers"] - 1).clamp(min=1)[:, None]
    nearness = (1 - index / farthest)[used]
    image_index, layer_index = used.nonzero(as_tuple=True)
    extent = 0.35 + 0.65 * nearness
    length = torch.maximum(params["length"], MIN_ASPECT_RATIO * params["width"])
    layers = StreakLayers(
        angle=params["angle"][used],
        length=length[image_index] * extent,
        width=params["width"][image_index] * extent,
        coverage=(params["density"] / params["layers"])[image_index],
    )
    opacity = streak_opacity(layers, draw_lanes(layers, size, device), size)
    hardness = params["hardness"][image_index].to(device)[:, None, None]
    opacity = (hardness * opacity - 0.15 * (hardness - 1)).clamp_(0, 1)  # a steeper profile has sharper edges
    strength = params["brightness"][image_index] * (0.5 + 0.5 * nearness)
    transmission = opacity.new_ones(count, max_layers, *size)
    transmission[image_index.to(device), layer_index.to(device)] = 1 - strength.to(device)[:, None, None] * opacity
    return 1 - transmission.prod(1)


class RandomLensDrops(SampleOperator):
    """Drops on the lens: each is a small fish-eye image of the scene, upside down and out of focus.

    Horizontal radii are 0.02 to 0.1 of the shorter side of the image, vertical ones up to 1.3 times as large.

    Args:
        count: Range of the number of drops.
        share: Probability that a sample is changed.

    References:
        You et al., Adherent Raindrop Modeling, Detection and Removal in Video, TPAMI 2016.
    """

    def __init__(self, count: Range, share: Number) -> None:
        super().__init__(share)
        self.count = count

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the number of drops of each image; and centre, radius and height of as many drops as an image may have.

        Centres are fractions of width and height, radii fractions of the shorter side, and heights multiples of the
        width of the drop.
        """
        samples, max_drops = batch_shape[0], int(self.count[1])
        return {
            "count": integers(self.count, samples),
            "centre": torch.rand(samples, max_drops, 2),
            "radius": 0.02 + 0.08 * torch.rand(samples, max_drops),
            "height": 1 + 0.3 * torch.rand(samples, max_drops),
        }

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Add the drops; where drops overlap, the one with the nearest centre (in radii) is visible."""
        height, width = image.shape[2:]
        side = min(height, width)
        drops = {name: value.to(image.device) for name, value in params.items() if name != "batch_prob"}
        y = torch.linspace(0, height / side, height, device=image.device)[:, None]
        x = torch.linspace(0, width / side, width, device=image.device)
        centre = drops["centre"] * torch.tensor([width / side, height / side], device=image.device)
        radius = drops["radius"][:, :, None, None]
        across = (x - centre[:, :, 0, None, None]) / radius
        down = (y - centre[:, :, 1, None, None]) / (radius * drops["height"][:, :, None, None])
        rho = torch.hypot(across * (1 - 0.2 * down), down)  # 1 at the rim; drops are wider below than above
        absent = torch.arange(rho.shape[1], device=image.device) >= drops["count"][:, None]
        rho, drop = rho.masked_fill(absent[:, :, None, None], 9).min(1)  # 9 is far outside
        across, down = (part.gather(1, drop[:, None])[:, 0] for part in torch.broadcast_tensors(across, down))  # type: ignore[no-untyped-call]
        flat = drop.flatten(1)
        middle_x, middle_y = (centre[:, :, axis].gather(1, flat).view_as(drop) for axis in (0, 1))
        reach = 0.175 * (1 + rho**2)
        grid = torch.stack(
            [2 * (middle_x - across * reach) * side / width - 1, 2 * (middle_y - down * reach) * side / height - 1], -1
        )
        blurred = F.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
        refracted = F.grid_sample(blurred, grid, padding_mode="reflection", align_corners=True)
        shade = 1 - 0.45 * rho.clamp(0, 1) ** 4 + 0.15 * (-down).clamp(0, 1)
        opacity = ((1 - rho) * 4).clamp(0, 1)[:, None]
        return torch.lerp(image, (refracted * shade[:, None]).clamp(0, 1), opacity.expand_as(image))


class RandomDefocus(SampleOperator):
    """Gaussian blur; faster than kornia's ``RandomGaussianBlur``, which also computes the samples that stay sharp.

    Args:
        deviation: Range of the standard deviation in pixels.
        share: Probability that a sample is changed.
    """

    def __init__(self, deviation: Range, share: Number) -> None:
        super().__init__(share)
        self.deviation = deviation
        self.side = 2 * math.ceil(3 * deviation[1]) + 1

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the standard deviations."""
        return {"deviation": uniform(self.deviation, batch_shape[0])}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Blur the images."""
        deviation = params["deviation"].to(image.device, image.dtype)[:, None].expand(-1, 2)
        return gaussian_blur2d(image, (self.side, self.side), deviation)


class RandomSensorNoise(SampleOperator):
    """Gaussian noise with a random standard deviation; kornia's ``RandomGaussianNoise`` has a fixed one.

    Args:
        deviation: Range of the standard deviation, in grey levels of 255.
        share: Probability that a sample is changed.
    """

    def __init__(self, deviation: Range, share: Number) -> None:
        super().__init__(share)
        self.deviation = deviation

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the standard deviations."""
        return {"deviation": uniform(self.deviation, batch_shape[0])}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Add the same noise to each image of a pair."""
        count, channels, height, width = image.shape
        pairs = image.reshape(count, channels // 3, 3, height, width)
        noise = torch.randn_like(pairs[:, :1]).mul_(per_image(params["deviation"] / 255, image)[..., None])
        return (pairs + noise).clamp_(0, 1).view_as(image)


class RandomResampling(SampleOperator):
    """Loss of resolution: images are reduced, and enlarged again.

    Args:
        scale: Range of the scale, at most 1; one scale is drawn for all changed samples of a batch.
        share: Probability that a sample is changed.
    """

    def __init__(self, scale: Range, share: Number) -> None:
        super().__init__(share)
        self.scale = scale

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the scale of the batch."""
        return {"scale": uniform(self.scale, 1).expand(batch_shape[0])}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Resample the images."""
        scale = float(params["scale"][0])
        size = [max(1, round(scale * side)) for side in image.shape[2:]]
        reduced = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(reduced, size=image.shape[2:], mode="bicubic", align_corners=False).clamp_(0, 1)


class RandomCompression(SampleOperator):
    """JPEG compression.

    Args:
        quality: Range of the quality, 1 to 100.
        share: Probability that a sample is changed.
    """

    def __init__(self, quality: Range, share: Number) -> None:
        super().__init__(share)
        self.quality = quality

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> Params:
        """Draw the quality of each image."""
        return {"quality": uniform(self.quality, batch_shape[0])}

    def transform(self, image: Tensor, params: Params) -> Tensor:
        """Encode and decode both images of a pair, with the same quality."""
        channels, height, width = image.shape[1:]
        quality = params["quality"].repeat_interleave(channels // 3).to(image.device)
        return jpeg(image.reshape(-1, 3, height, width), quality).view_as(image)


class RainDegradation(torch.nn.Module):
    """Degradation that makes pairs of a rainy and a clean image from clean images, determined by a seed.

    Exposure, light and mist change the scene. Then rain and drops are added. Last, the camera degrades the rainy and
    the clean image alike (with the same noise), so that a network learns to remove rain and drops, and nothing else.

    Args:
        ranges: Ranges of all parameters.

    Raises:
        DerainError: If the images of streaks that ``ranges`` names are rejected; see `RandomRain`.
    """

    def __init__(self, ranges: RainRanges) -> None:
        super().__init__()
        self.scene = AugmentationSequential(
            RandomExposure(ranges.gamma, ranges.gamma_share),
            RandomLight(ranges.gain, ranges.gain_share),
            RandomMist(ranges.mist, ranges.mist_share),
        )
        self.rain = AugmentationSequential(
            RandomRain(ranges, 1 - ranges.clear_share), RandomLensDrops(ranges.drops, ranges.drops_share)
        )
        self.camera = AugmentationSequential(
            RandomDefocus(ranges.defocus, ranges.defocus_share),
            RandomSensorNoise(ranges.noise, ranges.noise_share),
            RandomResampling(ranges.resampling, ranges.resampling_share),
            RandomCompression(ranges.jpeg, ranges.jpeg_share),
        )

    @torch.no_grad()
    def forward(
        self, clean: Float[Tensor, "b 3 h w"], seed: int
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]:
        """Return rainy and clean images in [0, 1], rounded to 8 bits.

        The state of the global random number generators is left unchanged.

        Args:
            clean: Clean images in [0, 1].
            seed: Seed; equal seeds and images yield equal results on the same device.
        """
        device = clean.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed)
            scene = self.scene(clean)
            pair = torch.cat((self.rain(scene), scene), 1)  # as channels of one image: the camera degrades both alike
            rainy, clean = self.camera(pair).mul_(255).round_().div_(255).chunk(2, 1)
        return rainy, clean
