"""Data sets with real rain."""

from .patterns import FOLDERS, Files, Layout, Split


def _real_rain_1k(kind: str, density: str) -> Layout:
    return Layout(
        title=f"pairs with real rain, {density} streaks, clean images computed from videos",
        folders=(f"RealRain-1k-{kind}",),
        files={"train": (FOLDERS,), "test": (FOLDERS,)},
        counts={"train": 784, "test": 224},
        source="https://github.com/hiker-lw/RealRain-1k",
        citation="Li et al., Toward Real-world Single Image Deraining: A New Benchmark and Beyond, arXiv 2022",
        remarks=(
            "1,120 pairs in three parts; derain has no name for the third part (validation): give its folder "
            "(--data.val FOLDER)",
            "about 1512x973 pixels; scores of downscaled or cropped images are not comparable",
        ),
    )


def _gt_rain(split: Split) -> tuple[Files, ...]:
    folder = f"(?:GT-RAIN_{split}/)?{{sequence}}/(?:[^/]+-)?"
    return (Files(folder + "R-{version}", folder + r"C-\d+", video=True),)


REAL: dict[str, Layout] = {
    "SPA-Data": Layout(
        title="pairs with real rain, clean images computed from videos",
        folders=("SPA-Data", "SPA", "SPAData", "spa-data"),
        files={
            "train": (
                Files(
                    r"real_world/(?P<video>\d+)/(?P=video)-\d+/(?P=video)-{version}_(?P<x>\d+)_(?P<y>\d+)",
                    r"real_world_gt/(?P<video>\d+)/(?P=video)_(?P<x>\d+)_(?P<y>\d+)",
                ),
                FOLDERS,
            ),
            "test": (
                Files(
                    "(?:.+/)?(?:rain|input)/{n}",
                    "(?:.+/)?(?:gt|norain|target)/{n}(?:gt)?",
                ),
                FOLDERS,
            ),
        },
        counts={"train": 638492, "test": 1000},
        source="https://stevewongv.github.io/derain-project.html",
        citation="Wang et al., Spatial Attentive Single-Image Deraining, CVPR 2019",
        protocols="restormer (DRSformer)",
    ),
    "RealRain-1k-L": _real_rain_1k("L", "sparse"),
    "RealRain-1k-H": _real_rain_1k("H", "dense"),
    "GT-RAIN": Layout(
        title="rainy frames of webcams, up to 300 for one clean frame",
        folders=("GT-RAIN",),
        files={"train": _gt_rain("train"), "test": _gt_rain("test")},
        counts={"train": 26124, "test": 2100},
        source="https://github.com/UCLA-VMG/GT-RAIN",
        citation="Ba et al., Not Just Streaks: Towards Ground Truth for Single Image Deraining, ECCV 2022",
        protocols="RGB of floating-point output, sides cropped to multiples of 4, SSIM of scikit-image, mean over "
        "sequences, which are the scenes (Ba et al.); derain's closest protocol is rgb, with the mean over sequences",
        remarks=(
            "derain has no name for GT-RAIN_val (3,300 pairs): give its folder (--data.val FOLDER), after removing "
            "the scene Gurutto_1-2, which has several clean frames where derain expects one",
        ),
    ),
    "LHP-Rain": Layout(
        title="frames of 3,000 videos with real rain and splashes, clean images computed from the videos",
        folders=("LHP-Rain",),
        files={"train": (FOLDERS,), "test": (FOLDERS,)},
        source="https://github.com/yunguo224/LHP-Rain",
        citation="Guo et al., From Sky to the Ground: A Large-scale Benchmark and Simple Baseline Towards Real Rain "
        "Removal, ICCV 2023",
        remarks=(
            "the authors publish a full version, about 1 million pairs, and a simple one",
            "derain expects the folders input and gt, as the authors' code does; other names could not be confirmed",
        ),
    ),
    "Rain-in-driving": Layout(
        title="real photos from cars without clean images, for object detection (RID of the MPID benchmark)",
        folders=("Rain-in-driving", "RID"),
        files={"predict": (Files("{name}", auxiliary=True),)},
        source="https://github.com/panda-lab/Single-Image-Deraining",
        citation="Li et al., Single Image Deraining: A Comprehensive Benchmark Analysis, CVPR 2019",
        protocols="no-reference metrics and object detection (Li et al.)",
        remarks=("the labels of some images, mainly those of 3024x4032 pixels, fit only after the image is rotated",),
    ),
}
"""Data sets with real rain."""
