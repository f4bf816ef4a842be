"""Score the result images of any method against clean images."""

import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from derain.data.pairs import Pair
from derain.data.result_folders import ScoringPair, find_scoring_pairs
from derain.data.sequences import consecutive_frames
from derain.errors import DerainError
from derain.images import Pixels
from derain.metrics import Protocol, bootstrap_interval, psnr_ssim, resolve
from derain.metrics.full_reference import MAX_PSNR
from derain.metrics.perceptual import FrechetDistance, Lpips, PyiqaMetric, UnknownMetricError, available_lpips
from derain.metrics.sequences import mean_row, sequence_rows
from derain.metrics.temporal import TEMPORAL, TEMPORAL_NAMES, split_temporal, temporal_notes, temporal_scores
from derain.progress import track
from derain.tables import Cell, Column, Format, Row, Table, Value, write_results

Metric = PyiqaMetric | FrechetDistance

TEMPORAL_COLUMNS = tuple(f"{prefix}{name}" for prefix in ("", "clean_") for name in TEMPORAL_NAMES)
"""Names of the temporal scores of the derained video, and those of the clean video."""


def score(
    derained: Path,
    clean: str | None = None,
    *,
    protocol: Sequence[str] = ("matlab-y",),
    lpips: Literal["auto", "alex", "vgg", "none"] = "auto",
    no_reference: Sequence[str] = (),
    full_reference: Sequence[str] = (),
    format: Format = "table",
    out: Path | None = None,
) -> int:
    """Score the result images of any method against clean images.

    Args:
        derained: An image, or a folder with the results of a method.
        clean: A clean image, a folder with clean images, or the folder or name of a data set; images of folders are
            paired by name.
        protocol: How PSNR and SSIM are computed: matlab-y, prenet, restormer, plnlin, ir-sde-rgb, ir-sde-y, rgb, or
            ir-sde for ir-sde-rgb and ir-sde-y; append +down to compute SSIM on down-sampled images; add temporal for
            flicker and warping error of videos.
        lpips: Network of LPIPS; auto is AlexNet if its weights are on this machine, else none; alex and vgg download
            missing weights.
        no_reference: No-reference metrics of pyiqa, such as niqe, brisque or musiq; they need no clean images.
        full_reference: Metrics of pyiqa that compare with clean images, such as dists, or fid for the whole folder.
        format: Output format; CSV and JSON have the scores of each image.
        out: Output file (default: standard output).

    Raises:
        DerainError: If a protocol is unknown, no metric is available, or images are missing, do not belong together or
            cannot be read.
    """
    no_reference, full_reference = _names(no_reference), _names(full_reference)
    if clean is None and not no_reference:
        raise DerainError("CLEAN is missing; give clean images, or score without them by --no-reference niqe")
    if clean is None and full_reference:
        raise DerainError(f"--full-reference {','.join(full_reference)}: needs clean images; give CLEAN")
    names, temporal = split_temporal(list(protocol), supported=clean is not None)
    protocols = () if clean is None else resolve(names)
    pairs = find_scoring_pairs(derained, clean)
    consecutive = consecutive_derained_frames(pairs) if temporal else None
    network = available_lpips("none" if clean is None else lpips)
    metrics = [*available(no_reference, PyiqaMetric), *available(full_reference, _with_reference)]
    if not (protocols or metrics):
        raise DerainError("no metric is available; give clean images, or install pyiqa: pip install 'derain[iqa]'")
    results = evaluate(pairs, protocols, network, metrics, consecutive)
    table = results_table(results, intervals=format == "table")
    write_results(format, table, image_records(results), results, out)
    return 0


def _names(values: Sequence[str]) -> list[str]:
    """Return the names in values, each of which is a name or several joined by commas."""
    return [name for value in values for name in value.split(",") if name]


def _with_reference(name: str) -> PyiqaMetric | FrechetDistance:
    """Return a metric of pyiqa that compares with clean images."""
    return FrechetDistance(name) if name in FrechetDistance.names else PyiqaMetric(name, full_reference=True)


def available(names: Sequence[str], create: Callable[[str], Metric]) -> list[Metric]:
    """Return the metrics of pyiqa that can be loaded; report the others on standard error.

    Args:
        names: Names in pyiqa.
        create: Function that returns the metric of a name.

    Raises:
        UnknownMetricError: If pyiqa has no metric of a name.
    """
    metrics = []
    for name in names:
        try:
            metrics.append(create(name))
        except UnknownMetricError:
            raise
        except DerainError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    return metrics


