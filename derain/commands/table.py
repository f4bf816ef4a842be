"""Build the papers' tables, and plots, from what `derain test` left behind."""

import argparse
import csv
import io
import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from derain.data.layouts import LAYOUTS
from derain.data.run_summaries import (
    ResultRow,
    Score,
    find_files,
    merge_rows,
    published_rows,
    read_summary,
    row_labels,
    select_protocol,
    shorten_paths,
)
from derain.errors import DerainError
from derain.images import ESCAPED, write_whole
from derain.metrics import resolve

log = logging.getLogger("derain")

LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"},
        **{"σ": r"$\sigma$", "×": r"$\times$", "±": r"$\pm$"},
    }
)

PARTIAL = "*"
"""Marks numbers of a part of a set's images."""

SIDE = 256
"""Side of the image that multiplications are counted for, in pixels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("results", type=Path, nargs="+", help="summary.json files, or folders that hold some")
    parser.add_argument("--protocol", metavar="P", help="the one to show, where results were judged by several")
    parser.add_argument("--published", action="store_true", help="also what the papers print for these sets")
    parser.add_argument("--cost", action="store_true", help=f"also count parameters and MACs at {SIDE}×{SIDE} pixels")
    parser.add_argument("--format", choices=list(FORMATS), default="table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to this file")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="write PNGs: PSNR over seconds, curves of training runs below RESULTS, every image rainy and derained",
    )


def run(args: argparse.Namespace) -> int:
    """Reads, and prints or writes the table."""
    files = find_files(args.results, "summary.json")
    if not files:
        raise DerainError(f"{args.results[0]}: holds no summary.json; make one by derain test, and give its folder")
    found, protocol = select_protocol([(file, read_summary(file)) for file in files], args.protocol)
    rows = merge_rows(found)
    if args.cost:
        rows = [_with_cost(row) for row in rows]
    if args.published:
        rows += published_rows({score.dataset for row in rows for score in row.scores}, protocol)
    told = FORMATS[args.format](rows, protocol)
    if args.out is None:
        print(told, end="")
    else:
        with write_whole(args.out) as temporary:
            temporary.write_text(told, encoding="utf-8", errors=ESCAPED)
        print(f"wrote {args.out}", file=sys.stderr)
    if args.plot is not None:
        drawn = draw(args.plot, rows, protocol, find_files(args.results, "metrics.csv"))
        print(f"wrote {len(drawn)} plots to {args.plot}", file=sys.stderr)
    return 0


def _with_cost(row: ResultRow) -> ResultRow:
    """Adds parameters and multiplications of the method as it was tested, if it is one of ours."""
    from derain.commands.bench import cost
    from derain.methods import catalog

    known = {one.__name__: one for one in catalog.methods()}
    try:
        method = known[row.metadata["method"]](**row.metadata["hyper_parameters"])
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s: its cost is not counted, as %s cannot be built here (%s)", row.file, row.method, error)
        return row
    counted = cost(method, SIDE)
    return replace(row, parameters=float(counted["parameters"]), macs=float(counted["macs"]))


# Words.


def sets_of(rows: Sequence[ResultRow]) -> list[str]:
    """The sets of a table, in the order of the layouts, others behind them."""
    known = {name: place for place, name in enumerate([*LAYOUTS, "Mixed"])}
    names = dict.fromkeys(score.dataset for row in rows for score in row.scores)
    return sorted(names, key=lambda name: known.get(name, len(known)))


def _marks(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Footnotes of published rows, by number."""
    return {note: str(place) for place, note in enumerate(dict.fromkeys(row.note for row in rows if row.note), 1)}


def notes(rows: Sequence[ResultRow], protocol: str) -> list[str]:
    """What stands below a table."""
    told = [f"Protocol {protocol}: {resolve([protocol])[0].definition}."]
    for name in sets_of(rows):
        prints = dict.fromkeys(s.fingerprint for row in rows for s in row.scores if s.dataset == name and s.fingerprint)
        if len(prints) > 1:
            told.append(f"{name}: not all rows are of the same images (fingerprints {', '.join(prints)}).")
    for name, row in zip(row_labels(rows), rows, strict=True):
        told += [
            f"{PARTIAL} partial: {name} on {score.dataset}{_part(score)}." for score in row.scores if score.partial_of
        ]
    if any(row.macs is not None and row.note is None for row in rows):
        told.append(
            f"MACs: at {SIDE}×{SIDE} pixels, one route executed, CLIP left out, of a diffusion one of its steps."
        )
    where = dict.fromkeys(row.hardware for row in rows if row.seconds is not None and row.hardware)
    if where:
        told.append(f"Seconds: a test image, mean; on {'; '.join(where)}.")
    return told + [f"[{number}] {note}." for note, number in _marks(rows).items()]


