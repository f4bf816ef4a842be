"""Count the images for which CLIP selects each route of CLIP-RPN."""

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

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
from derain.images import ESCAPED, Pixels, read_rgb, write_image, write_whole
from derain.listing import image_files
from derain.methods.cliprpn.perception import RainPerception, scores
from derain.methods.cliprpn.prompts import PROMPTS, texts_of
from derain.pictures import contact_sheet
from derain.progress import track
from derain.restoration import choose_device

PAPER_SETS = {"Rain800": "Rain800", "RainTrainH": "Rain100H", "RainTrainH-full": "Rain100H", "RainTrainL": "Rain100L"}
"""Names in CLIP-RPN's paper of the training sets whose routes it counts, by layout."""

SHEET_IMAGES, SHEET_COLUMNS = 24, 6
"""Maximum number of images on a contact sheet, and maximum number in one of its rows."""


def route(
    sets: Sequence[str],
    *,
    prompts: str = "3",
    clip: str = "openai/clip-vit-base-patch32",
    similarity: Literal["cosine", "dot"] = "cosine",
    split: Literal["train", "test"] = "train",
    root: Path | None = None,
    out: Path = Path("runs/route"),
    device: str = "auto",
    format: Literal["table", "json"] = "table",
) -> int:
    """Count the images on each route of CLIP-RPN; save their scores, and a contact sheet of each route that has images.

    Args:
        sets: Names or folders of data sets, or folders with images.
        prompts: Prompt set (1, 2, 2-long, 3, 3-distortion, rain, intensity), or a YAML file with one text per route.
        clip: CLIP model on the Hugging Face hub or in a folder.
        similarity: Similarity of images and prompts; dot does not normalise the features.
        split: Split of the data sets.
        root: Folder with data sets (default: $DERAIN_DATA).
        out: Folder for routes.csv, summary.json and the contact sheets.
        device: Device: auto, cpu, cuda, cuda:N or mps.
        format: Format of the printed counts.

    Raises:
        DerainError: If a set has no images, an image cannot be read, or the prompts or CLIP cannot be loaded.
    """
    texts = read_prompts(prompts)
    chosen_device = choose_device(device)
    pair_sets = [find_images(name, split, root) for name in sets]
    for pair_set in pair_sets:
        for note in pair_set.notes:
            print(f"{pair_set.name}: {note}", file=sys.stderr)
    pairs = [pair for pair_set in pair_sets for pair in pair_set.pairs]
    perception = RainPerception(clip, texts, similarity)
    images = track(map(read_rainy, pairs), "Computing CLIP similarities", len(pairs))
    similarities = perception.all_similarities(images, chosen_device)
    summary = {
        "prompts": {"set": prompts, "texts": texts},
        "clip": {"name": perception.clip.name, "sha256": perception.clip.sha256},
        "similarity": similarity,
        "sets": count_routes(pair_sets, similarities.argmax(1).tolist(), prompts, len(texts)),
    }
    write_files(out, pair_sets, similarities, summary)
    if format == "json":
        print(json.dumps(summary, indent=2))
    else:
        print_table(summary)
    print(f"scores of each image, summary and contact sheets: {out}", file=sys.stderr)
    return 0


# Inputs.


