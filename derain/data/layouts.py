"""Layouts of the public data sets: folders, file patterns, number of pairs, sources.

A pattern is a regular expression for the path of a file relative to the data set's folder, without suffix, with ``/``
between folders; case is ignored. The named groups, except ``{version}``, are the key of the pair: files with equal keys
form a pair.

- ``{n}``: a number (``007`` equals ``7``);
- ``{name}``: any text, including folders;
- ``{version}``: number of the rainy version if a clean image has several.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "test", "predict"]
Side = Literal["left", "right"]

SPLIT_FOLDERS: Mapping[str, str] = {"train": "train|training", "test": "test|testing"}
"""Patterns of the folder that may precede any pattern of a split; tried before the pattern alone."""

AUXILIARY = r"(?:.*/)?(?:rainregion|rainstreak|raintrainregion|rain_?mask|streak)(?:[-_/].*)?"
"""Pattern of the rain masks and streaks that some archives contain; ignored unless ``Files.auxiliary`` is true."""


@dataclass(frozen=True)
class Files:
    """File patterns of one split.

    Attributes:
        rainy: Pattern of the rainy files.
        clean: Pattern of the clean files; None if they are side by side with the rainy ones or missing.
        clean_side: Clean half of side-by-side files; None if rainy and clean are separate files.
        numbers: First and last ``{n}`` of the split; None for all.
        truth: Whether the clean half is ground truth (some side-by-side files contain a real photo twice).
        auxiliary: Whether files named like rain masks and streaks belong to the split.
        note: Note for users about this version of the data set.
    """

    rainy: str
    clean: str | None = None
    clean_side: Side | None = None
    numbers: tuple[int, int] | None = None
    truth: bool = True
    auxiliary: bool = False
    note: str = ""

    def __str__(self) -> str:
        """Return the patterns in readable form, without optional parts.

        Example:
            >>> str(LAYOUTS["Rain100L"].files["test"][1])
            'rain/rain-{n} with norain/norain-{n}'
            >>> str(LAYOUTS["Rain800"].files["train"][0])
            'training/{n} (clean left, rainy right)'
        """
        if self.clean is not None:
            return f"{_plain(self.rainy)} with {_plain(self.clean)}"
        if self.clean_side is None:
            return _plain(self.rainy)
        order = "clean left, rainy right" if self.clean_side == "left" else "rainy left, clean right"
        return f"{_plain(self.rainy)} ({order})"


def _plain(pattern: str) -> str:
    """Return a pattern without optional groups and back references, and with only the first of alternatives."""
    plain = pattern.replace(r"\d+", "{n}").replace("(?P=video)", "{n}").replace("[-_]?", "-")
    previous = ""
    while plain != previous:  # groups are nested: each pass resolves the innermost ones
        previous = plain
        plain = re.sub(r"\(\?(?::|P<\w+>)[^()]*\)\?", "", plain)
        plain = re.sub(r"\(\?(?::|P<\w+>)([^()|]*)[^()]*\)(?!\?)", r"\1", plain)
    return re.sub(r"[\w]\?", "", plain)


@dataclass(frozen=True)
class Layout:
    """Layout of a data set, or a general layout of pairs.

    Attributes:
        title: Description in one line.
        source: Download page; empty for general layouts.
        citation: Paper.
        folders: Names of the data set's folder below the data root; empty for general layouts.
        files: Variants of the file patterns by split; the first one that matches is used.
        counts: Published number of pairs by split.
        excluded_test_set: Test set; training pairs with its backgrounds are excluded.
        partner: Data set with the test set of these training pairs, or with the training pairs of this test set.
    """

    title: str
    files: Mapping[Split, tuple[Files, ...]]
    source: str = ""
    citation: str = ""
    folders: tuple[str, ...] = ()
    counts: Mapping[Split, int] = field(default_factory=dict)
    excluded_test_set: str | None = None
    partner: str = ""


_IN = "(?:inputs?|rain|rainy|rainy_images?|lq)"
_OUT = "(?:targets?|norain|clean|gt|ground_?truth)"
_FOLDERS = Files(f"{_IN}/{{name}}", f"{_OUT}/{{name}}")
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

_YANG = "Yang et al., Deep Joint Rain Detection and Removal from a Single Image, CVPR 2017"
_YANG_OLD = "https://github.com/csdwren/PReNet"
_YANG_NEW = "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html"
_RESTORMER_PAGE = "https://github.com/swz30/Restormer/tree/main/Deraining"
_MPRNET = "Zamir et al., Multi-Stage Progressive Image Restoration, CVPR 2021"


def _rain200(kind: str, weight: str) -> Layout:
    def files(split: Split) -> tuple[Files, ...]:
        yang = f"(?:rain_data_{split}_{weight}/)?"
        return (
            Files(yang + "rain/(?:X2/)?(?:no)?rain-{n}(?:x2)?", yang + "norain/(?:norain|rain)-{n}"),
            _FOLDERS,
        )

    return Layout(
        title=f"Rain200{kind}, {weight.lower()} rain; the authors' second version of Rain100{kind}",
        folders=(f"Rain200{kind}",),
        files={"train": files("train"), "test": files("test")},
        counts={"train": 1800, "test": 200},
        source=_YANG_NEW,
        citation=_YANG,
    )


def _restormer_test(name: str, count: int, title: str) -> Layout:
    return Layout(
        title=title,
        folders=(name,),
        files={"test": (_RESTORMER, _FOLDERS)},
        counts={"test": count},
        source=_RESTORMER_PAGE,
        citation=_MPRNET,
        partner="Rain13K",
    )


_RAIN_TRAIN_H = Layout(
    title="training pairs of Rain100H, without the 546 whose background is in Rain100H",
    folders=("RainTrainH", "Rain100H/train"),
    files={"train": _RAIN_TRAIN},
    counts={"train": 1254},
    source=_YANG_OLD,
    citation=f"{_YANG}; strict set: Ren et al., Progressive Image Deraining Networks, CVPR 2019",
    excluded_test_set="Rain100H",
    partner="Rain100H",
)

LAYOUTS: dict[str, Layout] = {
    "Rain100L": Layout(
        title="100 test pairs, light streaks, first version",
        folders=("Rain100L",),
        files={"test": _RAIN100},
        counts={"test": 100},
        source=_YANG_OLD,
        citation=_YANG,
        partner="RainTrainL",
    ),
    "Rain100H": Layout(
        title="100 test pairs, heavy streaks in five directions, first version",
        folders=("Rain100H",),
        files={"test": _RAIN100},
        counts={"test": 100},
        source=_YANG_OLD,
        citation=_YANG,
        partner="RainTrainH",
    ),
    "RainTrainL": Layout(
        title="training pairs of Rain100L",
        folders=("RainTrainL", "Rain100L/train"),
        files={"train": _RAIN_TRAIN},
        counts={"train": 200},
        source=_YANG_OLD,
        citation=_YANG,
        partner="Rain100L",
    ),
    "RainTrainH": _RAIN_TRAIN_H,
    "RainTrainH-full": Layout(
        title="training pairs of Rain100H, all 1800; 546 share a background with Rain100H",
        folders=_RAIN_TRAIN_H.folders,
        files=_RAIN_TRAIN_H.files,
        counts={"train": 1800},
        source=_YANG_OLD,
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
                _FOLDERS,
            ),
            "test": (Files("(?:DID-MDN-test/)?{n}", clean_side="right"), _FOLDERS),
        },
        counts={"train": 12000, "test": 1200},
        source="https://github.com/hezhangsprinter/DID-MDN",
        citation="Zhang and Patel, Density-aware Single Image De-raining, CVPR 2018",
    ),
    "Rain1400": Layout(
        title="pairs of DDN, 14 rainy versions of each clean image",
        folders=("Rain1400", "rainy_image_dataset", "DDN-Data", "Rain12600"),
        files={
            "train": (
                Files("(?:.+/)?rainy_image/{n}_{version}", "(?:.+/)?ground_truth/{n}", numbers=(1, 900)),
                _FOLDERS,
            ),
            "test": (
                Files("(?:.+/)?rainy_image/{n}_{version}", "(?:.+/)?ground_truth/{n}", numbers=(901, 1000)),
                _FOLDERS,
            ),
        },
        counts={"train": 12600, "test": 1400},
        source="https://xueyangfu.github.io/projects/cvpr2017.html",
        citation="Fu et al., Removing Rain from Single Images via a Deep Detail Network, CVPR 2017",
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
        source=_YANG_OLD,
        citation="Li et al., Rain Streak Removal Using Layer Priors, CVPR 2016",
        partner="RainTrainL",
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
        counts={"train": 13712, "test": 4300},
        source=_RESTORMER_PAGE,
        citation=_MPRNET,
    ),
    "Test100": _restormer_test("Test100", 100, "test set of Rain13K: the test pairs of Rain800"),
    "Test1200": _restormer_test("Test1200", 1200, "test set of Rain13K: the test pairs of Rain1200"),
    "Test2800": _restormer_test("Test2800", 2800, "test set of Rain13K: 200 x 14 pairs of DDN (Rain1400: 100 x 14)"),
    "SPA-Data": Layout(
        title="pairs with real rain, clean images computed from videos",
        folders=("SPA-Data", "SPA", "SPAData", "spa-data"),
        files={
            "train": (
                Files(
                    r"real_world/(?P<video>\d+)/(?P=video)-\d+/(?P=video)-{version}_(?P<x>\d+)_(?P<y>\d+)",
                    r"real_world_gt/(?P<video>\d+)/(?P=video)_(?P<x>\d+)_(?P<y>\d+)",
                ),
                _FOLDERS,
            ),
            "test": (
                Files(
                    "(?:.+/)?(?:rain|input)/{n}",
                    "(?:.+/)?(?:gt|norain|target)/{n}(?:gt)?",
                ),
                _FOLDERS,
            ),
        },
        counts={"train": 638492, "test": 1000},
        source="https://stevewongv.github.io/derain-project.html",
        citation="Wang et al., Spatial Attentive Single-Image Deraining, CVPR 2019",
    ),
    "folder": Layout(
        title="pairs in two folders (input/target, rainy/clean, rain/norain, lq/gt), or rain-*/norain-*",
        files={
            split: (
                _FOLDERS,
                Files(f"{_IN}/{{name}}_rain{{version}}", f"{_OUT}/{{name}}"),
                Files(f"{_IN}/(?:X2/)?(?:no)?rain[-_]?{{name}}(?:x2)?", f"{_OUT}/norain[-_]?{{name}}"),
                Files(f"{_IN}/rain[-_]?{{name}}(?:x2)?", "norain[-_]?{name}"),
                Files("rain[-_]?{name}(?:x2)?", "norain[-_]?{name}"),
            )
            for split in ("train", "test")
        },
    ),
    "images": Layout(title="rainy photos without clean images", files={"predict": (Files("{name}", auxiliary=True),)}),
}
"""Every data set by name, and the general layouts ``folder`` and ``images``."""
