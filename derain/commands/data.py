"""List, verify and synthesize data sets."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from derain.data.layouts import LAYOUTS
from derain.data.name_matching import find_set_folders, pair_files
from derain.data.quickstart_photos import PHOTOS, write_photos
from derain.data.rain import PRESETS, Rain, synthesize
from derain.data.verify import Finding, verify
from derain.errors import DerainError

SHOWN = 10
"""Findings of one kind in one set that the table shows; the JSON has all."""

STYLE = {"error": "red", "warning": "yellow", "note": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands."""
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    listing = commands.add_parser("list", help="the sets, their sizes, where to get them and which are here")
    listing.add_argument("--root", type=Path, help="folder that holds the sets (default $DERAIN_DATA)")
    listing.add_argument("--json", action="store_true", help="for programs")
    check = commands.add_parser("verify", help="broken files, mismatched pairs, duplicates, train/test leaks")
    check.add_argument("root", type=Path, help="a set, or a folder that holds several")
    check.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="ROOT2", help="sets to share nothing with"
    )
    check.add_argument("--layout", help="layout of the set, if it shall not be detected (see derain data list)")
    check.add_argument("--json", action="store_true", help="a list of findings with kind, files, detail")
    rain = commands.add_parser("synthesize", help="rain for clean photos: a paired set and a contact sheet")
    rain.add_argument("clean", type=Path, help="folder of clean photos")
    rain.add_argument("out", type=Path, help="folder of the set")
    rain.add_argument("--preset", choices=list(PRESETS), default="medium")
    rain.add_argument("--seed", type=int, default=0)
    rain.add_argument("--per-image", type=int, default=1, help="rainy images for each clean one")
    rain.add_argument("--overwrite", action="store_true", help="replace a set made before")
    for part in dataclasses.fields(Rain):
        low, high = part.metadata["limits"]
        told = f"{part.metadata['help']}, {low} to {high}; two numbers: drawn between them for each image"
        rain.add_argument(f"--{part.name}", type=part.type, nargs="+", metavar="X", help=told)
    licences = "; ".join(f"{photo.file} by {photo.author}, {photo.licence} ({photo.split})" for photo in PHOTOS)
    photos = commands.add_parser(
        "photos",
        help="write the freely licensed photos of the quickstart",
        description=f"Writes the photos that scikit-image ships and the quickstart uses: {licences}.",
    )
    photos.add_argument("out", type=Path)


def run(args: argparse.Namespace) -> int:
    """Runs a subcommand; ``verify`` gives 1 when something is wrong."""
    if args.task == "list":
        return list_sets(args.root, as_json=args.json)
    if args.task == "verify":
        return report(args)
    if args.task == "photos":
        print(f"{len(write_photos(args.out))} photos: {args.out}")
        return 0
    return rain_on(args)


def list_sets(root: Path | None, *, as_json: bool) -> int:
    """Prints the sets and which of them are below the data root."""
    if root is None and os.environ.get("DERAIN_DATA"):
        root = Path(os.environ["DERAIN_DATA"])
    told: list[dict[str, Any]] = [
        {
            "name": name,
            "title": layout.title,
            "counts": {**layout.counts},
            "files": {split: [str(files) for files in ways] for split, ways in layout.files.items()},
            "source": layout.source,
            "citation": layout.citation,
            "found": {} if root is None or not layout.folders else found(name, root),
        }
        for name, layout in LAYOUTS.items()
    ]
    if as_json:
        print(json.dumps(told, indent=2))
        return 0
    table = Table(title=Text(f"data sets{f' and what {root} has of them' if root else ''}"), title_justify="left")
    for column in ("set", "train", "test", "here", "what it is and where to get it"):
        table.add_column(column, justify="right" if column in {"train", "test"} else "left", overflow="fold")
    for one in told:
        counts, here = one["counts"], one["found"]
        table.add_row(
            one["name"],
            *(f"{counts[split]:,}" if split in counts else "" for split in ("train", "test")),
            "\n".join(f"{split} {count:,}" for split, count in here.items()),
            f"{one['title']}\n[dim]{one['source']}[/dim]" if one["source"] else one["title"],
        )
    console = Console()
    console.print(table)
    if root is None:
        console.print("Let DERAIN_DATA (or --root) name the folder that holds the sets, to see which are here.")
    console.print("Files and citations: derain data list --json", highlight=False)
    return 0


