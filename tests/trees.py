"""File names of small data sets in every layout."""

from collections.abc import Callable, Iterable

Tree = list[tuple[str, str]]
"""Rainy and clean file of each pair. The clean file is ``left`` or ``right`` for files side by side, and empty without
clean images; ``#3`` after it is the index of its image if several pairs share it."""


def file_names(name: str, split: str, count: int) -> list[Tree]:
    """Return the files of a split of a data set, one tree per variant of the layout that tests know.

    Args:
        name: Name of the layout.
        split: Split.
        count: Number of clean images; of a video, number of frames of each of two sequences.
    """
    return [list(tree) for tree in TREES[name](split, count)]


def _numbered(rainy: str, clean: str, numbers: Iterable[int]) -> Tree:
    """Return a pair for each number, from names with ``{i}``."""
    return [(rainy.format(i=i), clean.format(i=i)) for i in numbers]


def _yang(split: str, count: int) -> list[Tree]:
    numbers = range(1, count + 1)
    return [
        _numbered("rainy/rain-{i:03d}.png", "norain-{i:03d}.png", numbers),
        _numbered("rain/norain-{i}.png", "norain/norain-{i}.png", numbers),
        _numbered("input/{i}.png", "target/{i}.png", numbers),
    ]


def _rain_train(split: str, count: int) -> list[Tree]:
    numbers = range(1, count + 1)
    return [
        _numbered("rain-{i}.png", "norain-{i}.png", numbers),
        _numbered("input/{i}.png", "target/{i}.png", numbers),
    ]


def _rain800(split: str, count: int) -> list[Tree]:
    folder = {"train": "training", "test": "test_syn", "predict": "test_nature"}[split]
    return [_numbered(folder + "/{i}.jpg", "left", range(1, count + 1))]


def _rain200(weight: str) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        numbers = range(1, count + 1)
        folder = f"rain_data_{split}_{weight}"
        return [
            _numbered(folder + "/rain/X2/norain-{i}x2.png", folder + "/norain/norain-{i}.png", numbers),
            _numbered(split + "/rain/{i}.png", split + "/norain/{i}.png", numbers),
            _numbered(split + "/input/{i}.png", split + "/target/{i}.png", numbers),
        ]

    return trees


def _rain1200(split: str, count: int) -> list[Tree]:
    if split == "test":
        return [_numbered("test/{i}.jpg", "right", range(count))]
    densities = ("Heavy", "Medium", "Light")
    return [[(f"Rain_{densities[i % 3]}/train2018new/{i // 3}.jpg", "right") for i in range(count)]]


def _rain1400(split: str, count: int) -> list[Tree]:
    first, folder = (1, "training/") if split == "train" else (901, "testing/")
    return [
        [
            (f"{base}rainy_image/{first + i}_{version}.jpg", f"{base}ground_truth/{first + i}.jpg#{i}")
            for i in range(count)
            for version in range(1, 4)
        ]
        for base in (folder, "")
    ]


def _rain13k(split: str, count: int) -> list[Tree]:
    sets = ["train"] if split == "train" else [f"test/{name}" for name in ("Test100", "Rain100L", "Test2800")]
    return [
        [
            (f"{folder}/input/{i}.png", f"{folder}/target/{i}.png#{index * 100 + i}")
            for index, folder in enumerate(sets)
            for i in range(1, count + 1)
        ]
    ]


def _spa_data(split: str, count: int) -> list[Tree]:
    if split == "test":
        return [_numbered("real_test_1000/rain/{i:03d}.png", "real_test_1000/gt/{i:03d}gt.png", range(count))]
    return [
        [
            (
                f"real_world/{i:03d}/{i:03d}-{frame}/{i:03d}-{frame}_0_0.png",
                f"real_world_gt/{i:03d}/{i:03d}_0_0.png#{i}",
            )
            for i in range(count)
            for frame in range(2)
        ]
    ]


def _two_folders(*folders: tuple[str, str]) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        numbers = range(1, count + 1)
        return [_numbered(f"{split}/{a}/{{i}}.png", f"{split}/{b}/{{i}}.png", numbers) for a, b in folders]

    return trees


def _gt_rain(split: str, count: int) -> list[Tree]:
    files = [
        (f"GT-RAIN_{split}/{scene}/{scene}-Webcam", i, index)
        for index, scene in enumerate(("Oinari_0-0", "M1135_0-0"))
        for i in range(count)
    ]
    return [[(f"{stem}-R-{i:03d}.png", f"{stem}-C-000.png#{index}") for stem, i, index in files]]


def _raindrop(folder: str, suffix: str = "png") -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        base = "train" if split == "train" else folder
        return [
            _numbered(f"{outer}{base}/data/{{i}}_rain.{suffix}", f"{outer}{base}/gt/{{i}}_clean.{suffix}", range(count))
            for outer in ("", f"{base}/")
        ]

    return trees


def _rainds_real(split: str, count: int) -> list[Tree]:
    kinds = ("raindrop", "rainstreak", "rainstreak_raindrop")
    return [
        [(f"{split}_set/{kind}/{i}.png", f"{split}_set/gt/{i}.png#{i}") for i in range(2, count + 2) for kind in kinds]
    ]


def _rainds_syn(split: str, count: int) -> list[Tree]:
    kinds = {"raindrop": "rd-", "rainstreak": "rain-", "rainstreak_raindrop": "rd-rain-"}
    return [
        [
            (f"{split}/{kind}/{source}{prefix}{i}.png", f"{split}/gt/{source}norain-{i}.png#{i + offset}")
            for offset, source in ((0, ""), (100, "pie-"))
            for i in range(1, count + 1)
            for kind, prefix in kinds.items()
        ]
    ]


