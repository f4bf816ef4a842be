"""Judge any method's result folder against clean images, protocol by protocol."""

import argparse
import csv
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from derain.commands.table import escape, footnotes
from derain.data.result_folders import ScoringPair, find_scoring_pairs
from derain.errors import DerainError
from derain.images import ESCAPED, write_whole
from derain.metrics import PROTOCOLS, Protocol, bootstrap_interval, psnr_ssim, resolve
from derain.metrics.full_reference import MAX_PSNR
from derain.metrics.perceptual import Lpips, NoReference, available_lpips
from derain.metrics.protocols import DOWNSAMPLE_SUFFIX, PROTOCOL_GROUPS
from derain.progress import track


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("derained", type=Path, help="an image, or a folder of a method's results")
    parser.add_argument(
        "clean",
        nargs="?",
        help="the clean image, a folder of clean images, or a data set's folder or name; matched by name",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        action="extend",
        metavar="P",
        help=f"{', '.join([*PROTOCOLS, *PROTOCOL_GROUPS])}; {DOWNSAMPLE_SUFFIX} at the end lets SSIM shrink images "
        f"(default {next(iter(PROTOCOLS))})",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="table")
    parser.add_argument("--output", type=Path, help="write to this file")
    parser.add_argument(
        "--lpips",
        choices=["auto", "alex", "vgg", "none"],
        default="auto",
        help="auto (default) uses AlexNet if its weights are here; alex and vgg fetch them if not",
    )
    parser.add_argument(
        "--no-reference",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="metrics of pyiqa, such as niqe, musiq",
    )


def run(args: argparse.Namespace) -> int:
    """Scores, and prints or writes the result; exit code 0 unless input was refused."""
    protocols = resolve(args.protocol or [next(iter(PROTOCOLS))]) if args.clean else ()
    if not args.clean and not args.no_reference:
        raise DerainError("CLEAN: not given; name the clean images, or judge without them by --no-reference niqe")
    jobs = find_scoring_pairs(args.derained, args.clean)
    lpips = available_lpips(args.lpips if args.clean else "none")
    no_reference = no_reference_at_hand(args.no_reference or [])
    if not (protocols or no_reference):
        raise DerainError("nothing to judge by: name clean images, or install pyiqa: pip install 'derain[iqa]'")
    results = score(jobs, protocols, lpips, no_reference)
    told = FORMATS[args.format](results, args.output is None)
    if args.output is None:
        print(told, end="")
    else:
        with write_whole(args.output) as temporary:
            temporary.write_text(told, encoding="utf-8", errors=ESCAPED)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


# Numbers.


def no_reference_at_hand(names: Sequence[str]) -> list[NoReference]:
    """Makes the metrics of pyiqa that can be had; says on standard error why others cannot."""
    metrics = []
    for name in names:
        try:
            metrics.append(NoReference(name))
        except DerainError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
    return metrics


def score(
    jobs: Sequence[ScoringPair],
    protocols: Sequence[Protocol],
    lpips: Lpips | None = None,
    no_reference: Sequence[NoReference] = (),
) -> list[dict[str, Any]]:
    """Scores every image.

    Args:
        jobs: What belongs together.
        protocols: May be empty; then one result without protocol holds the no-reference quality.
        lpips: Also compares by this.
        no_reference: Also judges the derained images by these.

    Returns:
        One object a protocol: ``protocol``, ``definition``, ``count``, means ``psnr`` (dB), ``ssim`` and
        ``lpips``, ``psnr_interval`` and ``ssim_interval`` (95 %, bootstrap), ``lpips_net``, ``no_reference``,
        and ``images``. What was not computed is None.

    Raises:
        DerainError: If an image cannot be read or judged; it names the file.
    """
    alone = threading.Lock()  # networks run one at a time, on all cores

    def judge(job: ScoringPair) -> list[dict[str, float]]:
        derained, clean = job.read()
        further = {}
        try:
            with alone:
                if lpips is not None and clean is not None:
                    further["lpips"] = lpips(derained, clean)
                further |= {metric.name: metric(derained) for metric in no_reference}
            if clean is None:
                return [further]
            values = [psnr_ssim(derained, clean, protocol) for protocol in protocols]
        except DerainError as error:
            raise DerainError(f"{job.derained}: {error}") from error
        return [{"psnr": psnr, "ssim": ssim, **further} for psnr, ssim in values]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = list(track(pool.map(judge, jobs), "Scoring", len(jobs)))
    results = []
    for place, protocol in enumerate(protocols or [None]):
        images = [{"name": job.name, **values[place]} for job, values in zip(jobs, judged, strict=True)]
        columns = {key: np.array([image[key] for image in images]) for key in images[0] if key != "name"}
        means = {key: float(column.mean()) for key, column in columns.items()}
        intervals = {
            f"{key}_interval": list(bootstrap_interval(columns[key])) if key in columns and len(jobs) > 1 else None
            for key in ("psnr", "ssim")
        }
        results.append(
            {
                "protocol": protocol and protocol.name,
                "definition": protocol and protocol.definition,
                "count": len(jobs),
                **{key: means.get(key) for key in ("psnr", "ssim", "lpips")},
                **intervals,
                "lpips_net": lpips and lpips.net,
                "no_reference": {metric.name: means[metric.name] for metric in no_reference},
                "images": images,
            }
        )
    return results


