"""Data sets with synthetic rain streaks."""

from .patterns import FOLDERS, Files, Layout, Split

_RESTORMER = Files("input/{name}", "target/{name}", note="the files that Restormer and MPRNet distribute")
_RAIN100_RESTORMER = Files(
    "input/{name}",
    "target/{name}",
    note="the version cropped to 480x320 that Restormer and MPRNet distribute, not the original 481x321",
)
_YANG_FLAT = Files("rain-{n}(?:x2)?", "norain-{n}")
_YANG_RAINY = Files("rainy/rain-{n}(?:x2)?", "norain-{n}")
_YANG_FOLDERS = Files("(?:small/)?rain/(?:X2/)?(?:no)?rain-{n}(?:x2)?", "(?:small/)?norain/(?:norain|rain)-{n}")
_LQ_GT = Files("LQ/{name}", "GT/{name}")
_RAIN100 = (_YANG_RAINY, _YANG_FOLDERS, _YANG_FLAT, _RAIN100_RESTORMER, _LQ_GT)
_RAIN_TRAIN = (_YANG_FLAT, _YANG_FOLDERS, _YANG_RAINY, _RESTORMER, _LQ_GT)

_YANG_PROTOCOLS = "prenet (PReNet); matlab-y (RCDNet); restormer (MPRNet, Restormer)"
_RAIN100_BACKGROUNDS = "the 100 images show 91 distinct backgrounds, the same in Rain100L and Rain100H"
_RAIN100_LEAK = "10 of the backgrounds are in Rain800's training pairs"
_YANG = "Yang et al., Deep Joint Rain Detection and Removal from a Single Image, CVPR 2017"
_YANG_OLD_PAGE = "https://github.com/csdwren/PReNet"
_YANG_NEW_PAGE = "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html"
_RESTORMER_PAGE = "https://github.com/swz30/Restormer/tree/main/Deraining"
_MPRNET = "Zamir et al., Multi-Stage Progressive Image Restoration, CVPR 2021"


def _rain200(kind: str, density: str) -> Layout:
    def files(split: Split) -> tuple[Files, ...]:
        yang = f"(?:rain_data_{split}_{density}/)?"
        return (
            Files(yang + "rain/(?:X2/)?(?:no)?rain-{n}(?:x2)?", yang + "norain/(?:norain|rain)-{n}"),
            FOLDERS,
        )

    return Layout(
        title=f"{density.lower()} streaks; the authors' second version of Rain100{kind}",
        folders=(f"Rain200{kind}",),
        files={"train": files("train"), "test": files("test")},
        counts={"train": 1800, "test": 200},
        source=_YANG_NEW_PAGE,
        citation=_YANG,
        protocols="restormer (DRSformer)",
    )


def _restormer_test(name: str, count: int, title: str) -> Layout:
    return Layout(
        title=title,
        folders=(name,),
        files={"test": (_RESTORMER, FOLDERS)},
        counts={"test": count},
        source=_RESTORMER_PAGE,
        citation=_MPRNET,
        partner="Rain13K",
        protocols="restormer (MPRNet, Restormer)",
    )


_RAIN_TRAIN_H = Layout(
    title="training pairs of Rain100H, without the 546 whose background is in Rain100H",
    folders=("RainTrainH", "Rain100H/train"),
    files={"train": _RAIN_TRAIN},
    counts={"train": 1254},
    source=_YANG_OLD_PAGE,
    citation=f"{_YANG}; strict set: Ren et al., Progressive Image Deraining Networks, CVPR 2019",
    excluded_test_set="Rain100H",
    partner="Rain100H",
)