def _lpips(rows: Sequence[ResultRow], name: str) -> bool:
    return any(score.lpips is not None for row in rows for score in row.scores if score.dataset == name)


def _further(rows: Sequence[ResultRow]) -> dict[str, Callable[[ResultRow], str]]:
    """The columns behind the sets, as far as any row fills them."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters, M": ("parameters", lambda value: f"{value / 1e6:.2f}"),
        "MACs, G": ("macs", lambda value: f"{value / 1e9:.2f}"),
        "seconds": ("seconds", lambda value: f"{value:.3g}"),
    }

    def cell(name: str, told: Callable[[Any], str]) -> Callable[[ResultRow], str]:
        return lambda row: "–" if getattr(row, name) is None else told(getattr(row, name))

    return {
        title: cell(name, told)
        for title, (name, told) in columns.items()
        if any(getattr(row, name) is not None for row in rows)
    }


def _numbers(row: ResultRow, name: str, lpips: bool) -> list[str]:
    """PSNR, SSIM and LPIPS of a row on a set."""
    score = next((score for score in row.scores if score.dataset == name), None)
    if score is None:
        return ["–"] * (2 + lpips)
    last = ["–" if score.lpips is None else f"{score.lpips:.4f}"] if lpips else []
    mark = PARTIAL if score.partial_of else ""
    return [f"{score.psnr:.2f}{mark}", f"{score.ssim:.4f}{mark}", *last]


def cells(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Titles, and a line a row; the numbers of a set stand in one cell."""
    sets, further, marks = sets_of(rows), _further(rows), _marks(rows)
    net = next((row.lpips_net for row in rows if row.lpips_net), None)
    third = f" / LPIPS{f' ({net})' if net else ''}"
    titles = [f"{name}, PSNR / SSIM{third if _lpips(rows, name) else ''}" for name in sets]
    lines = [["method", "trained on", *titles, *further]]
    for name, row in zip(row_labels(rows), rows, strict=True):
        trained = f"[{marks[row.note]}]" if row.note else "; ".join(row.trained_on) or "not told"
        numbers = [_numbers(row, one, _lpips(rows, one)) for one in sets]
        joined = ["–" if set(values) == {"–"} else " / ".join(values) for values in numbers]
        lines.append([f"{name} {trained}" if row.note else name, "" if row.note else trained, *joined])
        lines[-1] += [cell(row) for cell in further.values()]
    return lines


# Forms.


def _table(rows: Sequence[ResultRow], protocol: str) -> str:
    (first, second, *titles), *lines = cells(rows)
    table = Table(first, second)
    for title in titles:
        table.add_column(title.replace(", ", "\n", 1), justify="right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(Text, line), style="dim" if row.note else None)
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as captured:
        console.print(Group(table, *map(Text, notes(rows, protocol))))
    return captured.get()


def _markdown(rows: Sequence[ResultRow], protocol: str) -> str:
    titles, *lines = cells(rows)
    ruler = ["---", "---", *["---:"] * (len(titles) - 2)]
    told = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [titles, ruler, *lines]]
    return "\n".join([*told, "", *(f"{note}  " for note in notes(rows, protocol))]) + "\n"


