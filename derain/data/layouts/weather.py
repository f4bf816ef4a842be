"""Data sets with rain and fog, with snow, and with several kinds of weather."""

from .patterns import FOLDERS, Files, Layout, Split

_OUTDOOR_PAGE = "https://github.com/liruoteng/HeavyRainRemoval"
_LI = (
    "Li et al., Heavy Rain Image Restoration: Integrating Physics Model and Conditional Adversarial Learning, CVPR 2019"
)
_TRANSWEATHER_PAGE = "https://github.com/jeya-maria-jose/TransWeather"
_VALANARASU = (
    "Valanarasu et al., TransWeather: Transformer-based Restoration of Images Degraded by Adverse Weather Conditions, "
    "CVPR 2022"
)
_NOT_IN_TEST1 = r"(?!0(?:30[1-9]|3[1-4]\d|350)(?!\d))"  # excludes the numbers 0301 to 0350


def _rain_cityscapes(folder: str) -> tuple[Files, ...]:
    path = f"{folder}/(?P<city>[^/]+)/(?P<image>[^/]+)_leftImg8bit"
    return (Files(f"(?:.*/)?leftImg8bit_rain/{path}_rain_(?P<version>alpha_[^/]+)", f"(?:.*/)?leftImg8bit/{path}"),)


def _outdoor_rain(first: int, last: int, lookahead: str = "") -> tuple[Files, ...]:
    """Return the patterns of the images with numbers from ``first`` to ``last`` that the lookahead allows."""
    rainy = rf"(?:.+/)?(?:in|input|data)/im_{lookahead}{{n}}_"
    clean = f"(?:.+/)?gt/im_{lookahead}{{n}}"
    return (
        Files(rainy + r"(?P<version>s\d+_a\d+)", clean, numbers=(first, last)),
        Files(rainy + r"(?P<rain>s\d+_a\d+)", clean + r"_(?P<rain>s\d+_a\d+)", numbers=(first, last)),
    )


def _snow_100k(split: Split) -> tuple[Files, ...]:
    folders = {
        "train": "(?:(?:Snow100K-)?training/)?(?:all/)?",
        "test": "(?:.+/)?Snow100K-(?P<size>[SML])/",
    }
    return (Files(f"{folders[split]}synthetic/{{name}}", f"{folders[split]}gt/{{name}}"),)


WEATHER: dict[str, Layout] = {
    "RainCityscapes": Layout(
        title="synthetic rain and fog, computed from the depth of Cityscapes photos; several versions of each photo",
        folders=("RainCityscapes",),
        files={"train": _rain_cityscapes("train"), "test": _rain_cityscapes("(?:val|test)")},
        counts={"train": 9432, "test": 1188},
        source="https://www.cityscapes-dataset.com/downloads/",
        citation="Hu et al., Depth-Attentional Features for Single-Image Rain Removal, CVPR 2019",
        remarks=(
            "the download has no clean images: they are Cityscapes' leftImg8bit; put both folders into RainCityscapes",
            "2048x1024 pixels; the authors' network downscales photos to 1024x512 and upscales its results",
        ),
    ),
    "Outdoor-Rain": Layout(
        title="heavy rain and fog, 15 versions of each clean image",
        folders=("Outdoor-Rain", "OutdoorRain"),
        files={"train": _outdoor_rain(1, 600), "test": _outdoor_rain(601, 9999)},
        counts={"train": 9000, "test": 1500},
        source=_OUTDOOR_PAGE,
        citation=_LI,
        remarks=("most papers score Test1, a part of the training pairs: see Outdoor-Rain-Test1",),
    ),
    "Outdoor-Rain-Test1": Layout(
        title="Outdoor-Rain with the split of all-in-one weather papers: im_0301 to im_0350 are the test images",
        folders=("Outdoor-Rain", "OutdoorRain"),
        files={"train": _outdoor_rain(1, 600, _NOT_IN_TEST1), "test": _outdoor_rain(301, 350)},
        counts={"train": 8250, "test": 750},
        source=_OUTDOOR_PAGE,
        citation=f"{_LI}; split: Özdenizci and Legenstein (WeatherDiffusion), TPAMI 2023",
        protocols="matlab-y, images resized to multiples of 16 (WeatherDiffusion)",
        remarks=(
            "Test1 is a part of Outdoor-Rain's 9,000 training pairs: weights trained on all of them have seen it",
        ),
    ),
    "Snow100K": Layout(
        title="synthetic snow, no rain; test sets S, M and L",
        folders=("Snow100K",),
        files={"train": _snow_100k("train"), "test": _snow_100k("test")},
        counts={"train": 50000, "test": 50000},
        source="https://sites.google.com/view/yunfuliu/desnownet",
        citation="Liu et al., DesnowNet: Context-Aware Deep Network for Snow Removal, TIP 2018",
        protocols="matlab-y, images resized to multiples of 16 (WeatherDiffusion)",
    ),
    "AllWeather": Layout(
        title="training pairs: all 8,250 of Outdoor-Rain-Test1, 818 of Raindrop's 861, 9,001 of Snow100K's 50,000",
        folders=("AllWeather", "All-Weather"),
        files={"train": (FOLDERS,)},
        counts={"train": 18069},
        source=_TRANSWEATHER_PAGE,
        citation=_VALANARASU,
        partner="Outdoor-Rain-Test1",
    ),
    "AllWeather-rain": Layout(
        title="AllWeather without its snow",
        folders=("AllWeather", "All-Weather"),
        files={
            "train": (Files(r"input/(?P<image>im_\d+_s\d+_a\d+|\d+_rain)", r"gt/(?P<image>im_\d+_s\d+_a\d+|\d+_rain)"),)
        },
        counts={"train": 9068},
        source=_TRANSWEATHER_PAGE,
        citation=_VALANARASU,
        partner="Outdoor-Rain-Test1",
    ),
}
"""Data sets with rain and fog, with snow, and with several kinds of weather."""
