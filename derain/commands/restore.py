"""Remove rain from a photo or video, or from all that are in a folder or match a glob."""

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from derain import video
from derain.commands.option_values import scale_factor, tile_size
from derain.commands.output_paths import comparison_path, explanation_path, is_video, plan
from derain.commands.photo_pipeline import PIXELS_AHEAD, Outcome, PhotoPipeline, outcome_of
from derain.errors import DerainError, failed_files
from derain.folders import check_outputs
from derain.image_metadata import has_location
from derain.images import Photo, Pixels, read_photo, to_bytes, write_image
from derain.memory import memory_errors, release_freed_memory
from derain.pictures import compare, write_explanation
from derain.progress import track
from derain.unfinished import remove_unfinished_outputs
from derain.video import VideoOptions

if TYPE_CHECKING:
    from derain.restoration import Explanation, Restorer

MAX_TEMPORAL = 8
"""Maximum number of neighbours on each side with which a frame of a video is fused."""


@dataclass(frozen=True)
class FileOptions:
    """How photos and videos are restored, read and written; see the arguments of `restore`.

    ``videos_in_bf16`` is whether videos are restored in bf16 although photos are not.
    """

    compare: bool = False
    explain: bool = False
    strip_metadata: bool = False
    white: float = 1.0
    video: VideoOptions = field(default_factory=VideoOptions)
    temporal: int = 0
    videos_in_bf16: bool = False


def restore(
    input: str,
    out: Path,
    *,
    weights: str = "default",
    method: str | None = None,
    tile: str = "auto",
    ensemble: bool = False,
    compare: bool = False,
    explain: bool = False,
    crf: int = 18,
    encoder: str | None = None,
    temporal: int = 0,
    strip_metadata: bool = False,
    white: float = 1.0,
    overwrite: bool = False,
    route: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    compile: bool = False,
    scale: str = "full",
    strength: float = 1.0,
) -> int:
    """Remove rain from a photo or video, or from all that are in a folder or match a glob.

    Args:
        input: A photo, a video, a folder (searched recursively), or a quoted glob.
        out: Output file, or output folder for several files.
        weights: A name from `derain models list`, hub:OWNER/NAME, or a file: weights or a checkpoint of derain, weights
            of a method's authors (PReNet: FILE:stages=N,variant=NAME), an ONNX file of derain export, or a model that
            spandrel supports.
        method: Class of a method outside derain that the weights belong to, such as my_method.MyModule.
        tile: Side of the tiles in pixels, at least 64; auto uses tiles only if memory is short, none uses no tiles.
        ensemble: Average over 8 flips and rotations, 8 times slower; for methods trained on rotated or transposed
            crops.
        compare: Also write NAME.EXT-compare.png (for videos NAME.EXT-compare.EXT) with before and after side by side.
        explain: Also write NAME.EXT-explain.png and .json with the method's maps, route and scores; only for photos,
            and only for methods that have maps.
        crf: Quality of videos, from 0 (best) to 51 (worst).
        encoder: Encoder of videos, such as h264_nvenc or hevc_videotoolbox (default: libx264, for WebM libvpx-vp9).
        temporal: Number of frames before and of frames after each frame of a video that are fused with it, such as 2; 0
            restores frame by frame.
        strip_metadata: Remove EXIF metadata (time, camera, location) and the tags of videos; colour profiles are kept.
        white: Value of white in floating-point TIFF files, such as 255.
        overwrite: Replace existing outputs, which are kept by default.
        route: Route for all images, from 0, instead of the route that CLIP selects (CLIP-RPN).
        solver: Solver of DA-CLIP + IR-SDE: posterior (default), mrs-ode1, mrs-ode2, mrs-sde2, mars-ode2, mars-sde2,
            sde or ode.
        steps: Evaluations of the network by the solver (default: 10).
        seed: Seed of the solver's noise (default: 0).
        device: Device: auto, cpu, cuda, cuda:N or mps.
        precision: Precision of the network: float32, bf16 (autocast), or auto, which is float32 for photos and bf16
            for videos. Devices without bfloat16 instructions use float32; with auto, methods that sample do, too.
        compile: Compile the network, which takes up to a minute; worthwhile for hundreds of images.
        scale: Factor by which images are reduced to estimate the rain, which is subtracted at full size; auto reduces
            a shorter side of 2000 pixels or more to 1000 to 1500 pixels, full does not reduce images.
        strength: Share of the rain that is removed, from 0 to 1.

    Raises:
        DerainError: If an option is wrong, the weights cannot be loaded, the only output exists, or a file cannot be
            restored; in the last case, all other files are written.
    """
    video_options = VideoOptions(crf, encoder, metadata=not strip_metadata)
    options = FileOptions(compare, explain, strip_metadata, white, video_options, temporal)
    jobs = _checked_plan(input, out, options)
    pending = {source: target for source, target in jobs.items() if overwrite or not target.exists()}
    if not pending and len(jobs) == 1:
        raise DerainError(f"{out}: exists already; add --overwrite to replace it")
    report = Report(out, len(jobs), len(jobs) - len(pending), _remove_broken_videos(pending, options))
    if report.failures and not pending:
        raise failed_files(report.failures)
    from derain.restoration import Restorer, require_explains

    restorer = Restorer(
        weights,
        method=method,
        device=device,
        precision="bf16" if precision == "bf16" else "float32",
        tile=tile_size(tile),
        ensemble=ensemble,
        route=route,
        sampling=_sampling(solver=solver, steps=steps, seed=seed),
        compile=compile,
        scale=scale_factor(scale),
        strength=strength,
    )
    if explain:
        require_explains(restorer.method)
    print(f"{weights}: {restorer.note}, on {restorer.device}", file=sys.stderr)
    options = replace(options, videos_in_bf16=precision == "auto" and _restores_in_bf16(restorer, pending))
    try:
        _restore_all(restorer, pending, options, report)
    except (KeyboardInterrupt, OSError):
        report.print_interrupted(list(pending.values())[report.attempted :], overwrite)
        raise
    return report.finish("photos and videos" if any(map(is_video, jobs)) else "photos")


