"""Tell which of CLIP-RPN's routes images take: counts by prompt, every image's scores, a contact sheet a route."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from derain.data.layouts import Split
from derain.data.pairs import Pair, PairSet, detect_layout, find_pairs
from derain.errors import DerainError
from derain.images import ESCAPED, Pixels, image_files, read_rgb, write_image, write_whole
from derain.methods.cliprpn.perception import RainPerception, scores
from derain.methods.cliprpn.prompts import PROMPTS, texts_of
from derain.pictures import contact_sheet
from derain.progress import track
from derain.restoration import choose_device

PAPER = {"Rain800": "Rain800", "RainTrainH": "Rain100H", "RainTrainH-full": "Rain100H", "RainTrainL": "Rain100L"}
"""What CLIP-RPN calls the training pairs of a layout."""

SHOWN, ACROSS = 24, 6
"""Images on a contact sheet, and in a row of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("sets", nargs="+", metavar="ROOT", help="a data set's name or folder, or a folder of images")
    parser.add_argument("--prompts", default="3", metavar="SET", help=f"{', '.join(PROMPTS)}, or a YAML list of texts")
    parser.add_argument(
        "--clip", default="openai/clip-vit-base-patch32", help="id on the Hugging Face hub, or a directory"
    )
    parser.add_argument("--similarity", choices=["cosine", "dot"], default="cosine")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="of data sets (default train)")
    parser.add_argument("--root", type=Path, help="folder that holds the sets (default $DERAIN_DATA)")
    parser.add_argument("--output", type=Path, default=Path("runs/route"), help="folder (default runs/route)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--format", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Perceives the images, prints the counts, writes ``routes.csv``, ``summary.json`` and the contact sheets."""
    texts = prompt_texts(args.prompts)
    device = choose_device(args.device)
    sets = [find_images(name, args.split, args.root) for name in args.sets]
    for one in sets:
        for note in one.notes:
            print(f"{one.name}: {note}", file=sys.stderr)
    pairs = [pair for one in sets for pair in one.pairs]
    perception = RainPerception(args.clip, texts, args.similarity)
    found = perception.all_similarities(track(map(rainy_image, pairs), "Perceiving rain", len(pairs)), device)
    routes = found.argmax(1).tolist()
    summary = {
        "prompts": {"set": args.prompts, "texts": texts},
        "clip": {"name": perception.clip.name, "sha256": perception.clip.sha256},
        "similarity": args.similarity,
        "sets": counted(sets, routes, args.prompts, len(texts)),
    }
    write(args.output, sets, found, summary)
    if args.format == "json":
        print(json.dumps(summary, indent=2))
    else:
        print_table(summary)
    print(f"every image, summary and contact sheets: {args.output}", file=sys.stderr)
    return 0


# What is given.


def prompt_texts(told: str) -> tuple[str, ...]:
    """The prompts of a set's name, or of a YAML file with a list of texts.

    Raises:
        DerainError: If it is neither, or holds no two different texts.
    """
    path = Path(told).expanduser()
    if told in PROMPTS:
        return texts_of(told)
    if not path.is_file():
        raise DerainError(f"--prompts {told}: neither a set ({', '.join(PROMPTS)}) nor a YAML file; check the name")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DerainError(f"--prompts {path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise DerainError(f"--prompts {path}: expected a list of texts, one a route; write each as a line '- text'")
    return texts_of(content)


def find_images(name: str, split: Split, root: Path | None = None) -> PairSet:
    """The images of a set's split, or all those of a folder that is no data set.

    Args:
        name: A set's name, its folder, or any folder of images.
        split: Of a data set.
        root: Folder that holds the sets.

    Raises:
        DerainError: If there are none, or a data set lacks the split.
    """
    folder = Path(name).expanduser()
    try:
        return find_pairs(name, split, data_root=root)
    except DerainError:
        files = image_files(folder, recursive=True) if folder.is_dir() else []
        if not files or _is_set(folder):
            raise
    pairs = tuple(Pair(file.relative_to(folder).as_posix(), file) for file in files)
    notes = ("no data set: all images of the folder",)
    return PairSet(folder.resolve().name, "images", "predict", folder, pairs, notes)


def _is_set(folder: Path) -> bool:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        with suppress(DerainError):
            detect_layout(folder, split)
            return True
    return detect_layout(folder, "predict")[0] != "images"


def rainy_image(pair: Pair) -> Pixels:
    """Reads the rainy image of a pair, and not the clean one if it is another file."""
    return read_rgb(pair.rainy) if pair.clean_side is None else pair.read()[0]


# What is told.


def counted(sets: Sequence[PairSet], routes: Sequence[int], prompts: str, number: int) -> list[dict[str, Any]]:
    """Images a route of every set, beside the paper's count where the set is the paper's; of several also the sum.

    Args:
        sets: The sets.
        routes: The route of each of their images, in order.
        prompts: As told; the paper counted for those that have a name.
        number: Of the routes.
    """
    told: list[dict[str, Any]] = []
    start = 0
    for one in sets:
        taken = routes[start : start + len(one.pairs)]
        start += len(one.pairs)
        paper = PROMPTS[prompts].counts[PAPER[one.layout]] if prompts in PROMPTS and one.layout in PAPER else ()
        told.append(
            {
                "set": one.name,
                "layout": one.layout,
                "split": one.split,
                "root": str(one.root),
                "images": len(taken),
                "counts": [taken.count(route) for route in range(number)],
                "paper": list(paper) if one.split == "train" and sum(paper) == len(taken) else None,
            }
        )
    if len(told) > 1:
        papers = [one["paper"] for one in told if one["paper"]]
        told.append(
            {
                "set": "all",
                "images": len(routes),
                "counts": [sum(column) for column in zip(*(one["counts"] for one in told), strict=True)],
                "paper": [sum(column) for column in zip(*papers, strict=True)] if len(papers) == len(told) else None,
            }
        )
    return told


def write(folder: Path, sets: Sequence[PairSet], similarities: Tensor, summary: dict[str, Any]) -> None:
    """Writes every image's route, the summary and the contact sheets, each file whole or not at all.

    Args:
        folder: Where to; the sheets of an earlier run are removed.
        sets: The sets.
        similarities: ``(n, m)``, of their images in order to the prompts.
        summary: What ``summary.json`` holds.
    """
    shares = scores(similarities)
    routes, number = similarities.argmax(1).tolist(), similarities.shape[1]
    images = [(one.name, pair) for one in sets for pair in one.pairs]
    with (
        write_whole(folder / "routes.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors=ESCAPED) as file,
    ):
        writer = csv.writer(file)
        columns = [f"{what}_{route}" for what in ("similarity", "score") for route in range(number)]
        writer.writerow(["set", "image", "route", *columns])
        for (name, pair), route, *values in zip(images, routes, similarities.tolist(), shares.tolist(), strict=True):
            writer.writerow([name, pair.name, route, *values[0], *values[1]])
    with write_whole(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for old in folder.glob("route-[0-9]*.png"):
        old.unlink()
    best = shares.topk(2, dim=1).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    for route in sorted(set(routes)):
        taken = [(margin, images[i][1]) for i, margin in enumerate(margins) if routes[i] == route]
        write_image(folder / f"route-{route}.png", sheet(sorted(taken, key=lambda one: one[0], reverse=True)))


def sheet(images: Sequence[tuple[float, Pair]]) -> Image.Image:
    """At most 24 images, evenly chosen, each under its name and the difference of its two largest scores."""
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)]
    strips = []
    for start in range(0, len(chosen), ACROSS):
        part = chosen[start : start + ACROSS]
        labels = [f"{pair.name}\n{margin:+.4f}" for margin, pair in part]
        strips.append(contact_sheet([[rainy_image(pair) for _, pair in part]], columns=labels))
    if len(strips) == 1:
        return strips[0]
    return contact_sheet([[np.asarray(strip)] for strip in strips], cell=max(max(strip.size) for strip in strips))


def print_table(summary: dict[str, Any]) -> None:
    """Prints images a route, with the paper's beneath."""
    texts = summary["prompts"]["texts"]
    table = Table("set", title=f"prompts {summary['prompts']['set']}, {summary['clip']['name']}", title_justify="left")
    for column in ("images", *(f"route {route}" for route in range(len(texts)))):
        table.add_column(column, justify="right")
    for one in summary["sets"]:
        for name, counts in ((one["set"], one["counts"]), ("  paper", one["paper"])):
            if counts:
                cells = [f"{count:,} ({count / one['images']:.2%})" for count in counts]
                table.add_row(Text(name), f"{one['images']:,}", *cells, style="dim" if counts is one["paper"] else "")
    console = Console()
    console.print(table)
    for route, text in enumerate(texts):
        console.print(Text(f"route {route}: {text}"))
