"""Data sets with drops on a lens or a pane."""

from .patterns import FOLDERS, Files, Layout, Split

_RAINDROP_PAGE = "https://github.com/rui1996/DeRaindrop"
_QIAN = "Qian et al., Attentive Generative Adversarial Network for Raindrop Removal from a Single Image, CVPR 2018"
_RAINDROP_PROTOCOLS = (
    "8-bit luma of OpenCV (0 to 255), SSIM of scikit-image (Qian et al.); matlab-y, images resized to multiples of 16 "
    "(WeatherDiffusion)"
)
_RAINDS_PAGE = "https://github.com/Songforrr/RainDS_CCN"
_QUAN = "Quan et al., Removing Raindrops and Rain Streaks in One Go, CVPR 2021"
_RAINDS_KINDS = "(?P<version>raindrop|rainstreak|rainstreak_raindrop)"


def _raindrop(folder: str) -> tuple[Files, ...]:
    prefix = f"(?:(?:.+/)?{folder}/)?"
    return (Files(prefix + "data/(?P<image>[^/]+)_rain", prefix + "gt/(?P<image>[^/]+)_clean"),)


def _rainds_real(split: Split) -> tuple[Files, ...]:
    folder = f"(?:{split}(?:_set)?/)?"
    # auxiliary: the folder rainstreak has rainy photos, not streaks alone.
    return (Files(f"{folder}{_RAINDS_KINDS}/{{name}}", f"{folder}gt/{{name}}", auxiliary=True),)


def _rainds_syn(split: Split) -> tuple[Files, ...]:
    folder = f"(?:{split}(?:_set)?/)?"
    source = "(?P<source>(?:pie-)?)"  # two collections of backgrounds, whose numbers overlap
    rainy = f"{folder}{_RAINDS_KINDS}/{source}(?:rd-)?(?:rain-)?{{n}}"
    return (Files(rainy, f"{folder}gt/{source}norain-{{n}}", auxiliary=True),)


DROPS: dict[str, Layout] = {
    "Raindrop": Layout(
        title="real drops on a pane; its test set is test set A",
        folders=("Raindrop", "DeRaindrop"),
        files={"train": _raindrop("train"), "test": _raindrop("test_a")},
        counts={"train": 861, "test": 58},
        source=_RAINDROP_PAGE,
        citation=_QIAN,
        protocols=_RAINDROP_PROTOCOLS,
    ),
    "Raindrop-B": Layout(
        title="test set B of Raindrop",
        folders=("Raindrop", "DeRaindrop"),
        files={"test": _raindrop("test_b")},
        source=_RAINDROP_PAGE,
        citation=_QIAN,
        partner="Raindrop",
        protocols=_RAINDROP_PROTOCOLS,
        remarks=("reports of the number of pairs differ: 248 or 249",),
    ),
    "RainDS-real": Layout(
        title="four real photos of each scene: with drops, with streaks, with both, and clean",
        folders=("RainDS-real", "RainDS_real"),
        files={"train": _rainds_real("train"), "test": _rainds_real("test")},
        counts={"train": 450, "test": 293},
        source=_RAINDS_PAGE,
        citation=_QUAN,
        remarks=(
            "the download has 150 scenes for training and 98 for tests",
            "test_set/rainstreak/IMG_7435.png has no clean image: 293 test pairs instead of 294",
            "1296x728 pixels; scores of downscaled images are not comparable",
        ),
    ),
    "RainDS-syn": Layout(
        title="three synthetic versions of each clean image: with drops, with streaks, with both",
        folders=("RainDS-syn", "RainDS_syn"),
        files={"train": _rainds_syn("train"), "test": _rainds_syn("test")},
        source=_RAINDS_PAGE,
        citation=_QUAN,
        remarks=("files with and without pie- in their names may have the same number, but show different scenes",),
    ),
    "UAV-Rain1k": Layout(
        title="rendered drops on photos taken by drones",
        folders=("UAV-Rain1k",),
        files={"train": (FOLDERS,), "test": (FOLDERS,)},
        counts={"train": 800, "test": 220},
        source="https://github.com/cschenxiang/UAV-Rain1k",
        citation="Chang et al., UAV-Rain1k: A Benchmark for Raindrop Removal from UAV Aerial Imagery, CVPRW 2024",
        protocols="ir-sde-y (Chang et al.)",
        remarks=("photos of many sizes, about 1500x1000 pixels",),
    ),
}
"""Data sets with drops on a lens or a pane."""