def _checked_plan(input: str, out: Path, options: FileOptions) -> dict[Path, Path]:
    """Return the output path of each input, as `plan` does, and check options and outputs.

    Raises:
        DerainError: As for `plan`; if two output files collide; or if an option is wrong.
    """
    jobs = plan(input, out)
    check_outputs((file, source) for source, target in jobs.items() for file in output_files(target, options))
    _check_options(options, jobs)
    return jobs


def _restores_in_bf16(restorer: "Restorer", jobs: Mapping[Path, Path]) -> bool:
    """Return whether there are videos and the restorer suits bf16; if so, print that videos are restored in bf16."""
    if not any(map(is_video, jobs)) or not _suits_bf16(restorer):
        return False
    print("videos are restored in bf16; --precision float32 for exact values", file=sys.stderr)
    return True


def _suits_bf16(restorer: "Restorer") -> bool:
    """Return whether the device has bf16 instructions, and the method is one of derain's own that does not sample.

    Other methods may contain operations that do not support bf16, and sampling may multiply rounding errors.
    """
    from derain.methods.interfaces import Sampled
    from derain.methods.registry import BUILT_IN, class_path
    from derain.restoration import computes_bf16

    is_own = class_path(type(restorer.method)) in BUILT_IN
    return is_own and not isinstance(restorer.method, Sampled) and computes_bf16(restorer.device)


def _sampling(**options: str | int | None) -> Any:
    """Return the sampling options that are not None; return None if all are None: the method then uses its own."""
    from derain.methods.interfaces import Sampling

    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return Sampling(**chosen) if chosen else None


