"""List, fetch, verify, synthesize and shard data sets; write the photos of the quickstart."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from derain import tables
from derain.commands.download_summary import print_download, print_form
from derain.data.fetch import plan_download, unpack_set
from derain.data.layouts import LAYOUTS, Layout, Split
from derain.data.name_matching import find_data_set_folders, pair_files
from derain.data.pairs import find_pairs
from derain.data.quickstart_photos import PHOTOS, write_photos
from derain.data.rain import PRESETS, synthesize
from derain.data.shard_writer import write_shards
from derain.data.sources import SOURCES, Form, Source, choose_source, find_name
from derain.data.verify import Finding, verify
from derain.errors import DerainError

MAX_ROWS = 10
"""Maximum number of findings of the same level, kind and set in the table; JSON has all findings."""

STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
"""Text styles of findings, by level."""


def list_sets(*, root: Path | None = None, format: Literal["table", "markdown", "json"] = "table") -> int:
    """List the known data sets, with their numbers of pairs and sources, and show which sets are on this machine.

    Args:
        root: Folder with data sets (default: $DERAIN_DATA).
        format: Output format; Markdown and JSON have the papers' protocols and known faults, JSON also file patterns
            and citations. Markdown does not show which sets are on this machine.

    Raises:
        DerainError: If the folder does not exist.
    """
    if root is None and os.environ.get("DERAIN_DATA"):
        root = Path(os.environ["DERAIN_DATA"])
    sets: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        sets.append(
            {
                "name": name,
                "title": layout.title,
                "counts": {**layout.counts},
                "files": {split: [str(files) for files in variants] for split, variants in layout.files.items()},
                "source": layout.source,
                "citation": layout.citation,
                "protocols": layout.protocols,
                "remarks": list(layout.remarks),
                "fetch": [_describe_source(source) for source in SOURCES.get(name, ())],
                "found": {} if root is None or not layout.folders else count_pairs(name, root),
            }
        )
    if format == "json":
        print(json.dumps(sets, indent=2))
    elif format == "markdown":
        print(sets_table(LAYOUTS).markdown(), end="")
    else:
        _print_sets(sets, root)
    return 0


def sets_table(layouts: Mapping[str, Layout]) -> tables.Table:
    """Return a table of the public data sets: description, number of pairs, protocols of the papers, known faults."""
    columns = [
        tables.Column(header, align="left") for header in ("set", "description", "pairs", "protocols", "remarks")
    ]
    rows = []
    for name, layout in layouts.items():
        if not layout.source:
            continue
        counts = [
            f"{split} {layout.counts[split]:,}" if split in layout.counts else f"{split} not confirmed"
            for split in layout.files
        ]
        protocols = layout.protocols or ("not confirmed" if "test" in layout.files else "")
        values = [f"[{name}]({layout.source})", layout.title, ", ".join(counts), protocols, "; ".join(layout.remarks)]
        rows.append(tables.Row(values))
    return tables.Table(columns, rows)


def _print_sets(sets: Sequence[dict[str, Any]], root: Path | None) -> None:
    title = "Data sets" if root is None else f"Data sets, and pairs found in {root}"
    table = Table(title=Text(title), title_justify="left")
    for column in ("set", "train", "test", "found", "source"):
        table.add_column(column, justify="right" if column in {"train", "test"} else "left", overflow="fold")
    for entry in sets:
        counts = entry["counts"]
        kinds = ", ".join(source["kind"] for source in entry["fetch"])
        table.add_row(
            entry["name"],
            *(f"{counts[split]:,}" if split in counts else "" for split in ("train", "test")),
            "\n".join(f"{split} {count:,}" for split, count in entry["found"].items()),
            f"{entry['title']}\n[dim]{entry['source']}; fetch from: {kinds}[/dim]" if kinds else entry["title"],
        )
    console = Console()
    console.print(table)
    if root is None:
        console.print("Set DERAIN_DATA or --root to the folder with your data sets to see which are found.")
    console.print("Protocols of the papers and known faults: derain data list --format markdown", highlight=False)
    console.print("File patterns and citations: derain data list --format json", highlight=False)
    console.print(
        "derain data fetch NAME fetches a set; sets whose only source is a form must be downloaded by hand",
        highlight=False,
    )


def _describe_source(source: Source) -> dict[str, str]:
    return {"kind": source.kind, "address": str(source), "licence": source.licence, "note": source.note}


def count_pairs(name: str, root: Path) -> dict[str, int]:
    """Return the number of pairs of each split of a data set in or below ``root``, without splits that have none.

    If several folders are named after the data set, the first one that contains pairs is counted.

    Raises:
        DerainError: If ``root`` is not a folder.
    """
    for folder in find_data_set_folders(name, root):
        counts = {split: len(pair_files(name, split, folder).pairs) for split in LAYOUTS[name].files}
        if any(counts.values()):
            return {split: count for split, count in counts.items() if count}
    return {}


def fetch_set(
    name: str,
    *,
    root: Path | None = None,
    from_: str | None = None,
    archive: Sequence[Path] = (),
    dry_run: bool = False,
) -> int:
    """Fetch a public data set into the data root, and verify it; an interrupted download is continued.

    Before a download, source, licence, size and free disk space are printed. The exit code is 1 if the data set must be
    downloaded by hand and --dry-run is not set, or if verification finds errors.

    Args:
        name: Name of the data set (see derain data list).
        root: Folder with data sets (default: $DERAIN_DATA).
        from_: Source: hub, web or form; hub:OWNER/NAME; or the address of an archive (default: the first source that
            derain data list shows for the set).
        archive: Archives that you have downloaded; they are unpacked and verified, and nothing is fetched.
        dry_run: Print what would be fetched, and stop.

    Raises:
        DerainError: If an option is wrong, the data set is unknown or exists already, the disk is too small, the server
            fails, or files are damaged.
    """
    name = find_name(name)
    root = _data_root(root)
    if archive:
        return _unpack_set(name, archive, root, from_, dry_run=dry_run)
    source = choose_source(name, from_)
    if isinstance(source, Form):
        print_form(name, source)
        return 0 if dry_run else 1
    download = plan_download(name, source, root)
    print_download(download)
    if dry_run:
        return 0
    folder = download.run()
    print(f"fetched {name}: {folder}")
    return verify_sets(folder)


def _unpack_set(name: str, archives: Sequence[Path], root: Path, from_: str | None, *, dry_run: bool) -> int:
    if from_ is not None:
        raise DerainError(f"--from {from_}: not allowed with --archive, which needs no source; omit one of them")
    if dry_run:
        raise DerainError("--dry-run: not allowed with --archive, which fetches nothing; omit one of them")
    folder = unpack_set(name, archives, root)
    print(f"unpacked {name}: {folder}")
    return verify_sets(folder)


def _data_root(root: Path | None) -> Path:
    """Return the given data root, or else ``$DERAIN_DATA``.

    Raises:
        DerainError: If there is neither.
    """
    if root is None and not os.environ.get("DERAIN_DATA"):
        raise DerainError("--root is missing: give the folder for data sets, or set DERAIN_DATA to it")
    return root if root is not None else Path(os.environ["DERAIN_DATA"])


def verify_sets(
    root: Path,
    *,
    against: Sequence[Path] = (),
    layout: str | None = None,
    format: Literal["table", "json"] = "table",
) -> int:
    """Find broken files, mismatched pairs, duplicates, and backgrounds that training and test sets share.

    The exit code is 1 if there are errors.

    Args:
        root: Name or folder of a data set, or a folder with several data sets.
        against: Names or folders of data sets that must not share backgrounds with those in root.
        layout: Layout of the data set (default: detected; see derain data list).
        format: Output format; JSON lists all files.

    Raises:
        DerainError: If a folder does not exist or contains no data set, or the layout is unknown.
    """
    sets, findings = verify(find_folder(root), against=[find_folder(other) for other in against], layout=layout)
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    exit_code = 1 if counts["error"] else 0
    if format == "json":
        print(json.dumps([finding.as_json() for finding in findings], indent=2))
        return exit_code
    console = Console()
    for found in sets:
        console.print(Text(f"{found}: {len(found.files.pairs)} pairs in {found.root}"), soft_wrap=True)
    if findings:
        console.print(findings_table(findings))
    console.print(
        f"{counts['error'] or 'no'} errors, {counts['warning']} warnings, {counts['note']} notes "
        "(--format json lists all files)"
    )
    return exit_code


def find_folder(name_or_folder: Path) -> Path:
    """Return the folder of a data set in ``$DERAIN_DATA``, given the name of the set.

    A path that exists, or that is not the name of a data set there, is returned unchanged.
    """
    root = os.environ.get("DERAIN_DATA")
    if name_or_folder.exists() or not root or not Path(root).is_dir():
        return name_or_folder
    for name, layout in LAYOUTS.items():
        if name.lower() == str(name_or_folder).lower() and layout.folders:
            folders = find_data_set_folders(name, Path(root))
            return folders[0] if folders else name_or_folder
    return name_or_folder


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table of findings.

    For each level, kind and set, it has the first ``MAX_ROWS`` findings, and a row with the number of further ones.
    """
    table = Table(show_lines=False)
    for column in ("level", "kind", "set", "files", "detail"):
        table.add_column(column, overflow="fold")
    counts: dict[tuple[str, str, str], int] = {}
    for finding in findings:
        group = (finding.level, finding.kind, finding.set)
        counts[group] = counts.get(group, 0) + 1
        if counts[group] > MAX_ROWS:
            continue
        names = [Path(file).name for file in finding.files]
        files = ", ".join(names[:4])
        if len(names) > 4:
            files += f" and {len(names) - 4} more"
        styled_level = Text(finding.level, STYLES[finding.level])
        table.add_row(styled_level, finding.kind, Text(finding.set), Text(files), Text(finding.detail))
    for (level, kind, name), count in counts.items():
        if count > MAX_ROWS:
            table.add_row(level, kind, Text(name), f"{count - MAX_ROWS} more", "")
    return table


