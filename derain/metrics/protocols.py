"""Evaluation protocols: what PSNR and SSIM are computed on, under the names that go beside the numbers.

Papers on deraining differ by over 1 dB through these choices alone: no number stands without its protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from derain.errors import DerainError


@dataclass(frozen=True)
class Protocol:
    """One way to judge a derained image against the clean one.

    PSNR is of peak 255. SSIM's window is an 11×11 Gaussian of σ 1.5, its constants are (0.01·255)² and
    (0.03·255)². Colours give the mean of the channels.

    Attributes:
        name: What goes beside the numbers.
        definition: The protocol in one line, for people.
        users: Whose published numbers follow it.
        colour: ``y``, BT.601 limited-range luma (65.481 R + 128.553 G + 24.966 B) / 255 + 16; or ``rgb``.
        luma_rounded: Whether luma is rounded to integers.
        output: How derained values become 8 bit: clipped, then ``round`` or ``truncate``; ``none`` leaves
            them as they are, clipped for PSNR only.
        border: Pixels cut off at every side before anything is computed.
        ssim: ``valid`` averages SSIM where the whole window lies inside the image (MATLAB's); ``padded``
            everywhere, with zeros around the image (the SSIM of PyTorch losses).
        downsample: Whether SSIM first shrinks images as Wang's ssim.m does: to every f-th pixel of the mean
            over f×f, symmetric at the border, f = max(1, round(min(h, w) / 256)).
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
            "PReNet; its ssim.m shrinks larger images as well: prenet+down",
            "y",
            output="truncate",
        ),
        Protocol(
            "restormer",
            f"BT.601 luma (16 to 235) rounded to integers, of 8-bit output (rounded); {_VALID}",
            "MPRNet, Restormer; DRSformer on Rain200",
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
            f"RGB of 8-bit output (rounded) without a 4-pixel border; {_VALID}, mean of channels",
            "IR-SDE, DA-CLIP",
            "rgb",
            border=4,
        ),
        Protocol(
            "ir-sde-y",
            f"as matlab-y, without a 4-pixel border; {_VALID}",
            "IR-SDE, DA-CLIP",
            "y",
            border=4,
        ),
        Protocol(
            "rgb",
            f"RGB of 8-bit output (rounded); {_VALID}, mean of channels",
            "papers that report RGB without a border cut off",
            "rgb",
        ),
    )
}
"""Every protocol by its name; the first is the default."""

PROTOCOL_GROUPS = {"ir-sde": ("ir-sde-rgb", "ir-sde-y")}
"""Names that stand for several protocols, reported side by side."""

DOWNSAMPLE_SUFFIX = "+down"
"""Ending of a protocol's name that asks for SSIM's automatic down-sampling."""


def resolve(names: Sequence[str]) -> tuple[Protocol, ...]:
    """Finds protocols by name, each once, in the order asked for.

    Args:
        names: Keys of :data:`PROTOCOLS` or :data:`TOGETHER`; with ``+down`` at the end SSIM shrinks images.

    Raises:
        DerainError: If a name is unknown, or there are none.

    Example:
        >>> [protocol.name for protocol in resolve(["prenet", "ir-sde"])]
        ['prenet', 'ir-sde-rgb', 'ir-sde-y']
        >>> resolve(["matlab-y+down"])[0].downsample
        True
    """
    found: dict[str, Protocol] = {}
    for name in names:
        base = name.removesuffix(DOWNSAMPLE_SUFFIX)
        for member in PROTOCOL_GROUPS.get(base, (base,)):
            if member not in PROTOCOLS:
                known = ", ".join([*PROTOCOLS, *PROTOCOL_GROUPS])
                raise DerainError(
                    f"no protocol '{name}'; choose from {known} (with {DOWNSAMPLE_SUFFIX} SSIM shrinks images first)"
                )
            protocol = PROTOCOLS[member]
            if name.endswith(DOWNSAMPLE_SUFFIX):
                told = f"{protocol.definition}; SSIM of images shrunk to about 256 pixels (as by ssim.m)"
                protocol = replace(protocol, name=member + DOWNSAMPLE_SUFFIX, definition=told, downsample=True)
            found[protocol.name] = protocol
    if not found:
        raise DerainError(f"no protocol named; choose from {', '.join([*PROTOCOLS, *PROTOCOL_GROUPS])}")
    return tuple(found.values())