@dataclass
class Report:
    """Counts and messages of a run.

    Attributes:
        out: Output of the run.
        total: Number of photos and videos in the input.
        kept: Number of existing outputs that are kept.
        failures: Messages about files that could not be restored.
        restored: Number of restored files.
        attempted: Number of calls of `add`: files that were restored or failed.
        with_location: Outputs whose metadata contains a location.
    """

    out: Path
    total: int
    kept: int
    failures: list[str]
    restored: int = 0
    attempted: int = 0
    with_location: list[Path] = field(default_factory=list)

    def add(self, target: Path, outcome: Outcome) -> None:
        """Count a file that was restored or failed.

        Args:
            target: Output file.
            outcome: Whether its metadata contains a location, or the error that prevented the restoration.
        """
        self.attempted += 1
        if isinstance(outcome, Exception):
            self.failures.append(str(outcome))
            return
        self.restored += 1
        if outcome:
            self.with_location.append(target)

    def print_summary(self, kind: str) -> None:
        """Print the counts of a finished run, and a note about locations in the metadata."""
        kept = f", kept {self.kept} existing (--overwrite replaces them)" if self.kept else ""
        print(f"restored {self.restored} of {self.total} {kind}{kept}: {self.out}", file=sys.stderr)
        if self.with_location:
            more = f" and {len(self.with_location) - 1} more" if len(self.with_location) > 1 else ""
            print(
                f"{self.with_location[0]}{more}: metadata contains the location (GPS); --strip-metadata removes it",
                file=sys.stderr,
            )

    def print_interrupted(self, remaining: Sequence[Path], overwrite: bool) -> None:
        """Print the counts of an interrupted run, and how to restore the remaining files, given their outputs."""
        print(
            f"restored {self.restored} of {self.total}, kept {self.kept} existing, {len(self.failures)} failed, "
            f"{len(remaining)} remain: {self.out}; {_next_step(remaining, overwrite)}",
            file=sys.stderr,
        )

    def finish(self, kind: str) -> int:
        """Print the counts of a finished run; return the exit code 0.

        Raises:
            DerainError: If a file could not be restored.
        """
        self.print_summary(kind)
        if self.failures:
            raise failed_files(self.failures)
        return 0


def _check_options(options: FileOptions, jobs: Mapping[Path, Path]) -> None:
    first_video = next(filter(is_video, jobs), None)
    if first_video is not None and options.explain:
        raise DerainError(f"--explain: {first_video} is a video; omit --explain, or extract a frame as a photo")
    if not 0 <= options.temporal <= MAX_TEMPORAL:
        raise DerainError(f"--temporal {options.temporal}: expected 0 (frame by frame) to {MAX_TEMPORAL}; 2 is enough")
    if not 0 < options.white < math.inf:
        raise DerainError(f"--white {options.white:g}: must be finite and above 0; give the value of white in the file")


def _remove_broken_videos(pending: dict[Path, Path], options: FileOptions) -> list[str]:
    """Remove from ``pending`` the videos that cannot be read or written; return messages about them."""
    failures = []
    for source in filter(is_video, list(pending)):
        try:
            video.check(source, pending[source], options.video)
        except DerainError as error:
            failures.append(str(error))
            del pending[source]
    return failures


def _restore_all(restorer: "Restorer", jobs: Mapping[Path, Path], options: FileOptions, report: Report) -> None:
    """Restore files in order, and add their outcomes to the report; first remove temporary files of killed runs."""
    remove_unfinished_outputs(file for target in jobs.values() for file in output_files(target, options))
    outcomes = _outcomes(restorer, jobs, options)
    for target, outcome in zip(jobs.values(), track(outcomes, "Restoring", len(jobs)), strict=True):
        report.add(target, outcome)


def _outcomes(restorer: "Restorer", jobs: Mapping[Path, Path], options: FileOptions) -> Iterator[Outcome]:
    """Restore files in order and yield their outcomes; a `PhotoPipeline` restores several photos in a row."""
    for are_videos, sources in itertools.groupby(jobs, is_video):
        group = {source: jobs[source] for source in sources}
        if not are_videos and len(group) > 1:
            yield from photo_pipeline(restorer, options).run(group)
            continue
        restore_file = restore_video if are_videos else restore_photo
        for source, target in group.items():
            try:
                with memory_errors(str(source)):
                    outcome: Outcome = restore_file(restorer, source, target, options)
            except (DerainError, OSError) as error:
                outcome = outcome_of(error)
            yield outcome
            release_freed_memory()


def _next_step(remaining: Sequence[Path], overwrite: bool) -> str:
    """Return the end of the message of `Report.print_interrupted`: how to restore the remaining files."""
    if not overwrite:
        return "run the same command for the rest"
    old = sum(target.exists() for target in remaining)
    if old:
        return f"run the same command to restore all again: {old} remaining outputs are from an earlier run"
    return "run the same command without --overwrite for the rest"