def synthesize_set(
    clean: Path,
    out: Path,
    *,
    preset: Literal["light", "medium", "heavy"] = "medium",
    seed: int = 0,
    per_image: int = 1,
    overwrite: bool = False,
    density: Sequence[float] | None = None,
    length: Sequence[float] | None = None,
    width: Sequence[float] | None = None,
    angle: Sequence[float] | None = None,
    spread: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    brightness: Sequence[float] | None = None,
    veil: Sequence[float] | None = None,
    drops: Sequence[int] | None = None,
) -> int:
    """Add rain to clean photos, and write a paired data set with a contact sheet.

    The options density to drops replace parameters of the preset. Each takes one number; or two, the limits between
    which the parameter is drawn uniformly for each image.

    Args:
        clean: Folder with clean photos, including its subfolders.
        out: Folder for the data set.
        preset: Strength of the rain.
        seed: Seed of the rain, at least 0.
        per_image: Rainy images per clean photo, 1 to 1000.
        overwrite: Replace a data set of an earlier run.
        density: Expected total area of the streaks, divided by the image area, 0 to 4.
        length: Mean length of the nearest streaks in pixels (more if both sides exceed 512 pixels), 1 to 400.
        width: Width of the nearest streaks in pixels (more if both sides exceed 512 pixels), 0.2 to 40.
        angle: Angle from the vertical in degrees, positive for rain that falls to the right, -90 to 90.
        spread: Standard deviation of the layers' angles in degrees, 0 to 45.
        layers: Number of depth layers, 1 to 16.
        brightness: Opacity of the brightest streaks, 0 to 1.
        veil: Opacity of the mist, 0 to 1.
        drops: Number of drops on the lens, 0 to 200.

    Raises:
        DerainError: If a number is out of range, a folder cannot be used, or photos cannot be read; in the last case,
            all other photos are written.
    """
    parameters: dict[str, Sequence[float] | None] = {
        "density": density,
        "length": length,
        "width": width,
        "angle": angle,
        "spread": spread,
        "layers": layers,
        "brightness": brightness,
        "veil": veil,
        "drops": drops,
    }
    smallest: dict[str, Any] = {}
    largest: dict[str, Any] = {}
    for name, limits in parameters.items():
        if limits is None:
            continue
        if len(limits) > 2:
            raise DerainError(f"--{name}: {len(limits)} numbers; give one number, or the smallest and the largest")
        smallest[name], largest[name] = limits[0], limits[-1]
    low, high = PRESETS[preset]
    rain_limits = (dataclasses.replace(low, **smallest), dataclasses.replace(high, **largest))
    unreadable = synthesize(clean, out, rain_limits, per_image=per_image, seed=seed, overwrite=overwrite)
    print(f"wrote data set: {out} (contact sheet: {out / 'contact_sheet.png'})")
    if unreadable:
        raise DerainError(f"skipped {len(unreadable)} photos that cannot be read: {'; '.join(unreadable)}")
    return 0