def _rain_cityscapes(split: str, count: int) -> list[Tree]:
    folder, city = ("train", "aachen") if split == "train" else ("val", "lindau")
    return [
        [
            (
                f"leftImg8bit_rain/{folder}/{city}/{city}_{i:06d}_000019_leftImg8bit_rain_alpha_0.0{a}_beta_0.005_"
                f"dropsize_0.01_pattern_{a}.png",
                f"leftImg8bit/{folder}/{city}/{city}_{i:06d}_000019_leftImg8bit.png#{i}",
            )
            for i in range(count)
            for a in (1, 2)
        ]
    ]


def _outdoor_rain(first_train: int, first_test: int) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        first = first_train if split == "train" else first_test
        versions = [(i, f"im_{i:04d}_s{s}_a04") for i in range(first, first + count) for s in (80, 100)]
        return [
            [(f"{split}/in/{name}.png", f"{split}/gt/im_{i:04d}.png#{i}") for i, name in versions],
            [(f"{split}/input/{name}.png", f"{split}/gt/{name}.png#{i}") for i, name in versions],
        ]

    return trees


def _snow_100k(split: str, count: int) -> list[Tree]:
    if split == "train":
        names = [f"beautiful_smile_{i:05d}.jpg" for i in range(count)]
        return [[(f"Snow100K-training/all/synthetic/{name}", f"Snow100K-training/all/gt/{name}") for name in names]]
    return [
        [
            (f"test/Snow100K-{size}/synthetic/{i}.jpg", f"test/Snow100K-{size}/gt/{i}.jpg#{i + offset}")
            for offset, size in ((0, "S"), (100, "M"), (200, "L"))
            for i in range(count)
        ]
    ]


def _all_weather(snow: int) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        names = [f"im_{i:04d}_s80_a04.png" for i in range(1, count + 1)]
        names += [f"{i}_rain.png" for i in range(count)]
        names += [f"snow_{i:05d}.jpg" for i in range(count * snow)]
        return [[(f"input/{name}", f"gt/{name}") for name in names]]

    return trees


def _nturain(split: str, count: int) -> list[Tree]:
    folder = {
        "train": "Dataset_Training_Synthetic",
        "test": "Dataset_Testing_Synthetic",
        "predict": "Dataset_Testing_RealRain",
    }[split]
    frames = range(1, count + 1)
    if split == "predict":
        return [[(f"{folder}/{scene}_Rain/{i:05d}.jpg", "") for scene in ("ra1", "rb1") for i in frames]]
    scenes, rains = (("t1", "t2"), ("_01", "_02")) if split == "train" else (("a1", "b1"), ("",))
    return [
        [
            (f"{folder}/{scene}_Rain{rain}/{i:05d}.jpg", f"{folder}/{scene}_GT/{i:05d}.jpg#{100 * index + i}")
            for index, scene in enumerate(scenes)
            for rain in rains
            for i in frames
        ]
    ]


def _video(*folders: tuple[str, str]) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        return [
            [
                (f"{split}/{a}/{sequence}/{i:08d}.png", f"{split}/{b}/{sequence}/{i:08d}.png#{100 * index + i}")
                for index, sequence in enumerate(("street", "yard"))
                for i in range(count)
            ]
            for a, b in folders
        ]

    return trees


def _flat(*folders: tuple[str, str]) -> Callable[[str, int], list[Tree]]:
    def trees(split: str, count: int) -> list[Tree]:
        return [_numbered(a + "/{i}.png", b + "/{i}.png", range(1, count + 1)) for a, b in folders]

    return trees


def _photos(split: str, count: int) -> list[Tree]:
    return [_numbered("photos/{i}.png", "", range(1, count + 1))]


TREES: dict[str, Callable[[str, int], list[Tree]]] = {
    "Rain100L": _yang,
    "Rain100H": _yang,
    "RainTrainL": _rain_train,
    "RainTrainH": _rain_train,
    "RainTrainH-full": _rain_train,
    "Rain800": _rain800,
    "Rain200L": _rain200("Light"),
    "Rain200H": _rain200("Heavy"),
    "Rain1200": _rain1200,
    "Rain1400": _rain1400,
    "Rain12": _flat(("rainy", "groundtruth")),
    "Rain13K": _rain13k,
    "Test100": _flat(("input", "target")),
    "Test1200": _flat(("input", "target")),
    "Test2800": _flat(("input", "target")),
    "HQ-RAIN": _two_folders(("input", "target")),
    "4K-Rain13k": _two_folders(("input", "target"), ("input", "gt")),
    "SPA-Data": _spa_data,
    "RealRain-1k-L": _two_folders(("input", "target")),
    "RealRain-1k-H": _two_folders(("input", "target")),
    "GT-RAIN": _gt_rain,
    "LHP-Rain": _two_folders(("input", "gt"), ("input", "target")),
    "Rain-in-driving": _photos,
    "Raindrop": _raindrop("test_a"),
    "Raindrop-B": _raindrop("test_b", "jpg"),
    "RainDS-real": _rainds_real,
    "RainDS-syn": _rainds_syn,
    "UAV-Rain1k": _two_folders(("input", "gt"), ("input", "target")),
    "RainCityscapes": _rain_cityscapes,
    "Outdoor-Rain": _outdoor_rain(1, 601),
    "Outdoor-Rain-Test1": _outdoor_rain(1, 301),
    "Snow100K": _snow_100k,
    "AllWeather": _all_weather(snow=1),
    "AllWeather-rain": _all_weather(snow=0),
    "NTURain": _nturain,
    "VRDS": _video(("lq", "gt")),
    "folder": _flat(("input", "target"), ("rain", "norain"), ("rainy", "clean"), ("lq", "gt")),
    "video": _video(("input", "target"), ("rainy", "clean")),
    "images": _photos,
}
"""Trees by layout."""