def restore_photo(restorer: "Restorer", source: Path, target: Path, options: FileOptions) -> bool:
    """Restore a photo.

    The restored photo is written last: if it exists, explanation and comparison exist, too.

    Args:
        restorer: Restores the photo.
        source: The photo.
        target: Output file.
        options: How the photo is read and the output is written.

    Returns:
        Whether the written metadata contains a location.

    Raises:
        DerainError: If the photo cannot be read, restored or written.
        OSError: If the file system refuses to read or write a file.
    """
    pipeline = photo_pipeline(restorer, options)
    photo = pipeline.read(source)
    (restored,) = pipeline.restore([photo], [source])
    if isinstance(restored, DerainError):
        raise restored
    return pipeline.write(photo, restored, target)


def photo_pipeline(restorer: "Restorer", options: FileOptions) -> PhotoPipeline:
    """Return a pipeline that reads, restores and writes photos by these options."""

    def read(source: Path) -> Photo:
        photo = read_photo(source, options.white)
        return photo.without_exif() if options.strip_metadata else photo

    def restore_photos(photos: Sequence[Photo], sources: Sequence[Path]) -> "list[Explanation | DerainError]":
        images, names = [photo.rgb for photo in photos], list(map(str, sources))
        if options.explain:
            return [_explain(restorer, image, name) for image, name in zip(images, names, strict=True)]
        results = restorer.restore_each(images, names)
        return [result if isinstance(result, DerainError) else Explanation(result, {}, {}) for result in results]

    def write(photo: Photo, restored: "Explanation", target: Path) -> bool:
        if options.explain:
            pictures = {"rainy": to_bytes(photo.rgb), "derained": to_bytes(restored.derained)}
            for name, values in restored.maps.items():
                pictures[name] = to_bytes(np.repeat(values[..., None], 3, 2))
            write_explanation(explanation_path(target), pictures, restored.description)
        if options.compare:
            write_comparison(photo, restored.derained, target)
        return has_location(photo.write(target, restored.derained))

    from derain.restoration import Explanation

    return PhotoPipeline(restorer, read, restore_photos, write)


def _explain(restorer: "Restorer", image: NDArray[np.float32], name: str) -> "Explanation | DerainError":
    try:
        return restorer.explain(image, name)
    except DerainError as error:
        return error


def restore_video(restorer: "Restorer", source: Path, target: Path, options: FileOptions) -> bool:
    """Restore a video in batches of frames, and fuse neighbouring frames.

    All frames are restored with the conditions of the first frame, such as its route.

    Args:
        restorer: Restores the frames.
        source: The video.
        target: Output file.
        options: How frames are fused and the output is written.

    Returns:
        Whether the written metadata contains a location.

    Raises:
        DerainError: If the video cannot be read, restored or written.
        OSError: If the file system refuses to read or write a file.
    """

    def restore_frames(frames: Iterator[video.Picture]) -> Iterator[Pixels]:
        conditions: dict[str, Any] | None = None
        size = video.QUEUE
        while batch := list(islice(frames, size)):
            images = [frame.pixels for frame in batch]
            if conditions is None:
                conditions = restorer.encode(np.asarray(images[0] / 255, np.float32))
            yield from restorer(images, conditions, name=[f"{source}: {frame.name}" for frame in batch])
            height, width = images[0].shape[:2]
            size = max(video.QUEUE, min(restorer.images_at_once(height, width), PIXELS_AHEAD // (height * width)))

    def change(frames: Iterator[video.Picture]) -> Iterator[Pixels]:
        return video.fuse_neighbours(restore_frames(frames), options.temporal)

    comparison = comparison_path(target) if options.compare else None
    with restorer.in_bf16() if options.videos_in_bf16 else nullcontext():
        return video.rewrite(source, target, change, options=options.video, beside=comparison)


def output_files(target: Path, options: FileOptions) -> list[Path]:
    """Return all output files of a photo or video."""
    files = [target]
    if options.compare:
        files.append(comparison_path(target))
    if options.explain:
        explanation = explanation_path(target)
        files += [explanation.with_name(f"{explanation.name}{suffix}") for suffix in (".png", ".json")]
    return files


def write_comparison(photo: Photo, derained: NDArray[np.float32], target: Path) -> None:
    """Write the picture that shows before and after, at the full size of the photo."""
    picture = compare({"rainy": to_bytes(photo.rgb), "derained": to_bytes(derained)})
    write_image(comparison_path(target), picture)
