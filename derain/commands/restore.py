"""Remove rain from a photo, a video, a folder of them (recursively) or a glob."""

import argparse
import glob
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from derain import videos
from derain.errors import DerainError
from derain.folders import check_outputs
from derain.image_metadata import has_location
from derain.images import SUFFIXES, Photo, image_files, read_photo, select_images, to_bytes, write_image
from derain.memory import keep_freed_memory, release_freed_memory
from derain.pictures import compare, write_explanation
from derain.progress import track

if TYPE_CHECKING:
    from derain.restoration import Restorer

KINDS = SUFFIXES | videos.SUFFIXES
"""Endings of names that are restored."""

log = logging.getLogger("derain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("input", help="a photo, a video, a folder (searched recursively), or a quoted glob")
    parser.add_argument("output", type=Path, help="the restored photo or video, or a folder for several")
    parser.add_argument(
        "--weights",
        default="default",
        help="a name of `derain models list`, hub:OWNER/NAME, or a file: ours, the authors', ONNX of derain "
        "export, or what spandrel knows; FILE:stages=N,variant=NAME for what PReNet's authors do not record "
        "(default: %(default)s)",
    )
    parser.add_argument("--tile", default="auto", help="side of tiles in pixels, auto (default) or none")
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="mean over 8 flips and rotations, 8 times slower; for methods that were trained on transposed crops",
    )
    parser.add_argument(
        "--compare", action="store_true", help="also write NAME.EXT-compare.png, or .mp4: before and after"
    )
    parser.add_argument("--crf", type=int, default=18, help="of videos: quality from 0 to 51, the best first (18)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also write a photo's NAME.EXT-explain.png and .json: masks, route, scores",
    )
    parser.add_argument(
        "--strip-metadata",
        action="store_true",
        help="write no metadata: neither time, camera and location (EXIF) nor a video's tags; the profile stays",
    )
    parser.add_argument(
        "--white", type=float, default=1.0, help="of floating-point TIFF: value of white, such as 255 (default: 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument("--route", type=int, help="let all images take this route instead of asking CLIP (CLIP-RPN)")
    parser.add_argument(
        "--solver",
        help="of DA-CLIP + IR-SDE: posterior (default), mrs-ode1, mrs-ode2, mrs-sde2, mars-ode2, mars-sde2, sde or ode",
    )
    parser.add_argument("--steps", type=int, help="of the solver, at most those of its schedule (default 10)")
    parser.add_argument("--seed", type=int, help="of the solver's noise (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the network: for many photos of one size")


def run(args: argparse.Namespace) -> int:
    """Restores, and reports broken files at the end; exit code 2 if there were any."""
    jobs = plan(args.input, args.output)
    check_outputs((file, source) for source, target in jobs.items() for file in outputs(target, args))
    films = [source for source in jobs if is_video(source)]
    if films and args.explain:
        raise DerainError(f"--explain: explains photos, and {films[0]} is a video; leave it out, or give one frame")
    videos.check_crf(args.crf)
    if not 0 < args.white < math.inf:
        raise DerainError(f"--white {args.white:g}: must be above 0; give the value that white has in the file")
    waiting = {source: target for source, target in jobs.items() if args.overwrite or not target.exists()}
    kept = len(jobs) - len(waiting)
    if kept and len(jobs) == 1:
        raise DerainError(f"{args.output}: exists already; add --overwrite to replace it")
    broken: list[str] = []
    for source in [source for source in films if source in waiting]:
        try:
            videos.check(source, jobs[source])
        except DerainError as error:
            broken.append(str(error))
            waiting.pop(source)
    if broken and not waiting:
        raise _told(broken)
    from derain.methods.interfaces import Sampling
    from derain.restoration import Restorer

    keep_freed_memory()
    chosen = {key: getattr(args, key) for key in ("solver", "steps", "seed") if getattr(args, key) is not None}
    restorer = Restorer(
        args.weights,
        device=args.device,
        precision=args.precision,
        tile=tile_size(args.tile),
        ensemble=args.ensemble,
        route=args.route,
        sampling=Sampling(**chosen) if chosen else None,
        compile=args.compile,
    )
    print(f"{args.weights}: {restorer.note}, on {restorer.device}", file=sys.stderr)
    done, refused = 0, len(broken)
    located: list[Path] = []
    try:
        for source, target in track(waiting.items(), "Restoring", len(waiting)):
            try:
                if (restore_video if is_video(source) else restore_photo)(restorer, source, target, args):
                    located.append(target)
                done += 1
            except (DerainError, OSError) as error:
                broken.append(str(error))
            release_freed_memory()
    except KeyboardInterrupt:
        remaining = list(waiting.values())[done + len(broken) - refused :]
        counts = (
            f"restored {done} of {len(jobs)}, kept {kept} that exist, {len(broken)} failed, {len(remaining)} remain"
        )
        print(f"{counts}: {args.output}; {_next_step(remaining, args.overwrite)}", file=sys.stderr)
        raise
    told = f"restored {done} of {len(jobs)} {'photos' if not films else 'photos and videos'}" + (
        f", kept {kept} that exist (--overwrite)" if kept else ""
    )
    print(f"{told}: {args.output}", file=sys.stderr)
    if located:
        more = f" and {len(located) - 1} more" if len(located) > 1 else ""
        print(f"{located[0]}{more}: the metadata has the location (GPS); --strip-metadata removes it", file=sys.stderr)
    if broken:
        raise _told(broken)
    return 0


def _next_step(remaining: Sequence[Path], overwrite: bool) -> str:
    """Return how to restore the rest after an interrupt."""
    if not overwrite:
        return "run the same command for the rest"
    old = sum(target.exists() for target in remaining)
    if old:
        return f"run the same command to restore all again: {old} of the remaining exist from before"
    return "run the same command without --overwrite for the rest"


def _told(broken: Sequence[str]) -> DerainError:
    return DerainError(broken[0] if len(broken) == 1 else "\n  ".join([f"{len(broken)} files:", *broken]))


def restore_photo(restorer: "Restorer", source: Path, target: Path, args: argparse.Namespace) -> bool:
    """Restore a photo.

    The explanation and the comparison are written before the photo, so that a photo that exists has them beside it.

    Returns:
        Whether the metadata that is written has the location.
    """
    photo = read_photo(source, args.white)
    if args.strip_metadata:
        photo = photo.without_metadata()
    explained = restorer.explain(photo.rgb, str(source)) if args.explain else None
    derained = restorer(photo.rgb, name=str(source)) if explained is None else explained.derained
    if explained is not None:
        images = {"rainy": to_bytes(photo.rgb), "derained": to_bytes(derained)}
        maps = {name: to_bytes(np.repeat(one[..., None], 3, 2)) for name, one in explained.maps.items()}
        write_explanation(explanation(target), images | maps, explained.description)
    if args.compare:
        write_comparison(photo, derained, target)
    return has_location(photo.write(target, derained))


def restore_video(restorer: "Restorer", source: Path, target: Path, args: argparse.Namespace) -> bool:
    """Restore a video frame by frame; all frames are conditioned on what the first one shows.

    Returns:
        Whether the metadata that is written has the location.
    """
    conditions: dict[str, Any] | None = None

    def restore(frame: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal conditions
        conditions = restorer.encode(frame) if conditions is None else conditions
        return restorer(frame, conditions, name=str(source))

    beside = comparison(target) if args.compare else None
    return videos.rewrite(source, target, restore, crf=args.crf, beside=beside, metadata=not args.strip_metadata)


def is_video(path: Path) -> bool:
    """Whether a name is that of a video."""
    return path.suffix.lower() in videos.SUFFIXES


def plan(source: str, output: Path) -> dict[Path, Path]:
    """Says which file becomes which; names and sub-folders are kept.

    Args:
        source: A file, a folder or a glob.
        output: A file for one photo or video, a folder for several.

    Raises:
        DerainError: If nothing is found, or two photos would become one file.
    """
    path = Path(source)
    if path.resolve() == output.resolve() and path.exists():
        raise DerainError(f"{output}: is the input itself; give another output")
    if path.is_dir():
        inside = output.resolve().is_relative_to(path.resolve())
        files = [f for f in image_files(path, recursive=True, suffixes=KINDS) if not (inside and _within(f, output))]
        targets = {file: videos.output_path(output / file.relative_to(path)) for file in files}
    elif path.is_file():
        target = videos.output_path(output / path.name) if output.is_dir() or not output.suffix else output
        targets = {path: target}
        if not is_video(path) and target.suffix.lower() not in SUFFIXES:
            raise DerainError(
                f"{target}: cannot write '{target.suffix}'; end it in .png, .jpg, .webp, .tif, .bmp or .avif"
            )
    else:
        matches = (Path(name) for name in glob.glob(source, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        found = select_images(matches, KINDS)
        if found.skipped:
            log.warning("%s: %s", source, found.note())
        targets = {file: videos.output_path(output / file.name) for file in found.files}
    if not targets:
        raise DerainError(
            f"{source}: no such photo, video, folder or glob with any ({', '.join(sorted(KINDS))}); check the path"
        )
    if path.is_dir() or not path.is_file():
        if output.is_file() or output.suffix.lower() in KINDS:
            raise DerainError(f"{output}: is a file, but {source} has several photos; give a folder")
        check_outputs((target, file) for file, target in targets.items())
    for file, target in targets.items():
        if target.resolve() == file.resolve():
            raise DerainError(f"{target}: is the input itself; give another output")
    return targets


def _within(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def outputs(target: Path, args: argparse.Namespace) -> list[Path]:
    """Return the files that are written for a restored photo or video."""
    explained = explanation(target)
    return [
        target,
        *([comparison(target)] if args.compare else []),
        *([explained.with_name(f"{explained.name}{ending}") for ending in (".png", ".json")] if args.explain else []),
    ]


def comparison(target: Path) -> Path:
    """Where the picture, or the video, of before and after goes: beside what was restored.

    Example:
        >>> comparison(Path("out/a.jpg")).as_posix(), comparison(Path("out/a.mp4")).as_posix()
        ('out/a.jpg-compare.png', 'out/a.mp4-compare.mp4')
    """
    return target.with_name(f"{target.name}-compare{target.suffix if is_video(target) else '.png'}")


def explanation(target: Path) -> Path:
    """Where the explanation goes, without suffix.

    Example:
        >>> explanation(Path("out/a.jpg")).as_posix()
        'out/a.jpg-explain'
    """
    return target.with_name(f"{target.name}-explain")


def write_comparison(photo: Photo, derained: NDArray[np.float32], target: Path) -> None:
    """Writes the picture of before and after."""
    picture = compare({"rainy": to_bytes(photo.rgb), "derained": to_bytes(derained)})
    write_image(comparison(target), picture)


def tile_size(text: str) -> int | Literal["auto"] | None:
    """Reads ``--tile``.

    Example:
        >>> tile_size("none"), tile_size("auto"), tile_size("512")
        (None, 'auto', 512)
    """
    if text == "auto":
        return "auto"
    if text != "none" and not text.isdecimal():
        raise DerainError(f"--tile {text}: expected a number of pixels, auto or none")
    return None if text == "none" else int(text)
