"""Score the result images of any method against clean images."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from derain.data.result_folders import ScoringPair, find_scoring_pairs
from derain.errors import DerainError
from derain.images import Pixels
from derain.metrics import Protocol, bootstrap_interval, psnr_ssim, resolve
from derain.metrics.full_reference import MAX_PSNR
from derain.metrics.perceptual import FrechetDistance, Lpips, PyiqaMetric, available_lpips
from derain.progress import track
from derain.tables import Cell, Column, Format, Row, Table, Value, write_results

Metric = PyiqaMetric | FrechetDistance


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
        clean: The clean image, a folder with clean images, or the folder or name of a data set; images are paired by
            name.
        protocol: How PSNR and SSIM are computed: matlab-y, prenet, restormer, plnlin, ir-sde-rgb, ir-sde-y, rgb, or
            ir-sde for ir-sde-rgb and ir-sde-y; append +down to compute SSIM on down-sampled images.
        lpips: Network of LPIPS; auto is AlexNet if its weights are on this machine, else none; alex and vgg download
            missing weights.
        no_reference: No-reference metrics of pyiqa, such as niqe, brisque or musiq; they need no clean images.
        full_reference: Metrics of pyiqa that compare with clean images, such as dists, or fid for the whole folder.
        format: Output format; CSV and JSON have the scores of each image.
        out: Write to this file.

    Raises:
        DerainError: If a protocol is unknown, no metric is available, or images are missing, do not belong together or
            cannot be read.
    """
    no_reference, full_reference = _names(no_reference), _names(full_reference)
    if clean is None and not no_reference:
        raise DerainError("CLEAN is missing; give clean images, or score without them by --no-reference niqe")
    if clean is None and full_reference:
        raise DerainError(f"--full-reference {','.join(full_reference)}: needs clean images; give CLEAN")
    protocols = () if clean is None else resolve(protocol)
    pairs = find_scoring_pairs(derained, clean)
    network = available_lpips("none" if clean is None else lpips)
    metrics = [*available(no_reference, PyiqaMetric), *available(full_reference, _with_reference)]
    if not (protocols or metrics):
        raise DerainError("no metric is available; give clean images, or install pyiqa: pip install 'derain[iqa]'")
    results = evaluate(pairs, protocols, network, metrics)
    table = results_table(results, intervals=format == "table")
    write_results(format, table, image_records(results), results, out)
    return 0


def _names(values: Sequence[str]) -> list[str]:
    """Return names that were given separately or joined by commas."""
    return [name for value in values for name in value.split(",") if name]


def _with_reference(name: str) -> PyiqaMetric | FrechetDistance:
    """Return a metric of pyiqa that needs clean images."""
    return FrechetDistance(name) if name in FrechetDistance.names else PyiqaMetric(name, full_reference=True)


def available(names: Sequence[str], create: Callable[[str], Metric]) -> list[Metric]:
    """Return the metrics of pyiqa that can be loaded; report the others on standard error."""
    metrics = []
    for name in names:
        try:
            metrics.append(create(name))
        except DerainError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    return metrics


