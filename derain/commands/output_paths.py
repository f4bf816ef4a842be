"""Output paths of ``derain restore``."""

import glob
import logging
from pathlib import Path

from derain import video
from derain.errors import DerainError
from derain.folders import check_outputs
from derain.listing import SUFFIXES, image_files, select_images

ACCEPTED = SUFFIXES | video.SUFFIXES
"""Suffixes of photos and videos."""

log = logging.getLogger("derain")


def is_video(path: Path) -> bool:
    """Return whether a path has the suffix of a video."""
    return path.suffix.lower() in video.SUFFIXES


def plan(source: str, out: Path) -> dict[Path, Path]:
    """Return the output path of each input.

    In an output folder, inputs keep their names, but videos in a container that cannot be written become ``.mp4``.
    Inputs from a folder also keep their subfolders; inputs that match a glob do not.

    Args:
        source: A file, a folder or a glob.
        out: A file or folder if ``source`` is a file, or else a folder. A path without suffix is a folder.

    Raises:
        DerainError: If there are no inputs, two inputs have the same output, an output is its own input, or ``out`` has
            an unsupported suffix or is not a folder where one is needed.
    """
    path = Path(source)
    if path.exists() and path.resolve() == out.resolve():
        raise DerainError(f"{out}: is the input itself; give another output")
    if path.is_file():
        targets = _plan_file(path, out)
    else:
        targets = _plan_folder(path, out) if path.is_dir() else _plan_glob(source, out)
        if not targets:
            raise DerainError(
                f"{source}: no photos or videos there; expected a file, a folder or a glob with "
                f"{', '.join(sorted(ACCEPTED))} files"
            )
        if out.is_file() or out.suffix.lower() in ACCEPTED:
            raise DerainError(f"{out}: is a file name, but {source} is a folder or glob; give a folder")
        check_outputs((target, file) for file, target in targets.items())
    for file, target in targets.items():
        if target.resolve() == file.resolve():
            raise DerainError(f"{target}: is the input itself; give another output")
    return targets


def _plan_file(path: Path, out: Path) -> dict[Path, Path]:
    is_folder = out.is_dir() or not out.suffix
    target = video.output_path(out / path.name) if is_folder else out
    if not is_video(path) and target.suffix.lower() not in SUFFIXES:
        raise DerainError(f"{target}: cannot write '{target.suffix}'; use .png, .jpg, .webp, .tif, .bmp or .avif")
    return {path: target}


def _plan_folder(path: Path, out: Path) -> dict[Path, Path]:
    files = image_files(path, recursive=True, suffixes=ACCEPTED)
    if _is_inside(out, path):  # outputs of an earlier run are not inputs
        files = [file for file in files if not _is_inside(file, out)]
    return {file: video.output_path(out / file.relative_to(path)) for file in files}


def _plan_glob(pattern: str, out: Path) -> dict[Path, Path]:
    matches = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    selected = select_images(matches, ACCEPTED)
    if selected.skipped:
        log.warning("%s: %s", pattern, selected.note())
    return {file: video.output_path(out / file.name) for file in selected.files}


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def comparison_path(target: Path) -> Path:
    """Return the path of the picture or video that shows before and after.

    Example:
        >>> comparison_path(Path("out/a.jpg")).as_posix(), comparison_path(Path("out/a.mp4")).as_posix()
        ('out/a.jpg-compare.png', 'out/a.mp4-compare.mp4')
    """
    return target.with_name(f"{target.name}-compare{target.suffix if is_video(target) else '.png'}")


def explanation_path(target: Path) -> Path:
    """Return the path of the explanation, to which ``.png`` and ``.json`` are appended.

    Example:
        >>> explanation_path(Path("out/a.jpg")).as_posix()
        'out/a.jpg-explain'
    """
    return target.with_name(f"{target.name}-explain")