STREAKS: dict[str, Layout] = {
    "Rain100L": Layout(
        title="100 test pairs, light streaks, first version (see Rain200L)",
        folders=("Rain100L",),
        files={"test": _RAIN100},
        counts={"test": 100},
        source=_YANG_OLD_PAGE,
        citation=_YANG,
        partner="RainTrainL",
        protocols=_YANG_PROTOCOLS,
        remarks=(_RAIN100_BACKGROUNDS, _RAIN100_LEAK),
    ),
    "Rain100H": Layout(
        title="100 test pairs, heavy streaks in five directions, first version (see Rain200H)",
        folders=("Rain100H",),
        files={"test": _RAIN100},
        counts={"test": 100},
        source=_YANG_OLD_PAGE,
        citation=_YANG,
        partner="RainTrainH",
        protocols=_YANG_PROTOCOLS,
        remarks=(
            _RAIN100_BACKGROUNDS,
            _RAIN100_LEAK,
            "546 of RainTrainH-full's 1,800 pairs have one of the backgrounds",
        ),
    ),
    "RainTrainL": Layout(
        title="training pairs of Rain100L",
        folders=("RainTrainL", "Rain100L/train"),
        files={"train": _RAIN_TRAIN},
        counts={"train": 200},
        source=_YANG_OLD_PAGE,
        citation=_YANG,
        partner="Rain100L",
    ),
    "RainTrainH": _RAIN_TRAIN_H,
    "RainTrainH-full": Layout(
        title="training pairs of Rain100H, all 1,800; 546 share a background with Rain100H",
        folders=_RAIN_TRAIN_H.folders,
        files=_RAIN_TRAIN_H.files,
        counts={"train": 1800},
        source=_YANG_OLD_PAGE,
        citation=_YANG,
        partner="Rain100H",
    ),
    "Rain800": Layout(
        title="synthetic pairs of ID-CGAN, and its real photos for prediction",
        folders=("Rain800",),
        files={
            "train": (Files("(?:training|train)/{n}", clean_side="left"), Files("{n}", clean_side="left")),
            "test": (Files("(?:test_syn|test)/{n}", clean_side="left"), Files("{n}", clean_side="left")),
            "predict": (
                Files("test_nature/{n}", clean_side="left", truth=False),
                Files("{n}", clean_side="left", truth=False),
            ),
        },
        counts={"train": 700, "test": 100, "predict": 52},
        source="https://github.com/hezhangsprinter/ID-CGAN",
        citation="Zhang et al., Image De-raining Using a Conditional GAN, TCSVT 2019",
        protocols="plnlin (PLNLIN-MCDDL); restormer (MPRNet, Restormer, as Test100)",
        remarks=("10 backgrounds of Rain100L and Rain100H are in the training pairs",),
    ),
    "Rain200L": _rain200("L", "Light"),
    "Rain200H": _rain200("H", "Heavy"),
    "Rain1200": Layout(
        title="pairs of DID-MDN, three densities of rain",
        folders=("Rain1200", "DID-MDN", "DID-Data", "DID-MDN-datasets"),
        files={
            "train": (
                Files(
                    "(?:DID-MDN-training/)?Rain_(?P<density>Heavy|Medium|Light)/(?:train2018new/)?{n}",
                    clean_side="right",
                ),
                FOLDERS,
            ),
            "test": (Files("(?:DID-MDN-test/)?{n}", clean_side="right"), FOLDERS),
        },
        counts={"train": 12000, "test": 1200},
        source="https://github.com/hezhangsprinter/DID-MDN",
        citation="Zhang and Patel, Density-aware Single Image De-raining, CVPR 2018",
        protocols="matlab-y (DRSformer); restormer (MPRNet, Restormer, as Test1200)",
    ),
    "Rain1400": Layout(
        title="pairs of DDN, 14 rainy versions of each clean image",
        folders=("Rain1400", "rainy_image_dataset", "DDN-Data", "Rain12600"),
        files={
            "train": (
                Files("(?:.+/)?rainy_image/{n}_{version}", "(?:.+/)?ground_truth/{n}", numbers=(1, 900)),
                FOLDERS,
            ),
            "test": (
                Files("(?:.+/)?rainy_image/{n}_{version}", "(?:.+/)?ground_truth/{n}", numbers=(901, 1000)),
                FOLDERS,
            ),
        },
        counts={"train": 12600, "test": 1400},
        source="https://xueyangfu.github.io/projects/cvpr2017.html",
        citation="Fu et al., Removing Rain from Single Images via a Deep Detail Network, CVPR 2017",
        protocols="matlab-y (DRSformer)",
        remarks=("Test2800, which MPRNet and Restormer score, is another split of the same images",),
    ),
    "Rain12": Layout(
        title="12 test pairs",
        folders=("Rain12",),
        files={
            "test": (
                Files("(?:rainy|input|rain)/{n}(?:_in)?", "(?:ground_?truth|target|gt|norain)/{n}(?:_gt)?"),
                *_RAIN100,
            )
        },
        counts={"test": 12},
        source=_YANG_OLD_PAGE,
        citation="Li et al., Rain Streak Removal Using Layer Priors, CVPR 2016",
        partner="RainTrainL",
        protocols="prenet (PReNet)",
        remarks=("the 12 pairs are among Rain13K's training pairs",),
    ),
    "Rain13K": Layout(
        title="training pairs from several sets, with five test sets",
        folders=("Rain13K", "train/Rain13K"),
        files={
            "train": (Files("(?:Rain13K/)?input/{name}", "(?:Rain13K/)?target/{name}"),),
            "test": (
                Files(
                    "(?P<set>Test100|Rain100H|Rain100L|Test1200|Test2800)/input/{name}",
                    "(?P<set>Test100|Rain100H|Rain100L|Test1200|Test2800)/target/{name}",
                ),
            ),
        },
        counts={"train": 13711, "test": 4300},
        source=_RESTORMER_PAGE,
        citation=_MPRNET,
        protocols="restormer (MPRNet, Restormer)",
        remarks=(
            "the paper has 13,712 training pairs; the download lacks one, which the authors removed because an image "
            "had a wrong size",
            "the training pairs contain all 1,800 of RainTrainH-full, 546 of which have a background of Rain100H",
        ),
    ),
    "Test100": _restormer_test("Test100", 100, "test set of Rain13K: the test pairs of Rain800"),
    "Test1200": _restormer_test("Test1200", 1200, "test set of Rain13K: the test pairs of Rain1200"),
    "Test2800": _restormer_test(
        "Test2800",
        2800,
        "test set of Rain13K: 200 clean images of DDN with 14 rainy versions each; Rain1400's own test set has 100 "
        "clean images",
    ),
    "HQ-RAIN": Layout(
        title="synthetic streaks on photos of high resolution",
        folders=("HQ-RAIN",),
        files={"train": (FOLDERS,), "test": (FOLDERS,)},
        counts={"train": 4500, "test": 500},
        source="https://arxiv.org/abs/2310.03535",
        citation="Chen et al., Towards Unified Deep Image Deraining: A Survey and A New Benchmark, TPAMI 2025",
        remarks=("the names of the folders in the download could not be confirmed",),
    ),
    "4K-Rain13k": Layout(
        title="synthetic streaks on photos of 3840x2160 pixels",
        folders=("4K-Rain13k",),
        files={"train": (FOLDERS,), "test": (FOLDERS,)},
        counts={"train": 12500, "test": 500},
        source="https://github.com/cschenxiang/UDR-Mixer",
        citation="Chen et al., Towards Ultra-High-Definition Image Deraining: A Benchmark and An Efficient Method, "
        "arXiv 2024",
        protocols="ir-sde-y (UDR-Mixer)",
        remarks=("UDR-Mixer crops photos to multiples of 16 before it restores them",),
    ),
}
"""Data sets with synthetic rain streaks."""