def evaluate(
    pairs: Sequence[ScoringPair],
    protocols: Sequence[Protocol],
    lpips: Lpips | None = None,
    metrics: Sequence[Metric] = (),
    consecutive: Collection[int] | None = None,
) -> list[dict[str, Any]]:
    """Compute the scores of all images, and their means.

    Args:
        pairs: Derained images, with their clean images if there are protocols.
        protocols: Protocols of PSNR and SSIM; if empty, there is one result without them.
        lpips: LPIPS metric; None: not computed.
        metrics: Metrics of pyiqa. Those that compare with clean images require a clean image in every pair.
        consecutive: Indices of the frames that are compared with the frame at the previous index (flicker, warping
            error); None for no temporal metrics. They require a clean image in every pair.

    Returns:
        One result per protocol: ``protocol``, ``definition``, ``count`` of the images, means ``psnr`` (dB), ``ssim``
        and ``lpips``, ``psnr_interval`` and ``ssim_interval`` (95 %, bootstrap), ``lpips_net``, ``no_reference`` and
        ``full_reference`` (means by name; Fréchet distances of all images), ``temporal`` (means of flicker and warping
        error by name) and ``images`` (scores of each image). With videos, also ``sequences`` (means of each sequence)
        and ``sequence_means`` (means over sequences). What was not computed is None, or an empty dictionary.

    Raises:
        DerainError: If an image cannot be read or scored; the message has its path.
    """
    per_image_metrics = [metric for metric in metrics if isinstance(metric, PyiqaMetric)]
    lock = threading.Lock()  # for networks, each of which uses all cores

    def score_image(pair: ScoringPair) -> list[dict[str, float]]:
        """Return the scores of an image, one dictionary per protocol."""
        derained, clean = pair.read()
        scores = {}
        try:
            with lock:
                if lpips is not None and clean is not None:
                    scores["lpips"] = lpips(derained, clean)
                for metric in per_image_metrics:
                    scores[metric.name] = metric(derained, clean)
            if clean is None:
                return [scores]
            fidelities = [psnr_ssim(derained, clean, protocol) for protocol in protocols]
        except DerainError as error:
            raise DerainError(f"{pair.derained}: {error}") from error
        return [{"psnr": psnr, "ssim": ssim, **scores} for psnr, ssim in fidelities]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scores = list(track(pool.map(score_image, pairs), "Scoring", len(pairs)))
        temporal_rows = [{} for _ in pairs] if consecutive is None else _compare_frames(pairs, consecutive, pool)
    distances = {metric.name: metric(_read(pairs)) for metric in metrics if isinstance(metric, FrechetDistance)}
    results = []
    videos = any(pair.sequence for pair in pairs)
    for index, protocol in enumerate(protocols or [None]):
        images = []
        for pair, scores_by_protocol, temporal in zip(pairs, scores, temporal_rows, strict=True):
            image: dict[str, Any] = {"name": pair.name, "sequence": pair.sequence} if videos else {"name": pair.name}
            images.append(image | scores_by_protocol[index] | temporal)
        results.append(_summary(protocol, images, lpips, per_image_metrics, distances))
    return results


def _read(pairs: Sequence[ScoringPair]) -> Iterator[tuple[Pixels, Pixels]]:
    """Yield the derained and the clean image of each pair; all pairs must have a clean image."""
    for pair in pairs:
        derained, clean = pair.read()
        assert clean is not None
        yield derained, clean


def consecutive_derained_frames(pairs: Sequence[ScoringPair]) -> frozenset[int]:
    """Return the indices of the frames whose preceding frame in the video is at the previous index.

    Raises:
        DerainError: If there are no videos.
    """
    references = [pair.clean for pair in pairs]
    frames = [reference if isinstance(reference, Pair) else Pair("", Path()) for reference in references]
    if not any(frame.sequence for frame in frames):
        raise DerainError(
            f"--protocol {TEMPORAL}: the clean images are not videos; give a data set of videos, or video:FOLDER"
        )
    return consecutive_frames(frames)


def _compare_frames(
    pairs: Sequence[ScoringPair], consecutive: Collection[int], pool: ThreadPoolExecutor
) -> list[dict[str, float | None]]:
    """Return flicker and warping error between each frame and the previous one; None if not in ``consecutive``."""

    def compare(index: int) -> dict[str, float | None]:
        if index not in consecutive:
            return dict.fromkeys(TEMPORAL_COLUMNS)
        (before, clean_before), (after, clean_after) = pairs[index - 1].read(), pairs[index].read()
        assert clean_before is not None
        assert clean_after is not None
        try:
            return temporal_scores((clean_before, clean_after), {"": (before, after)})
        except DerainError as error:
            raise DerainError(f"{pairs[index].derained}: {error}") from error

    indices = range(len(pairs))
    return list(track(pool.map(compare, indices), "Comparing consecutive frames", len(pairs)))