def shard_set(
    dataset: str,
    out: Path,
    *,
    split: Split = "train",
    root: Path | None = None,
    shard_size: int = 512,
    overwrite: bool = False,
) -> int:
    """Write one split of a data set to shards: tar files in the format of WebDataset, with an index.

    derain fit, validate, test and predict accept the folder of the shards, or the URL of a copy (s3://, hf://,
    https://), as a data set.

    Args:
        dataset: Name or folder of a data set.
        out: Folder for the shards, which may contain those of other splits.
        split: Split of the data set.
        root: Folder with data sets (default: $DERAIN_DATA).
        shard_size: Maximum size of the images in a shard in MB, at least 1; a larger pair gets a shard of its own.
        overwrite: Replace the shards of this split.

    Raises:
        DerainError: If the size is below 1, the data set does not exist, an image cannot be read, or the folder has
            shards of this split and overwrite is not set.
    """
    if shard_size < 1:
        raise DerainError(f"--shard-size {shard_size}: must be at least 1")
    pair_set = find_pairs(dataset, split, data_root=root)
    for note in pair_set.notes:
        print(f"{pair_set.name}: {note}", file=sys.stderr)
    sizes = write_shards(pair_set, out, shard_size * 1_000_000, overwrite=overwrite)
    option = {"train": "fit --data.train", "test": "test --data.test", "predict": "predict --data.predict"}[split]
    print(
        f"wrote {out}: {len(pair_set.pairs):,} pairs of {pair_set.name} in {len(sizes)} shards, "
        f"{sum(sizes) / 1e6:,.1f} MB; use them by derain {option} {out}"
    )
    return 0


def quickstart_photos(out: Path) -> int:
    """Write the freely licensed photos of the quickstart, which are part of scikit-image.

    Args:
        out: Folder for the photos: train has each training photo cut into four, test has whole photos.

    Raises:
        DerainError: If scikit-image is not installed.
    """
    print(f"wrote {len(write_photos(out))} images: {out}")
    for photo in PHOTOS:
        print(f"{photo.split}, {photo.file} of scikit-image: {photo.author}, {photo.licence}")
    return 0


SUBCOMMANDS = {
    "list": list_sets,
    "fetch": fetch_set,
    "verify": verify_sets,
    "synthesize": synthesize_set,
    "shard": shard_set,
    "photos": quickstart_photos,
}