def evaluate(
    pairs: Sequence[ScoringPair],
    protocols: Sequence[Protocol],
    lpips: Lpips | None = None,
    metrics: Sequence[Metric] = (),
) -> list[dict[str, Any]]:
    """Compute the scores of all images and their means.

    Args:
        pairs: Derained images, with their clean images if there are protocols.
        protocols: Protocols of PSNR and SSIM; if empty, the only result has the no-reference metrics.
        lpips: LPIPS metric; None: not computed.
        metrics: Metrics of pyiqa; those that compare with clean images only if all pairs have one.

    Returns:
        One result per protocol: ``protocol``, ``definition``, ``count``, means ``psnr`` (dB), ``ssim`` and ``lpips``,
        ``psnr_interval`` and ``ssim_interval`` (95 %, bootstrap), ``lpips_net``, ``no_reference`` and
        ``full_reference`` (means by name; Fréchet distances of all images) and ``images`` (scores of each image).
        Values that were not computed are None.

    Raises:
        DerainError: If an image cannot be read or scored; the message has its path.
    """
    single = [metric for metric in metrics if isinstance(metric, PyiqaMetric)]
    lock = threading.Lock()  # one network at a time: it uses all cores by itself

    def score_image(pair: ScoringPair) -> list[dict[str, float]]:
        """Return the scores of an image, one dictionary per protocol."""
        derained, clean = pair.read()
        scores = {}
        try:
            with lock:
                if lpips is not None and clean is not None:
                    scores["lpips"] = lpips(derained, clean)
                for metric in single:
                    scores[metric.name] = metric(derained, clean)
            if clean is None:
                return [scores]
            fidelities = [psnr_ssim(derained, clean, protocol) for protocol in protocols]
        except DerainError as error:
            raise DerainError(f"{pair.derained}: {error}") from error
        return [{"psnr": psnr, "ssim": ssim, **scores} for psnr, ssim in fidelities]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scores = list(track(pool.map(score_image, pairs), "Scoring", len(pairs)))
    distances = {metric.name: metric(_read(pairs)) for metric in metrics if isinstance(metric, FrechetDistance)}
    results = []
    for index, protocol in enumerate(protocols or [None]):
        images = [{"name": pair.name, **by_protocol[index]} for pair, by_protocol in zip(pairs, scores, strict=True)]
        results.append(_summary(protocol, images, lpips, single, distances))
    return results


def _read(pairs: Sequence[ScoringPair]) -> Iterator[tuple[Pixels, Pixels]]:
    """Yield the derained and the clean images of pairs that have both."""
    for pair in pairs:
        derained, clean = pair.read()
        assert clean is not None
        yield derained, clean


def _summary(
    protocol: Protocol | None,
    images: list[dict[str, Any]],
    lpips: Lpips | None,
    metrics: Sequence[PyiqaMetric],
    distances: Mapping[str, float],
) -> dict[str, Any]:
    """Return the result of a protocol."""
    scores = {key: np.array([image[key] for image in images]) for key in images[0] if key != "name"}
    means = {key: float(values.mean()) for key, values in scores.items()}

    def interval(key: str) -> list[float] | None:
        return list(bootstrap_interval(scores[key])) if key in scores and len(images) > 1 else None

    return {
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
        "images": images,
    }


def results_table(results: Sequence[dict[str, Any]], *, intervals: bool) -> Table:
    """Return a table with one row per protocol.

    Args:
        results: Results of ``evaluate``.
        intervals: Whether confidence intervals are added to the means.
    """
    columns = [
        Column("protocol", align="left"),
        Column("images"),
        Column("PSNR (dB)", ".3f"),
        Column("SSIM", ".4f"),
    ]
    if results[0]["lpips"] is not None:
        columns.append(Column(f"LPIPS ({results[0]['lpips_net']})", ".4f"))
    columns += [Column(name, ".4f") for name in [*results[0]["full_reference"], *results[0]["no_reference"]]]

    def mean(result: dict[str, Any], key: str, digits: int) -> Cell:
        if not intervals or result[f"{key}_interval"] is None:
            return Cell(result[key])
        low, high = result[f"{key}_interval"]
        return Cell(result[key], f" [{low:.{digits}f}, {high:.{digits}f}]")

    rows = []
    for result in results:
        values: list[Value] = [
            result["protocol"] or "no reference",
            result["count"],
            mean(result, "psnr", 2),
            mean(result, "ssim", 4),
        ]
        if result["lpips"] is not None:
            values.append(result["lpips"])
        rows.append(Row([*values, *result["full_reference"].values(), *result["no_reference"].values()]))
    notes = [f"{result['protocol']}: {result['definition']}" for result in results if result["protocol"]]
    identical = max(sum(image.get("psnr") == MAX_PSNR for image in result["images"]) for result in results)
    if identical:
        notes.append(f"{identical} images are identical to the clean ones and count as {MAX_PSNR:.0f} dB")
    if intervals and any(result["psnr_interval"] for result in results):
        notes.insert(0, "Means over images [95 % bootstrap interval]")
    return Table(columns, rows, notes)


def image_records(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the CSV: one per protocol and image."""
    return [{"protocol": result["protocol"], **image} for result in results for image in result["images"]]
