"""What ``derain test`` leaves behind: every image's score, a summary to cite, one table to read."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from derain.callbacks.parts import image_count
from derain.images import ESCAPED, write_whole
from derain.methods import DerainModule
from derain.methods.weights import locate, sha256
from derain.metrics import Scores, bootstrap_interval


class TestResults(Callback):
    """Writes ``images.csv`` and ``summary.json`` into the folder of the run and prints a table.

    Args:
        weights: File of weights that is tested, if not a checkpoint that the trainer loads.
        commit: Commit that the results belong to.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    def __init__(self, weights: str | None = None, commit: str | None = None) -> None:
        self.weights, self.commit = weights, commit

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Times every call of the method: restoring alone, neither reading nor judging."""
        self._spent, self._images = 0.0, 0

        def now() -> float:
            if pl_module.device.type != "cpu":
                torch.accelerator.synchronize(pl_module.device)
            return time.perf_counter()

        def before(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self._began = now()

        def after(module: Any, inputs: tuple[torch.Tensor, ...], out: Any) -> None:
            self._spent += now() - self._began
            self._images += len(inputs[0])

        self._clocks = [pl_module.register_forward_pre_hook(before), pl_module.register_forward_hook(after)]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes on rank 0; the scores were gathered from all ranks."""
        for clock in self._clocks:
            clock.remove()
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
            "method": module.describe(),
            "sampling": dataclasses.asdict(module.sampling) if module.sampling else None,
            "lpips_net": module.lpips and module.lpips.net,
            "weights": {"file": str(file), "sha256": sha256(locate(file))} if file else None,
            "data": {
                "sets": data.sets["test"],
                "images": len(evaluated),
                "images_in_sets": len(names),
                "fingerprint": data.fingerprint("test", evaluated),
            },
            "results": results(module.scores),
            "seconds": self._spent / max(self._images, 1),
            "commit": self.commit,
            "versions": {p: importlib.metadata.version(p) for p in ("derain", "torch", "lightning", "torchmetrics")},
            "hardware": hardware(trainer),
        }
        with write_whole(folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        print_table(summary)
        print(f"per image: {folder / 'images.csv'}\nsummary:   {folder / 'summary.json'}")


def image_rows(scores: dict[str, dict[str, Scores]], names: list[str]) -> Iterator[dict[str, Any]]:
    """One row an image and protocol."""
    for protocol, derained in scores["derained"].items():
        rainy = scores["rainy"][protocol]
        for place, index in enumerate(derained.index.tolist()):
            yield {
                "name": names[index],
                "protocol": protocol,
                "psnr": derained.psnr[place].item(),
                "ssim": derained.ssim[place].item(),
                "rainy_psnr": rainy.psnr[place].item(),
                "rainy_ssim": rainy.ssim[place].item(),
                **({} if derained.lpips is None else {"lpips": derained.lpips[place].item()}),
                **({} if rainy.lpips is None else {"rainy_lpips": rainy.lpips[place].item()}),
            }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file whole or not at all."""
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=ESCAPED) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def results(scores: dict[str, dict[str, Scores]]) -> list[dict[str, Any]]:
    """Means of images and 95 % bootstrap intervals, one entry a protocol."""
    told = []
    for protocol, derained in scores["derained"].items():
        rainy = scores["rainy"][protocol]
        told.append(
            {
                "protocol": protocol,
                "count": len(derained.index),
                "psnr": derained.psnr.mean().item(),
                "psnr_interval": list(bootstrap_interval(derained.psnr)),
                "ssim": derained.ssim.mean().item(),
                "ssim_interval": list(bootstrap_interval(derained.ssim)),
                "rainy_psnr": rainy.psnr.mean().item(),
                "rainy_ssim": rainy.ssim.mean().item(),
                **({} if derained.lpips is None else {"lpips": derained.lpips.mean().item()}),
                **({} if rainy.lpips is None else {"rainy_lpips": rainy.lpips.mean().item()}),
            }
        )
    return told


def hardware(trainer: Trainer) -> dict[str, Any]:
    """What the test ran on."""
    device = trainer.strategy.root_device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def print_table(summary: dict[str, Any]) -> None:
    """Prints derained against rainy, protocol by protocol."""
    sets = summary["data"]["sets"]
    table = Table(
        title=f"{summary['method']['method']} on {sets if isinstance(sets, str) else ' + '.join(sets)}, "
        f"{image_count(summary['data']['images'], summary['data']['images_in_sets'])}{_how(summary)}",
        title_justify="left",
    )
    for column, justify in {
        "protocol": "left",
        "rainy": "right",
        "derained": "right",
        "95 % interval": "right",
    }.items():
        table.add_column(column, justify=cast(Any, justify))
    for row in summary["results"]:
        low, high = row["psnr_interval"]
        table.add_row(
            row["protocol"],
            *(
                f"{row[f'{kind}psnr']:.3f} dB / {row[f'{kind}ssim']:.4f}"
                + (f" / {row[f'{kind}lpips']:.4f}" if "lpips" in row else "")
                for kind in ("rainy_", "")
            ),
            f"{low:.2f} – {high:.2f} dB",
        )
    Console().print(table)


def _how(summary: dict[str, Any]) -> str:
    """How the images were sampled, and that LPIPS comes last, for the title."""
    sampling, lpips = summary["sampling"], summary["lpips_net"]
    told = f", {sampling['solver']}, {sampling['steps'] or 'all'} steps, seed {sampling['seed']}" if sampling else ""
    return told + (f", PSNR / SSIM / LPIPS ({lpips})" if lpips else "")