def _latex(rows: Sequence[ResultRow], protocol: str) -> str:
    sets, further, marks = sets_of(rows), _further(rows), _marks(rows)
    wide = {name: 2 + _lpips(rows, name) for name in sets}
    heads = [rf"\multicolumn{{{count}}}{{c}}{{{escape(name)}}}" for name, count in wide.items()]
    rules, place = [], 3
    for count in wide.values():
        rules.append(rf"\cmidrule(lr){{{place}-{place + count - 1}}}")
        place += count
    measures = [measure for count in wide.values() for measure in ("PSNR", "SSIM", "LPIPS")[:count]]
    lines = []
    for name, row in zip(row_labels(rows), rows, strict=True):
        mark = rf"\textsuperscript{{{marks[row.note]}}}" if row.note else ""
        numbers = [value for one in sets for value in _numbers(row, one, wide[one] == 3)]
        trained = "" if row.note else "; ".join(row.trained_on) or "not told"
        told = [escape(name) + mark, *map(escape, [trained, *numbers, *(cell(row) for cell in further.values())])]
        lines.append(" & ".join(told) + r" \\")
    return "\n".join(
        [
            r"\begin{tabular}{ll" + "c" * (len(measures) + len(further)) + "}  % needs booktabs",
            r"\toprule",
            " & ".join(["Method", "Trained on", *heads, *map(escape, further)]) + r" \\",
            " ".join(rules),
            " & ".join(["", "", *measures, *[""] * len(further)]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *footnotes(notes(rows, protocol)),
            "",
        ]
    )


def footnotes(told: Sequence[str]) -> list[str]:
    """Lines of LaTeX that print notes below a table; numbers in brackets are raised, as the table's marks are."""
    lines = [re.sub(r"^\[(\d+)\]", r"\\textsuperscript{\1}", escape(note)) + r"\par" for note in told]
    return [r"\par\smallskip", r"{\footnotesize\raggedright", *lines, "}"]


def escape(text: str) -> str:
    r"""A text as LaTeX has it.

    Example:
        >>> print(escape("my_set: 50 %"))
        my\_set: 50 \%
    """
    return text.translate(LATEX)


def _csv(rows: Sequence[ResultRow], protocol: str) -> str:
    """One line a method and set, in full precision."""
    text = io.StringIO()
    measures = ("psnr", "ssim", "lpips", "images", "partial_of", "fingerprint")
    titles = ["method", "trained_on", "protocol", "dataset", *measures]
    titles += ["seconds", "parameters", "macs", "hardware", "weights", "file", "note"]
    writer = csv.DictWriter(text, titles, lineterminator="\n")
    writer.writeheader()
    for name, row in zip(row_labels(rows), rows, strict=True):
        same = {key: getattr(row, key) for key in titles[-6:]}
        same |= {"method": name, "trained_on": "; ".join(row.trained_on), "protocol": row.protocol}
        for score in row.scores:
            numbers = {key: getattr(score, key) for key in ("dataset", *measures, "seconds")}
            writer.writerow(same | numbers)
    return text.getvalue()


FORMATS: dict[str, Callable[[Sequence[ResultRow], str], str]] = {
    "table": _table,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
}


# Plots.


def draw(folder: Path, rows: Sequence[ResultRow], protocol: str, metrics: Iterable[Path]) -> list[Path]:
    """Writes the plots that there are numbers for.

    Args:
        folder: Where to.
        rows: The table's.
        protocol: Of the numbers.
        metrics: Logs of runs.
    """
    from derain import plots

    told = row_labels(rows)
    names = {
        id(row): name if told.count(name) == 1 else f"{name}, trained on {'; '.join(row.trained_on) or 'unknown'}"
        for row, name in zip(rows, told, strict=True)
    }
    written: list[Path] = []
    for name in sets_of(rows):
        timed = {
            names[id(row)] + _part(score): (score.seconds, score.psnr)
            for row in rows
            for score in row.scores
            if score.seconds is not None and score.dataset == name
        }
        if timed:
            file = _free(folder / f"seconds-{_slug(name)}.png", written)
            written.append(plots.trade_off(file, timed, name, protocol))
    runs = {file: points for file in metrics if (points := _epochs(file))}
    if runs:
        folders = dict(zip(runs, shorten_paths([file.parent for file in runs]), strict=True))
        curves = {folders[file]: points for file, points in runs.items()}
        written.append(plots.curves(folder / "curves.png", curves))
    for row in rows:
        for score in row.scores:
            name, pairs = names[id(row)] + _part(score), _images(score.image_scores, protocol)
            if pairs:
                file = _free(folder / f"images-{_slug(name)}-{_slug(score.dataset)}.png", written)
                written.append(plots.images(file, pairs, name, score.dataset, protocol))
    return written


def _part(score: Score) -> str:
    """Return how many images a score is of, where it is not all of the set."""
    return f", {score.images} of {score.partial_of} images" if score.partial_of else ""


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")


def _free(file: Path, written: Sequence[Path]) -> Path:
    """The path, numbered where another plot has it: names may differ only in what was left out of file names."""
    stems = itertools.chain([file.stem], (f"{file.stem}-{count}" for count in itertools.count(2)))
    return next(one for one in map(file.with_stem, stems) if one not in written)


def _epochs(file: Path) -> list[tuple[float, float]]:
    """Epochs and their ``val/psnr`` in a run's log; none where it was no training."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row.get("val/psnr") and row.get("epoch")]
        return [(float(row["epoch"]), float(row["val/psnr"])) for row in rows]
    except (ValueError, csv.Error) as error:
        raise DerainError(f"{file}: no log of derain fit ({error}); leave it out") from error


def _images(file: Path | None, protocol: str) -> list[tuple[float, float]]:
    """PSNR of every image, rainy and derained; none where they were not kept."""
    if file is None or not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row["protocol"] == protocol]
        return [(float(row["rainy_psnr"]), float(row["psnr"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DerainError(f"{file}: no images of derain test ({error!r}); leave --plot out") from error
