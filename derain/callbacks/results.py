"""Results of ``derain test``: scores of every image, a summary and a table."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
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
from derain.tables import Column, Row, Table

PACKAGES = ("derain", "torch", "lightning", "torchmetrics")
"""Packages whose versions the summary contains."""


class TestResults(Callback):
    """Save ``images.csv`` and ``summary.json`` to ``trainer.default_root_dir``, and print a table.

    In the summary, ``seconds`` is the mean time of restoration per image on rank 0, ``batch_size`` the maximum number
    of images that were restored at once, and ``tile`` the side of tiles.

    Args:
        restoration: Callback that restores the images.
        weights: Weights that are tested, as the user named them; None for a checkpoint that the trainer loads.
        commit: Git commit of derain, for the summary; None: unknown.
    """

    __test__ = False  # pytest would collect the class

    def __init__(self, restoration: BatchedRestoration, weights: str | None = None, commit: str | None = None) -> None:
        self.restoration, self.weights, self.commit = restoration, weights, commit

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and print the scores of all ranks on rank 0."""
        if not trainer.is_global_zero:
            return
        module = cast(DerainModule, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(trainer.default_root_dir)
        names = [pair.name for pair in data.pairs["test"]]
        evaluated = sorted(next(iter(module.scores["derained"].values())).index.tolist())
        write_rows(folder / "images.csv", list(image_rows(module.scores, names)))
        file = self.weights or trainer.ckpt_path
        summary = {
            "method": module.metadata(),
            "sampling": dataclasses.asdict(module.sampling) if isinstance(module, Sampled) else None,
            "lpips_net": module.lpips and module.lpips.net,
            "weights": {"file": str(file), "sha256": sha256(locate(file))} if file else None,
            "data": {
                "sets": data.sets["test"],
                "images": len(evaluated),
                "images_in_sets": len(names),
                "fingerprint": data.fingerprint("test", evaluated),
            },
            "results": results(module.scores),
            "seconds": self.restoration.seconds / max(self.restoration.images, 1),
            "batch_size": evaluation_batch_size(data.eval_batch_size, "test", trainer),
            "tile": self.restoration.tile,
            "commit": self.commit,
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
            "hardware": hardware(trainer),
        }
        with write_whole(folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        print_table(summary)
        print(f"per image: {folder / 'images.csv'}\nsummary:   {folder / 'summary.json'}")


def image_rows(scores: dict[str, dict[str, Scores]], names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one row per image and protocol, with the columns of ``images.csv``.

    Args:
        scores: Scores by kind (``rainy`` and ``derained``) and protocol.
        names: Names of all images in the data set, in the order that the indices of the scores refer to.
    """
    for protocol, derained in scores["derained"].items():
        rainy = scores["rainy"][protocol]
        for row, index in enumerate(derained.index.tolist()):
            values = {
                "name": names[index],
                "protocol": protocol,
                "psnr": derained.psnr[row].item(),
                "ssim": derained.ssim[row].item(),
                "rainy_psnr": rainy.psnr[row].item(),
                "rainy_ssim": rainy.ssim[row].item(),
            }
            if derained.lpips is not None:
                values["lpips"] = derained.lpips[row].item()
            if rainy.lpips is not None:
                values["rainy_lpips"] = rainy.lpips[row].item()
            yield values


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with equal keys to a CSV file, completely or not at all; there must be at least one row."""
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=ESCAPED) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def results(scores: dict[str, dict[str, Scores]]) -> list[dict[str, Any]]:
    """Return means over the images with 95 % bootstrap intervals, one entry per protocol.

    Args:
        scores: Scores by kind (``rainy`` and ``derained``) and protocol.
    """
    entries = []
    for protocol, derained in scores["derained"].items():
        rainy = scores["rainy"][protocol]
        entry = {
            "protocol": protocol,
            "count": len(derained.index),
            "psnr": derained.psnr.mean().item(),
            "psnr_interval": list(bootstrap_interval(derained.psnr)),
            "ssim": derained.ssim.mean().item(),
            "ssim_interval": list(bootstrap_interval(derained.ssim)),
            "rainy_psnr": rainy.psnr.mean().item(),
            "rainy_ssim": rainy.ssim.mean().item(),
        }
        if derained.lpips is not None:
            entry["lpips"] = derained.lpips.mean().item()
        if rainy.lpips is not None:
            entry["rainy_lpips"] = rainy.lpips.mean().item()
        entries.append(entry)
    return entries


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Return the device, CPU cores, number of devices and precision of a test, for the summary."""
    device = trainer.strategy.root_device
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device; otherwise that of the processor, with the device type unless it is the CPU."""
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


def print_table(summary: dict[str, Any]) -> None:
    """Print the scores of rainy and derained images, one row per protocol."""
    columns = [Column("protocol", align="left")]
    for kind in ("rainy", "derained"):
        columns += [Column("PSNR (dB)", ".3f", group=kind), Column("SSIM", ".4f", group=kind)]
        if summary["lpips_net"]:
            columns.append(Column(f"LPIPS ({summary['lpips_net']})", ".4f", group=kind))
    columns.append(Column("95 % interval (dB)"))
    rows = []
    for result in summary["results"]:
        low, high = result["psnr_interval"]
        scores = [*_scores(result, "rainy_"), *_scores(result, "")]
        rows.append(Row([result["protocol"], *scores, f"{low:.2f} – {high:.2f}"]))
    print(Table(columns, rows, title=_title(summary)).text(terminal=sys.stdout.isatty()), end="")


def _title(summary: dict[str, Any]) -> str:
    """Return the title of the table: method, data sets, number of images and sampling."""
    data, sampling = summary["data"], summary["sampling"]
    sets = data["sets"] if isinstance(data["sets"], str) else " + ".join(data["sets"])
    title = f"{summary['method']['method']} on {sets}, {image_count(data['images'], data['images_in_sets'])}"
    if sampling:
        title += f", {sampling['solver']}, {sampling['steps'] or 'all'} steps, seed {sampling['seed']}"
    return title


def _scores(result: dict[str, Any], prefix: str) -> list[float]:
    """Return PSNR, SSIM and, if it was computed, LPIPS; the prefix is ``rainy_`` or empty."""
    return [result[f"{prefix}{name}"] for name in ("psnr", "ssim", "lpips") if f"{prefix}{name}" in result]
