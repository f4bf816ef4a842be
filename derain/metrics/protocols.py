"""Evaluation protocols: named definitions of how PSNR and SSIM are computed.

The choice of the protocol alone can change PSNR by over 1 dB.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from derain.errors import DerainError


@dataclass(frozen=True)
class Protocol:
    """Definition of PSNR and SSIM of a derained image.

    The peak of PSNR is 255. The window of SSIM is an 11×11 Gaussian with σ = 1.5, and its constants are (0.01·255)² and
    (0.03·255)². For RGB, PSNR uses the mean squared error over all channels, and SSIM is the mean over the channels.

    Attributes:
        name: Name that is reported with the scores.
        definition: Definition in one line.
        users: Papers that use the protocol.
        colour: ``y`` for BT.601 limited-range luma, (65.481 R + 128.553 G + 24.966 B) / 255 + 16 with R, G, B in 0 to
            255; or ``rgb``.
        luma_rounded: Whether luma is rounded to integers.
        output: Conversion of derained floats to 8 bit: clipped, then ``round`` or ``truncate``; ``none`` keeps floats,
            clipped for PSNR only. Clean floats are kept as well for ``none``, and else rounded.
        border: Width of the border that is cropped before PSNR and SSIM, in pixels.
        ssim: ``valid`` averages SSIM over the valid region (as in MATLAB); ``padded`` over the whole image with zero
            padding (as in PyTorch losses).
        downsample: Whether images are down-sampled for SSIM as in Wang's ssim.m: every f-th pixel of the mean over
            f×f pixels, with symmetric borders and f = max(1, round(min(h, w) / 256)), after ``border`` is cropped.
    """

    name: str
    definition: str
    users: str
    colour: Literal["y", "rgb"]
    luma_rounded: bool = False
    output: Literal["round", "truncate", "none"] = "round"
    border: int = 0
    ssim: Literal["valid", "padded"] = "valid"
    downsample: bool = False


_VALID = "SSIM 11×11 Gaussian σ 1.5, valid region"
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "matlab-y",
            f"BT.601 luma (16 to 235) in floating point, of 8-bit output (rounded); {_VALID}",
            "RCDNet; DRSformer on Rain1200 and Rain1400",
            "y",
        ),
        Protocol(
            "prenet",
            f"as matlab-y, but output truncated to 8 bit; {_VALID}",
            "PReNet; its ssim.m also down-samples large images: prenet+down",
            "y",
            output="truncate",
        ),
        Protocol(
            "restormer",
            f"BT.601 luma (16 to 235) rounded to integers, of 8-bit output (rounded); {_VALID}",
            "MPRNet, Restormer; DRSformer on Rain200 and SPA-Data",
            "y",
            luma_rounded=True,
        ),
        Protocol(
            "plnlin",
            "RGB in floating point, clipped for PSNR only; SSIM 11×11 Gaussian σ 1.5, zero padding, mean of channels",
            "PLNLIN-MCDDL, SSID-KD",
            "rgb",
            output="none",
            ssim="padded",
        ),
        Protocol(
            "ir-sde-rgb",
            f"RGB of 8-bit output (rounded), 4-pixel border cropped; {_VALID}, mean of channels",
            "IR-SDE, DA-CLIP",
            "rgb",
            border=4,
        ),
        Protocol(
            "ir-sde-y",
            f"as matlab-y, 4-pixel border cropped; {_VALID}",
            "IR-SDE, DA-CLIP",
            "y",
            border=4,
        ),
        Protocol(
            "rgb",
            f"RGB of 8-bit output (rounded); {_VALID}, mean of channels",
            "papers that report RGB without border crop",
            "rgb",
        ),
    )
}
"""Protocols by name; the first is the default."""

PROTOCOL_GROUPS = {"ir-sde": ("ir-sde-rgb", "ir-sde-y")}
"""Names of groups, and the protocols of each group, which are reported together."""

DOWNSAMPLE_SUFFIX = "+down"
"""Suffix of protocol names; it adds down-sampling to SSIM."""


def resolve(names: Sequence[str]) -> tuple[Protocol, ...]:
    """Return protocols by name, each once, in the given order.

    Args:
        names: Names in :data:`PROTOCOLS` or :data:`PROTOCOL_GROUPS`; the suffix ``+down`` adds down-sampling to SSIM.

    Raises:
        DerainError: If a name is unknown, or ``names`` is empty.

    Example:
        >>> [protocol.name for protocol in resolve(["prenet", "ir-sde"])]
        ['prenet', 'ir-sde-rgb', 'ir-sde-y']
        >>> resolve(["matlab-y+down"])[0].downsample
        True
    """
    known = ", ".join([*PROTOCOLS, *PROTOCOL_GROUPS])
    protocols: dict[str, Protocol] = {}
    for name in names:
        base = name.removesuffix(DOWNSAMPLE_SUFFIX)
        for member in PROTOCOL_GROUPS.get(base, (base,)):
            if member not in PROTOCOLS:
                raise DerainError(
                    f"no protocol '{name}'; choose from {known} (add {DOWNSAMPLE_SUFFIX} for SSIM with down-sampling)"
                )
            protocol = PROTOCOLS[member]
            if name.endswith(DOWNSAMPLE_SUFFIX):
                protocol = _with_downsampling(protocol)
            protocols[protocol.name] = protocol
    if not protocols:
        raise DerainError(f"no protocol given; choose from {known}")
    return tuple(protocols.values())


def _with_downsampling(protocol: Protocol) -> Protocol:
    return replace(
        protocol,
        name=protocol.name + DOWNSAMPLE_SUFFIX,
        definition=f"{protocol.definition}; SSIM at a shorter side of about 256 pixels (as in ssim.m)",
        downsample=True,
    )
