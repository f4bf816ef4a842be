"""Items that ``make gpu`` measures: functions that yield the rows of a table, each run in a process of its own."""

import itertools
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import lightning
import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader

from benchmarks.gpu.measure import (
    BF16,
    COMPILED,
    FLOAT32,
    TF32,
    Setting,
    Work,
    measure,
    median_seconds,
    peak_gib,
    synchronize,
)
from derain.commands.restore import FileOptions, restore_video
from derain.methods import CLIPRPNModule, DACLIPSDEModule, DerainModule, PLNLINGANModule, PReNetModule, RestormerModule
from derain.methods.catalog import load, methods
from derain.restoration import Restorer
from derain.testing import make_batch

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "experiments/methods").glob("*.yaml") if not path.stem.endswith("-tiny"))
NEEDS_FILES = {
    "daclip": "captions and CLIP",
    "daclipsde": "CLIP; its network is that of irsde",
    "syn2real": "VGG16",
    "syn2real-gp": "VGG16",
    "transweather": "VGG16",
}
"""Recipes that are skipped, and the reason: files that they need, mostly from the internet."""

TINY = {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1}
QUICK_TESTS = "tests/data/test_rain_operators.py"
"""File with a test marked ``gpu`` that imports little."""
Row = dict[str, Any]


@dataclass
class Context:
    """Device, limits and notes of an item.

    Attributes:
        device: The device.
        quick: Whether sizes are tiny, to test the items.
        deadline: Value of ``time.perf_counter`` after which no further measurement begins.
        peaks: Result of the item ``device``, for rooflines, in bytes or operations per second; empty while that item
            itself runs.
        notes: Lines below the table, about skipped measurements and failed tests.
    """

    device: torch.device
    quick: bool
    deadline: float
    peaks: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def in_time(self, name: str) -> bool:
        """Return whether there is time left for a measurement; otherwise record that it is skipped."""
        if time.perf_counter() < self.deadline:
            return True
        self.skip(f"{name}: no time left")
        return False

    def skip(self, note: str) -> None:
        """Add a note about a skipped measurement, with the reason."""
        self.notes.append(f"not measured: {note}")


class Item(NamedTuple):
    """Part of the measurements.

    Attributes:
        name: Name, also of its JSON file.
        section: Section of the report.
        budget: Seconds after which the item is ended, unless sizes are tiny.
        run: Function that yields the rows of a table.
    """

    name: str
    section: str
    budget: float
    run: Callable[[Context], Iterator[Row]]


