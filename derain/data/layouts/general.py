"""General layouts: pairs in two folders, videos in two folders, photos."""

from .patterns import CLEAN_FOLDER, FOLDERS, RAINY_FOLDER, Files, Layout, Split

_SPLITS: tuple[Split, ...] = ("train", "test")

GENERAL: dict[str, Layout] = {
    "folder": Layout(
        title="pairs in two folders (input/target, rainy/clean, rain/norain, lq/gt), "
        "or pairs named rain-NAME and norain-NAME",
        files={
            split: (
                FOLDERS,
                Files(f"{RAINY_FOLDER}/{{name}}_rain{{version}}", f"{CLEAN_FOLDER}/{{name}}"),
                # Rain200L's and Rain200H's downloads name the rainy files rain/X2/norain-*x2.
                Files(f"{RAINY_FOLDER}/(?:X2/)?(?:no)?rain[-_]?{{name}}(?:x2)?", f"{CLEAN_FOLDER}/norain[-_]?{{name}}"),
                Files(f"{RAINY_FOLDER}/rain[-_]?{{name}}(?:x2)?", "norain[-_]?{name}"),
                Files("rain[-_]?{name}(?:x2)?", "norain[-_]?{name}"),
            )
            for split in _SPLITS
        },
    ),
    "video": Layout(
        title="frames of videos: two folders, each with one subfolder per sequence (only as video:FOLDER; never "
        "detected automatically)",
        files={
            split: (
                Files(f"{RAINY_FOLDER}/{{sequence}}/{{frame}}", f"{CLEAN_FOLDER}/{{sequence}}/{{frame}}", video=True),
            )
            for split in _SPLITS
        },
    ),
    "images": Layout(title="rainy photos without clean images", files={"predict": (Files("{name}", auxiliary=True),)}),
}
"""Layouts that belong to no data set."""
