"""Callback for the results of ``derain test``: scores of every image, a summary and a table."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from derain.callbacks.batched_restoration import BatchedRestoration
from derain.callbacks.image_counts import image_count
from derain.evaluation import evaluation_batch_size
from derain.files.weights import sha256
from derain.images import ESCAPED, write_whole
from derain.methods import DerainModule
from derain.methods.catalog import locate
from derain.methods.interfaces import Sampled
from derain.metrics import Scores, bootstrap_interval
from derain.metrics.sequences import mean_row, sequence_rows
from derain.metrics.temporal import TEMPORAL_NAMES, temporal_notes
from derain.metrics.temporal_quality import COLUMNS
from derain.tables import Column, Row, Table

PACKAGES = ("derain", "torch", "lightning", "torchmetrics")
"""Packages whose versions the summary contains."""


class TestResults(Callback):
    """Save ``images.csv`` and ``summary.json`` to ``trainer.default_root_dir``, and print a table.

    Tests of videos also save ``sequences.csv``. In the summary, ``seconds`` is the mean time of restoration per image
    on rank 0, ``batch_size`` is the maximum number of images in a batch, and ``tile`` is the value of ``--tile``.

    Args:
        restoration: Callback that restores the images and measures the time.
        weights: Weights that are tested, as the user named them; None for a checkpoint that the trainer loads.
        commit: Git commit for the summary; None outside git.
    """

    __test__ = False  # pytest would collect the class

    def __init__(self, restoration: BatchedRestoration, weights: str | None = None, commit: str | None = None) -> None:
        self.restoration, self.weights, self.commit = restoration, weights, commit

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and print the scores of the images of all ranks, on rank 0."""
        if not trainer.is_global_zero:
            return
        module = cast(DerainModule, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(trainer.default_root_dir)
        pairs = data.pairs["test"]
        evaluated = sorted(next(iter(module.scores["derained"].values())).index.tolist())
        names = [(pair.name, pair.sequence) for pair in pairs]
        images = image_rows(module.scores, names, module.temporal_scores)
        sequences = {protocol: sequence_rows(rows) for protocol, rows in images.items()}
        write_rows(folder / "images.csv", images)
        file = self.weights or trainer.ckpt_path
        summary = {
            "method": module.metadata(),
            "sampling": dataclasses.asdict(module.sampling) if isinstance(module, Sampled) else None,
            "lpips_net": module.lpips and module.lpips.net,
            "weights": {"file": str(file), "sha256": sha256(locate(file))} if file else None,
            "data": {
                "sets": data.sets["test"],
                "images": len(evaluated),
                "images_in_sets": len(pairs),
                "fingerprint": data.fingerprint("test", evaluated),
            },
            "results": results(module.scores, images, sequences),
            "seconds": self.restoration.seconds / max(self.restoration.images, 1),
            "batch_size": evaluation_batch_size(data.eval_batch_size, "test", trainer),
            "tile": self.restoration.tile,
            "commit": self.commit,
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
            "hardware": hardware(trainer),
        }
        with write_whole(folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        print_table(summary, temporal_notes(next(iter(images.values()))))
        print(f"per image: {folder / 'images.csv'}\nsummary:   {folder / 'summary.json'}")
        if any(sequences.values()):
            write_rows(folder / "sequences.csv", sequences)
            print(f"per sequence: {folder / 'sequences.csv'}")


def image_rows(
    scores: dict[str, dict[str, Scores]],
    names: Sequence[tuple[str, str]],
    temporal: Mapping[int, Mapping[str, float | None]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of ``images.csv``, one per image, by protocol.

    Args:
        scores: Scores by kind (``rainy`` and ``derained``) and protocol.
        names: Name and sequence of each image in the data sets, by the index that the scores contain; the sequence is
            empty for an image that is not a frame of a video.
        temporal: Flicker and warping error by the index of the later of two frames; None if they were not computed.

    Returns:
        The rows. They have a column ``sequence`` if any image is a frame of a video. Temporal scores are None for a
        frame that does not directly follow another.
    """
    rainy = scores["rainy"]
    return {
        protocol: list(_image_rows(derained, rainy[protocol], names, temporal))
        for protocol, derained in scores["derained"].items()
    }


def _image_rows(
    derained: Scores,
    rainy: Scores,
    names: Sequence[tuple[str, str]],
    temporal: Mapping[int, Mapping[str, float | None]] | None,
) -> Iterator[dict[str, Any]]:
    videos = any(sequence for _, sequence in names)
    for row, index in enumerate(derained.index.tolist()):
        name, sequence = names[index]
        values: dict[str, Any] = {"name": name, "sequence": sequence} if videos else {"name": name}
        values["psnr"] = derained.psnr[row].item()
        values["ssim"] = derained.ssim[row].item()
        values["rainy_psnr"] = rainy.psnr[row].item()
        values["rainy_ssim"] = rainy.ssim[row].item()
        if derained.lpips is not None:
            values["lpips"] = derained.lpips[row].item()
        if rainy.lpips is not None:
            values["rainy_lpips"] = rainy.lpips[row].item()
        if temporal is not None:
            values |= temporal.get(index, dict.fromkeys(COLUMNS))
        yield values


def write_rows(path: Path, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write rows to a CSV file, completely or not at all.

    Args:
        path: File to write.
        rows: Rows by protocol, all with the same keys; the file has a column ``protocol`` after the first column.
    """
    fields = next(list(group[0]) for group in rows.values() if group)
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=ESCAPED) as file:
        writer = csv.DictWriter(file, fieldnames=[fields[0], "protocol", *fields[1:]])
        writer.writeheader()
        for protocol, group in rows.items():
            writer.writerows({**row, "protocol": protocol} for row in group)


def results(
    scores: dict[str, dict[str, Scores]],
    images: Mapping[str, list[dict[str, Any]]],
    sequences: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Return means over the images with 95 % bootstrap intervals, one entry per protocol.

    With videos, ``sequences`` in an entry has the means over the sequences.

    Args:
        scores: Scores by kind (``rainy`` and ``derained``) and protocol.
        images: Rows of the images by protocol.
        sequences: Rows of the sequences by protocol; empty lists without videos.
    """
    entries = []
    for protocol, derained in scores["derained"].items():
        entry: dict[str, Any] = {
            "protocol": protocol,
            "count": len(derained.index),
            "psnr_interval": list(bootstrap_interval(derained.psnr)),
            "ssim_interval": list(bootstrap_interval(derained.ssim)),
            **mean_row(images[protocol]),
        }
        if sequences[protocol]:
            entry["sequences"] = {"count": len(sequences[protocol]), **mean_row(sequences[protocol])}
        entries.append(entry)
    return entries


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Return name of the device, number of logical CPUs, number of devices and precision of a test, for the summary."""
    device = trainer.strategy.root_device
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device or of the processor; for other devices, the processor and a type such as mps."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else f"{cpu_name()}, {device.type}"


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(summary: dict[str, Any], notes: Sequence[str] = ()) -> None:
    """Print the scores of rainy and derained images, one row per protocol; for videos, also means over sequences.

    Args:
        summary: Content of ``summary.json``.
        notes: Notes below the table.
    """
    entries: list[dict[str, Any]] = summary["results"]
    videos, temporal = "sequences" in entries[0], "flicker" in entries[0]
    columns = [Column("protocol", align="left")]
    if videos:
        columns.append(Column("mean over", align="left"))
    for kind in ("rainy", "derained"):
        columns += [Column("PSNR (dB)", ".3f", group=kind), Column("SSIM", ".4f", group=kind)]
        if summary["lpips_net"]:
            columns.append(Column(f"LPIPS ({summary['lpips_net']})", ".4f", group=kind))
    columns.append(Column("95 % interval (dB)"))
    if temporal:
        for kind in ("clean", "rainy", "derained"):
            columns += [Column("flicker", ".3f", group=f"temporal, {kind}")]
            columns += [Column("warping error", ".6f", group=f"temporal, {kind}")]
    rows = []
    for entry in entries:
        low, high = entry["psnr_interval"]
        levels: list[tuple[str, dict[str, Any], str | None]] = [("frames", entry, f"{low:.2f} – {high:.2f}")]
        if videos:
            levels.append((f"{entry['sequences']['count']} sequences", entry["sequences"], None))
        for level, means, interval in levels:
            values = [entry["protocol"], *([level] if videos else [])]
            values += [*_scores(means, "rainy_"), *_scores(means, ""), interval]
            if temporal:
                values += [means[f"{kind}{name}"] for kind in ("clean_", "rainy_", "") for name in TEMPORAL_NAMES]
            rows.append(Row(values))
    print(Table(columns, rows, notes, title=_title(summary)).text(terminal=sys.stdout.isatty()), end="")


def _title(summary: dict[str, Any]) -> str:
    """Return the title of the table: method, data sets, number of images and sampling."""
    data, sampling = summary["data"], summary["sampling"]
    sets = data["sets"] if isinstance(data["sets"], str) else " + ".join(data["sets"])
    title = f"{summary['method']['method']} on {sets}, {image_count(data['images'], data['images_in_sets'])}"
    if sampling:
        title += f", {sampling['solver']}, {sampling['steps'] or 'all'} steps, seed {sampling['seed']}"
    return title


def _scores(result: dict[str, Any], prefix: str) -> list[float]:
    """Return PSNR, SSIM and, if computed, LPIPS of an entry; the prefix is ``rainy_``, or empty for derained images."""
    return [result[f"{prefix}{name}"] for name in ("psnr", "ssim", "lpips") if f"{prefix}{name}" in result]