def found(name: str, root: Path) -> dict[str, int]:
    """Pairs of each split of a set below the data root."""
    for folder in find_set_folders(name, root):
        counts = {split: len(pair_files(name, split, folder).pairs) for split in LAYOUTS[name].files}
        if any(counts.values()):
            return {split: count for split, count in counts.items() if count}
    return {}


def report(args: argparse.Namespace) -> int:
    """Prints what is wrong with sets."""
    sets, findings = verify(place(args.root), against=[place(one) for one in args.against], layout=args.layout)
    wrong = [finding for finding in findings if finding.level == "error"]
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings], indent=2))
        return 1 if wrong else 0
    console = Console()
    for one in sets:
        console.print(Text(f"{one}: {len(one.files.pairs)} pairs in {one.root}"), soft_wrap=True)
    if findings:
        console.print(as_table(findings))
    counted = {level: sum(finding.level == level for finding in findings) for level in STYLE}
    verdict = "nothing is wrong" if not wrong else f"{counted['error']} found wrong"
    console.print(f"{verdict}; {counted['warning']} to look at, {counted['note']} good to know (all files: --json)")
    return 1 if wrong else 0


def place(told: Path) -> Path:
    """The folder that is meant: as told, or below the data root, where a set's name may stand for its folder."""
    root = os.environ.get("DERAIN_DATA")
    if told.exists() or not root or not Path(root).is_dir():
        return told
    name = next((name for name in LAYOUTS if name.lower() == str(told).lower() and LAYOUTS[name].folders), None)
    named = find_set_folders(name, Path(root)) if name else []
    return named[0] if named else told


def as_table(findings: Sequence[Finding]) -> Table:
    """One row a finding, of many of one kind in one set the first ten."""
    table = Table(show_lines=False)
    for column in ("", "kind", "set", "files", "what"):
        table.add_column(column, overflow="fold")
    counts: dict[tuple[str, str, str], int] = {}
    for finding in findings:
        kind = (finding.level, finding.kind, finding.set)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > SHOWN:
            continue
        names = [Path(file).name for file in finding.files]
        files = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        title = Text(finding.level, STYLE[finding.level])
        table.add_row(title, finding.kind, *(Text(text) for text in (finding.set, files, finding.detail)))
    for (level, named, of_set), count in counts.items():
        if count > SHOWN:
            table.add_row(level, named, Text(of_set), f"{count - SHOWN} more", "")
    return table


def rain_on(args: argparse.Namespace) -> int:
    """Synthesizes a set; photos that cannot be read are told at the end, with code 2."""
    lightest, heaviest = PRESETS[args.preset]
    for part in dataclasses.fields(Rain):
        given = getattr(args, part.name)
        if given is not None:
            if len(given) > 2:
                raise DerainError(f"--{part.name}: {len(given)} numbers; give one, or the least and the most")
            lightest = dataclasses.replace(lightest, **{part.name: given[0]})
            heaviest = dataclasses.replace(heaviest, **{part.name: given[-1]})
    options = {"per_image": args.per_image, "seed": args.seed, "overwrite": args.overwrite}
    broken = synthesize(args.clean, args.out, (lightest, heaviest), **options)
    print(f"rainy set: {args.out} (look at {args.out / 'contact_sheet.png'})")
    if broken:
        raise DerainError(f"{len(broken)} photos were left out: {'; '.join(broken)}")
    return 0