# Forms.


def _columns(results: list[dict[str, Any]]) -> list[str]:
    """Names of the further measures."""
    return (["lpips"] if results[0]["lpips"] is not None else []) + list(results[0]["no_reference"])


def _title(column: str, results: list[dict[str, Any]]) -> str:
    return f"LPIPS ({results[0]['lpips_net']})" if column == "lpips" else column


def _cells(result: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Protocol, number of images, PSNR, SSIM and the further measures, as text."""
    numbers = [result["lpips"] if column == "lpips" else result["no_reference"][column] for column in columns]
    return [
        result["protocol"] or "no reference",
        str(result["count"]),
        *(["–", "–"] if result["psnr"] is None else [f"{result['psnr']:.3f}", f"{result['ssim']:.4f}"]),
        *(f"{number:.4f}" for number in numbers),
    ]


def _notes(results: list[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    notes = [f"{result['protocol']}: {result['definition']}" for result in results if result["protocol"]]
    same = max(sum(image.get("psnr") == MAX_PSNR for image in result["images"]) for result in results)
    if same:
        notes.append(f"{same} of the images equal the clean ones and count as {MAX_PSNR:.0f} dB")
    return notes


def _table(results: list[dict[str, Any]], on_terminal: bool) -> str:
    columns = _columns(results)
    table = Table("protocol", title_justify="left")
    for title in ("images", "PSNR, dB", "SSIM", *(_title(column, results) for column in columns)):
        table.add_column(title, justify="right")
    for result in results:
        cells = _cells(result, columns)
        for place, (key, digits) in enumerate({"psnr": 2, "ssim": 4}.items(), start=2):
            if result[f"{key}_interval"]:
                low, high = result[f"{key}_interval"]
                cells[place] += f" [{low:.{digits}f}, {high:.{digits}f}]"
        table.add_row(*(Text(cell) for cell in cells))
    notes = _notes(results)
    if any(result["psnr_interval"] for result in results):
        notes.insert(0, "Means of images [95 % bootstrap interval]")
    # Without a terminal lines are long rather than broken.
    terminal = Console(width=None if on_terminal and sys.stdout.isatty() else 160)
    with terminal.capture() as captured:
        terminal.print(Group(table, *(Text(note) for note in notes)))
    return captured.get()


def _json(results: list[dict[str, Any]], on_terminal: bool) -> str:
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


def _csv(results: list[dict[str, Any]], on_terminal: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["protocol", *results[0]["images"][0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"protocol": result["protocol"]} | image for result in results for image in result["images"])
    return text.getvalue()


def _markdown(results: list[dict[str, Any]], on_terminal: bool) -> str:
    columns = _columns(results)
    titles = ["protocol", "images", "PSNR (dB)", "SSIM", *(_title(column, results) for column in columns)]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *(_cells(result, columns) for result in results)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in _notes(results))]) + "\n"


def _latex(results: list[dict[str, Any]], on_terminal: bool) -> str:
    columns = _columns(results)
    titles = ["Protocol", "Images", "PSNR (dB)", "SSIM", *(_title(column, results) for column in columns)]
    rows = [" & ".join(map(escape, row)) for row in (titles, *(_cells(result, columns) for result in results))]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}  % needs booktabs",
            r"\toprule",
            rows[0] + r" \\",
            r"\midrule",
            *(row + r" \\" for row in rows[1:]),
            r"\bottomrule",
            r"\end{tabular}",
            *footnotes(_notes(results)),
            "",
        ]
    )


FORMATS: dict[str, Callable[[list[dict[str, Any]], bool], str]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
    "latex": _latex,
}