def _summary(
    protocol: Protocol | None,
    images: list[dict[str, Any]],
    lpips: Lpips | None,
    metrics: Sequence[PyiqaMetric],
    distances: Mapping[str, float],
) -> dict[str, Any]:
    """Return the result of a protocol, as `evaluate` describes it."""
    means = mean_row(images)

    def interval(key: str) -> list[float] | None:
        values = np.array([image[key] for image in images]) if key in means and len(images) > 1 else None
        return None if values is None else list(bootstrap_interval(values))

    result = {
        "protocol": None if protocol is None else protocol.name,
        "definition": None if protocol is None else protocol.definition,
        "count": len(images),
        "psnr": means.get("psnr"),
        "ssim": means.get("ssim"),
        "lpips": means.get("lpips"),
        "psnr_interval": interval("psnr"),
        "ssim_interval": interval("ssim"),
        "lpips_net": None if lpips is None else lpips.net,
        "no_reference": {metric.name: means[metric.name] for metric in metrics if not metric.full_reference},
        "full_reference": {metric.name: means[metric.name] for metric in metrics if metric.full_reference}
        | dict(distances),
        "temporal": {name: means[name] for name in TEMPORAL_COLUMNS if name in means},
        "images": images,
    }
    sequences = sequence_rows(images)
    if sequences:
        result |= {"sequences": sequences, "sequence_means": mean_row(sequences)}
    return result


def results_table(results: Sequence[dict[str, Any]], *, intervals: bool) -> Table:
    """Return a table with one row per protocol; for videos, a second row has the means over sequences.

    Args:
        results: Results of `evaluate`.
        intervals: Whether confidence intervals are added to the means over images.
    """
    first = results[0]
    videos = "sequences" in first
    columns = [Column("protocol", align="left")]
    if videos:
        columns.append(Column("mean over", align="left"))
    columns += [Column("frames" if videos else "images"), Column("PSNR (dB)", ".3f"), Column("SSIM", ".4f")]
    if first["lpips"] is not None:
        columns.append(Column(f"LPIPS ({first['lpips_net']})", ".4f"))
    columns += [Column(name, ".4f") for name in [*first["full_reference"], *first["no_reference"]]]
    columns += [Column(name.replace("_", " "), ".6f" if "warping" in name else ".3f") for name in first["temporal"]]

    def mean(result: dict[str, Any], key: str, digits: int) -> Cell:
        if not intervals or result[f"{key}_interval"] is None:
            return Cell(result[key])
        low, high = result[f"{key}_interval"]
        return Cell(result[key], f" [{low:.{digits}f}, {high:.{digits}f}]")

    rows = []
    for result in results:
        head: list[Value] = [result["protocol"] or "no reference"]
        further_means = result["full_reference"] | result["no_reference"] | result["temporal"]
        if result["lpips"] is not None:
            further_means = {"lpips": result["lpips"]} | further_means
        mean_over: list[Value] = ["frames"] if videos else []
        values = [result["count"], mean(result, "psnr", 2), mean(result, "ssim", 4)]
        rows.append(Row([*head, *mean_over, *values, *further_means.values()]))
        if videos:
            scores = [result["sequence_means"].get(name) for name in ("psnr", "ssim", *further_means)]
            frames = sum(sequence["frames"] for sequence in result["sequences"])
            rows.append(Row([*head, f"{len(result['sequences'])} sequences", frames, *scores]))
    notes = [f"{result['protocol']}: {result['definition']}" for result in results if result["protocol"]]
    identical = max(sum(image.get("psnr") == MAX_PSNR for image in result["images"]) for result in results)
    if identical:
        notes.append(f"images identical to the clean ones, counted as {MAX_PSNR:.0f} dB: {identical}")
    notes += temporal_notes(first["images"])
    if intervals and any(result["psnr_interval"] for result in results):
        notes.insert(0, "Means over images [95 % bootstrap interval]")
    return Table(columns, rows, notes)


def image_records(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the CSV: one per protocol and image, then with videos one per protocol and sequence."""
    records = [{"protocol": result["protocol"], **image} for result in results for image in result["images"]]
    for result in results:
        for sequence in result.get("sequences", ()):
            name = f"mean of {sequence['frames']} frames"
            scores = {key: value for key, value in sequence.items() if key != "frames"}
            records.append({"protocol": result["protocol"], "name": name, **scores})
    return records