def read_prompts(name: str) -> tuple[str, ...]:
    """Return the prompts of a set, or of a YAML file with a list of texts.

    Args:
        name: Name of a prompt set, or path of a YAML file.

    Raises:
        DerainError: If there is no such set or file, or the file is not a YAML list of at least two different texts.
    """
    if name in PROMPTS:
        return texts_of(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DerainError(f"--prompts {name}: expected a prompt set ({', '.join(PROMPTS)}) or a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DerainError(
            f"--prompts {path}: not YAML ({' '.join(str(error).split())}); expected a list with one text per route"
        ) from error
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise DerainError(f"--prompts {path}: expected a YAML list with one text per route (lines '- text')")
    return texts_of(content)


def find_images(name: str, split: Split, root: Path | None = None) -> PairSet:
    """Return the pairs of one split of a data set, or all images of a folder that is not a data set.

    Args:
        name: Name or folder of a data set, or a folder with images.
        split: Split of the data set; ignored for a folder that is not a data set.
        root: Folder with data sets; ``$DERAIN_DATA`` by default.

    Raises:
        DerainError: If there are no images, or the data set does not have the split.
    """
    folder = Path(name).expanduser()
    try:
        return find_pairs(name, split, data_root=root)
    except DerainError:
        files = image_files(folder, recursive=True) if folder.is_dir() else []
        if not files or _is_data_set(folder):
            raise
    pairs = tuple(Pair(file.relative_to(folder).as_posix(), file) for file in files)
    notes = ("not a data set; all images of the folder",)
    return PairSet(folder.resolve().name, "images", "predict", folder, pairs, notes)


def _is_data_set(folder: Path) -> bool:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        with suppress(DerainError):
            detect_layout(folder, split)
            return True
    return detect_layout(folder, "predict")[0] != "images"


def read_rainy(pair: Pair) -> Pixels:
    """Read the rainy image of a pair, ``(h, w, 3)`` in 0 to 255, without reading a separate clean file."""
    return read_rgb(pair.rainy) if pair.clean_side is None else pair.read()[0]


# Outputs.


def count_routes(
    sets: Sequence[PairSet], routes: Sequence[int], prompts: str, route_count: int
) -> list[dict[str, Any]]:
    """Count the images on each route in each set, and in all sets together if there are several.

    Args:
        sets: Data sets.
        routes: Route of each image, in the order of the sets and their pairs.
        prompts: Name of the prompt set, or file of the prompts.
        route_count: Number of routes.

    Returns:
        One entry per set: its name and origin, the number of ``images``, ``counts`` by route, and ``paper``: the counts
        by route in CLIP-RPN's paper, or None if it has none for this set and these prompts, or counted another number
        of images. The entry of all sets together has no origin.
    """
    entries: list[dict[str, Any]] = []
    start = 0
    for pair_set in sets:
        set_routes = routes[start : start + len(pair_set.pairs)]
        start += len(pair_set.pairs)
        entries.append(
            {
                "set": pair_set.name,
                "layout": pair_set.layout,
                "split": pair_set.split,
                "root": str(pair_set.root),
                "images": len(set_routes),
                "counts": [set_routes.count(index) for index in range(route_count)],
                "paper": _paper_counts(pair_set, prompts),
            }
        )
    if len(entries) > 1:
        papers = [entry["paper"] for entry in entries]
        entries.append(
            {
                "set": "all",
                "images": len(routes),
                "counts": _sum_columns([entry["counts"] for entry in entries]),
                "paper": None if None in papers else _sum_columns(papers),
            }
        )
    return entries


def _paper_counts(pair_set: PairSet, prompts: str) -> list[int] | None:
    """Return the counts in CLIP-RPN's paper; None if it has none or counted another number of images."""
    if prompts not in PROMPTS or pair_set.layout not in PAPER_SETS or pair_set.split != "train":
        return None
    counts = PROMPTS[prompts].counts[PAPER_SETS[pair_set.layout]]
    return list(counts) if sum(counts) == len(pair_set.pairs) else None


def _sum_columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def write_files(folder: Path, sets: Sequence[PairSet], similarities: Tensor, summary: dict[str, Any]) -> None:
    """Write ``routes.csv``, ``summary.json`` and contact sheets ``route-N.png``; delete earlier contact sheets.

    Args:
        folder: Folder for the files.
        sets: Data sets.
        similarities: ``(images, prompts)``: similarity of each image, in the order of the sets and their pairs, to each
            prompt.
        summary: Content of ``summary.json``.
    """
    image_scores = scores(similarities)
    named_pairs = [(pair_set.name, pair) for pair_set in sets for pair in pair_set.pairs]
    routes = similarities.argmax(1).tolist()
    _write_csv(folder / "routes.csv", named_pairs, routes, similarities, image_scores)
    with write_whole(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("route-[0-9]*.png"):
        file.unlink()
    largest = image_scores.topk(2, dim=1).values
    margins = (largest[:, 0] - largest[:, 1]).tolist()
    ranked_pairs: dict[int, list[tuple[float, Pair]]] = {}
    for margin, (_, pair), image_route in zip(margins, named_pairs, routes, strict=True):
        ranked_pairs.setdefault(image_route, []).append((margin, pair))
    for image_route, route_pairs in ranked_pairs.items():
        route_pairs.sort(key=lambda ranked: ranked[0], reverse=True)
        write_image(folder / f"route-{image_route}.png", route_sheet(route_pairs))


def _write_csv(
    path: Path,
    named_pairs: Sequence[tuple[str, Pair]],
    routes: Sequence[int],
    similarities: Tensor,
    image_scores: Tensor,
) -> None:
    with (
        write_whole(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors=ESCAPED) as file,
    ):
        writer = csv.writer(file)
        indices = range(similarities.shape[1])
        columns = [*(f"similarity_{index}" for index in indices), *(f"score_{index}" for index in indices)]
        writer.writerow(["set", "image", "route", *columns])
        rows = zip(named_pairs, routes, similarities.tolist(), image_scores.tolist(), strict=True)
        for (set_name, pair), image_route, similarity_row, score_row in rows:
            writer.writerow([set_name, pair.name, image_route, *similarity_row, *score_row])


def route_sheet(ranked_pairs: Sequence[tuple[float, Pair]]) -> Image.Image:
    """Return a contact sheet of at most ``SHEET_IMAGES`` images, evenly spaced in the list.

    Args:
        ranked_pairs: Margin and pair of each image; the margin is the difference between its two largest scores.
    """
    indices = np.linspace(0, len(ranked_pairs) - 1, min(SHEET_IMAGES, len(ranked_pairs))).round().astype(int)
    selected = [ranked_pairs[index] for index in indices]
    strips = []
    for start in range(0, len(selected), SHEET_COLUMNS):
        row = selected[start : start + SHEET_COLUMNS]
        labels = [f"{pair.name}\n{margin:+.4f}" for margin, pair in row]
        strips.append(contact_sheet([[read_rainy(pair) for _, pair in row]], column_labels=labels))
    if len(strips) == 1:
        return strips[0]
    return contact_sheet([[np.asarray(strip)] for strip in strips], cell=max(max(strip.size) for strip in strips))


def print_table(summary: dict[str, Any]) -> None:
    """Print a row of counts for each set, followed by a row of the paper's counts if there are any; then the prompts.

    Args:
        summary: Content of ``summary.json``.
    """
    texts = summary["prompts"]["texts"]
    table = Table("set", title=f"prompts {summary['prompts']['set']}, {summary['clip']['name']}", title_justify="left")
    for column in ("images", *(f"route {index}" for index in range(len(texts)))):
        table.add_column(column, justify="right")
    for entry in summary["sets"]:
        table.add_row(*_table_row(entry["set"], entry["images"], entry["counts"]))
        if entry["paper"]:
            table.add_row(*_table_row("  paper", entry["images"], entry["paper"]), style="dim")
    console = Console()
    console.print(table)
    for index, text in enumerate(texts):
        console.print(Text(f"route {index}: {text}"))


def _table_row(name: str, image_count: int, counts: Sequence[int]) -> list[Text]:
    return [Text(name), Text(f"{image_count:,}"), *(Text(f"{count:,} ({count / image_count:.2%})") for count in counts)]