def device(context: Context) -> Iterator[Row]:
    """Measure the peaks of the device: copies within its memory, and matrix products."""
    side, count = (256, 2**20) if context.quick else (8192, 2**29)
    source = torch.ones(count, device=context.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = median_seconds(lambda: target.copy_(source), context.device)
    yield {"measurement": "copy", "value": 2 * source.nbytes / seconds / 1e9, "unit": "GB/s"}
    del source, target
    for setting in (FLOAT32, TF32, BF16):
        dtype = torch.bfloat16 if setting.bf16 else torch.float32
        matrix = torch.randn(side, side, device=context.device, dtype=dtype)
        with setting.applied():
            matrix @ matrix
            seconds = median_seconds(partial(torch.mm, matrix, matrix), context.device)
        yield {"measurement": setting.name, "value": 2 * side**3 / seconds / 1e12, "unit": "TFLOP/s"}


def tests(context: Context) -> Iterator[Row]:
    """Run the tests marked ``gpu``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "--junit-xml", str(report)]
        result = subprocess.run([*command, QUICK_TESTS if context.quick else "tests"], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in cases:
        outcome = next((outcomes[child.tag] for child in case if child.tag in outcomes), "passed")
        counts[outcome] += 1
        if outcome == "failed":
            context.notes.append(f"failed: {case.get('classname')}::{case.get('name')}")
    if result.returncode not in {0, 1}:
        raise RuntimeError(f"pytest ended with exit code {result.returncode}")
    yield counts


def photo_methods(quick: bool) -> dict[str, Callable[[], DerainModule]]:
    """Return functions that build the methods that restore photos; all but the bundled model have random weights."""
    builds: dict[str, Callable[[], Any]] = {
        "bundled model": lambda: load("default").module,
        "Restormer": lambda: RestormerModule(**(TINY if quick else {})),
    }
    if not quick:
        builds |= {
            "PReNet": PReNetModule,
            "CLIP-RPN, one route": lambda: CLIPRPNModule(perception="none"),
            "PLNLIN-MCDDL": PLNLINGANModule,
            "IR-SDE": lambda: DACLIPSDEModule(contexts="none", multipliers=(2, 4, 8, 16)),
        }
    return builds


def photo(context: Context, *, height: int, width: int, names: tuple[str, ...] = ()) -> Iterator[Row]:
    """Restore a photo in main memory by ``Restorer``, in tiles if the device needs them; IR-SDE makes ten steps."""
    if context.quick:
        height, width = 24, 40
    image = torch.rand(3, height, width)
    builds = photo_methods(context.quick)
    for name in names or builds:
        for setting in (FLOAT32, TF32, BF16):
            if name in builds and context.in_time(f"{name}, {setting.name}"):
                restorer = Restorer(builds[name](), device=str(context.device), precision=setting.precision)
                row, _ = measure(partial(restorer, image), context.device, setting, context.peaks)
                megapixels = height * width / 1e6 / row["seconds"]
                yield {"method": name, "arithmetic": setting.name, **row, "megapixels/s": megapixels}


def forward(
    context: Context,
    method: DerainModule,
    setting: Setting,
    batch: int,
    side: int,
    memory_format: torch.memory_format = torch.channels_last,
) -> Callable[[], Any]:
    """Return a function that restores a batch on the device."""
    rainy = torch.rand(batch, 3, side, side, device=context.device).contiguous(memory_format=memory_format)

    @torch.inference_mode()
    def run() -> Any:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=setting.bf16):
            return method.pass_once(rainy)

    return run


def batches(context: Context) -> Iterator[Row]:
    """Restore batches of images of 256×256 that are on the device."""
    side, counts = (16, (1, 2)) if context.quick else (256, (1, 4, 16, 64))
    for name, build in itertools.islice(photo_methods(context.quick).items(), 2):
        method = build().to(context.device).eval()
        for batch, setting in itertools.product(counts, (TF32, BF16)):
            if context.in_time(f"{name}, {batch} images, {setting.name}"):
                run = forward(context, method, setting, batch, side)
                row, _ = measure(run, context.device, setting, context.peaks)
                images = batch / row["seconds"]
                yield {"method": name, "batch": batch, "arithmetic": setting.name, **row, "images/s": images}


def compiled(context: Context, *, name: str) -> Iterator[Row]:
    """Compare a compiled network with one that is not compiled, on a batch of four images of 256×256."""
    batch, side = (1, 16) if context.quick else (4, 256)
    method = photo_methods(context.quick)[name]().to(context.device).eval()
    row, work = measure(forward(context, method, BF16, batch, side), context.device, BF16, context.peaks)
    yield {"method": name, "arithmetic": BF16.name, **row, "first call (s)": None}
    method.network.compile(backend="eager" if context.quick else "inductor")
    row, _ = measure(forward(context, method, COMPILED, batch, side), context.device, COMPILED, context.peaks, work)
    yield {"method": name, "arithmetic": COMPILED.name, **row}


def channels_last(context: Context) -> Iterator[Row]:
    """Compare the channels-last memory format with PyTorch's default, on a batch of four images of 256×256."""
    batch, side = (1, 16) if context.quick else (4, 256)
    method = photo_methods(context.quick)["bundled model"]().to(context.device).eval()
    formats = {"default": torch.contiguous_format, "channels last": torch.channels_last}
    for name, memory_format in formats.items():
        method.to(memory_format=memory_format)
        run = forward(context, method, BF16, batch, side, memory_format)
        row, _ = measure(run, context.device, BF16, context.peaks)
        yield {"method": "bundled model", "arithmetic": BF16.name, "memory format": name, **row}


def fused_optimizer(context: Context) -> Iterator[Row]:
    """Compare steps of PyTorch's fused AdamW with those of its default, for the weights of Restormer."""
    method = photo_methods(context.quick)["Restormer"]().to(context.device)
    for parameter in method.parameters():
        parameter.grad = torch.randn_like(parameter)
    for name, options in {"AdamW": {}, "AdamW, fused": {"fused": True}}.items():
        optimizer = torch.optim.AdamW(method.parameters(), **options)
        optimizer.step()  # allocates its state
        seconds = median_seconds(optimizer.step, context.device)
        yield {"method": "Restormer", "optimizer": name, "seconds": seconds}


class Steps(lightning.Callback):
    """Times training steps after a warm-up, and counts the work of the last step of the warm-up."""

    def __init__(self, device: torch.device, warm_up: int) -> None:
        self.device, self.warm_up, self.work, self.times = device, warm_up, Work(), []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up - 1:
            self.work.__enter__()
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        synchronize(self.device)
        if batch_idx == self.warm_up - 1:
            self.work.__exit__(None, None, None)
            peak_gib(self.device)
        elif batch_idx >= self.warm_up:
            self.times.append(time.perf_counter() - self.start)


def training(context: Context, *, recipe: Path) -> Iterator[Row]:
    """Time training steps of a recipe, with its network, loss, optimiser, batch size, crop size and precision."""
    if recipe.stem in NEEDS_FILES:
        context.skip(f"{recipe.stem}: needs {NEEDS_FILES[recipe.stem]}")
        return
    tiny = recipe.with_stem(f"{recipe.stem}-tiny")
    if context.quick and not tiny.is_file():
        context.skip(f"{recipe.stem}: there is no {tiny.name}")
        return
    config = yaml.safe_load((tiny if context.quick else recipe).read_text(encoding="utf-8"))
    options = config["model"].get("init_args") or {}
    if config["model"]["class_path"] == "CLIPRPNModule":
        options = options | {"perception": "fixed"}  # without CLIP, whose files may be missing
        context.skip("cliprpn: CLIP itself, which chooses the route of an image")
    classes = {method.__name__: method for method in methods()}
    method = classes[config["model"]["class_path"]](**options)
    data, trainer_options = config.get("data") or {}, config.get("trainer") or {}
    crop, batch_size = (32, 1) if context.quick else (data.get("crop", 128), data.get("batch_size", 8))
    warm_up, count = (1, 1) if context.quick else (3, 12)
    precision = trainer_options.get("precision", 32)
    steps = Steps(context.device, warm_up)
    trainer = lightning.Trainer(
        accelerator="gpu" if context.device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        gradient_clip_val=trainer_options.get("gradient_clip_val"),
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [make_batch(batch_size, crop, crop)] * (warm_up + count)
    with TF32.applied():
        trainer.fit(method, DataLoader(batches, batch_size=None, pin_memory=context.device.type == "cuda"))
    seconds = float(np.mean(steps.times))  # steps differ: a discriminator is trained in some only
    yield {
        "recipe": recipe.stem,
        "batch": f"{batch_size}×{crop}×{crop}",
        "precision": str(precision),
        "seconds": seconds,
        "images/s": batch_size / seconds,
        "share of roofline": steps.work.least_seconds(context.peaks, TF32) / seconds,
        "peak GiB": peak_gib(context.device),
    }


def video(context: Context) -> Iterator[Row]:
    """Restore a video of 1920×1080 by the bundled model, with decoding and encoding."""
    height, width, frames = (32, 48, 2) if context.quick else (1080, 1920, 48)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.mp4"
        with av.open(str(source), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            scene = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(np.roll(scene, 4 * index, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        for setting in (TF32, BF16):
            if not context.in_time(setting.name):
                continue
            restorer = Restorer(device=str(context.device), precision=setting.precision)
            restorer(torch.rand(3, height, width))
            peak_gib(context.device)
            start = time.perf_counter()
            with setting.applied():
                restore_video(restorer, source, Path(folder) / f"{setting.name}.mp4", FileOptions())
            seconds = time.perf_counter() - start
            yield {"arithmetic": setting.name, "frames/s": frames / seconds, "peak GiB": peak_gib(context.device)}


LARGE = ("bundled model", "Restormer", "PReNet")
ITEMS = [
    Item("device", "Peaks of the device", 40, device),
    Item("tests", "Tests marked gpu", 120, tests),
    Item("photo-481x321", "Photos of 481×321", 60, partial(photo, height=321, width=481)),
    Item("photo-1080p", "Photos of 1920×1080", 60, partial(photo, height=1080, width=1920)),
    Item("photo-24mp", "Photos of 6000×4000", 80, partial(photo, height=4000, width=6000, names=LARGE)),
    Item("batches", "Batches of 256×256", 40, batches),
    Item("video", "Video of 1920×1080, bundled model", 50, video),
    Item("compiled-bundled", "Compiled, 4 images of 256×256", 60, partial(compiled, name="bundled model")),
    Item("compiled-restormer", "Compiled, 4 images of 256×256", 100, partial(compiled, name="Restormer")),
    Item("channels-last", "Channels last, 4 images of 256×256", 30, channels_last),
    Item("fused-adamw", "Steps of AdamW, Restormer", 20, fused_optimizer),
    *(Item(f"training-{path.stem}", "Training steps", 40, partial(training, recipe=path)) for path in RECIPES),
]


def run_item(item: Item, context: Context, environment: Mapping[str, Any], path: Path) -> None:
    """Run an item and write its JSON file."""
    start = time.perf_counter()
    rows = list(item.run(context))
    content = {
        "item": item.name,
        "environment": dict(environment),
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "notes": context.notes,
    }
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
