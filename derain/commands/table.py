"""Build tables as in the papers, and plots, from the results of ``derain test``."""

import csv
import itertools
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from derain.data.layouts import LAYOUTS
from derain.data.run_summaries import (
    ResultRow,
    Score,
    find_files,
    merge_rows,
    published_rows,
    published_table,
    read_summary,
    row_labels,
    select_protocol,
    shorten_paths,
)
from derain.errors import DerainError
from derain.metrics import resolve
from derain.metrics.temporal import TEMPORAL, TEMPORAL_DEFINITION
from derain.tables import Cell, Column, Format, Row, Table, Value, write_results

log = logging.getLogger("derain")

PARTIAL = "*"
"""Mark of PSNR and SSIM that were computed on a part of the images of a set only."""

SEQUENCES = "sequences"
"""Word after the name of a data set, in the header above the columns with means over its sequences."""

SCORE_COLUMNS: tuple[tuple[str, str, str, Literal["max", "min", None]], ...] = (
    ("psnr", "PSNR", ".2f", "max"),
    ("ssim", "SSIM", ".4f", "max"),
    ("lpips", "LPIPS", ".4f", "min"),
    ("flicker", "flicker", ".3f", None),
    ("warping_error", "warping error", ".6f", "min"),
)
"""Columns of a data set: attribute of `Score`, header, format, and which value is best; None: no value is."""

COST_SIDE = 256
"""Height and width of the image for which MACs are counted, in pixels."""


def table(
    results: Sequence[Path] = (),
    *,
    protocol: str | None = None,
    published: bool = False,
    paper: str | None = None,
    cost: bool = False,
    method: Sequence[str] = (),
    best: bool = False,
    format: Format = "table",
    out: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Build a table as in papers from the results of derain test: one row per method, a group of columns per data set.

    Args:
        results: Files summary.json, or folders that contain such files; optional with --paper.
        protocol: Protocol of the scores; required if the results have several.
        published: Add rows with the results that papers report on the data sets of your results, without ablations.
        paper: Reproduce one table of a paper, together with your results on its data sets: cliprpn:3, cliprpn:6,
            cliprpn:10, cliprpn:11, daclip:1, daclip:2, plnlin:2, plnlin:4 or plnlin:6.
        cost: Count parameters, and MACs at 256×256 pixels, of the methods of your results.
        method: Class of a method outside derain whose cost is to be counted, such as my_method.MyModule.
        best: Print the best PSNR, SSIM, LPIPS and warping error in bold; PSNR and SSIM over a part of a set are
            not compared.
        format: Output format; CSV and JSON have full precision.
        out: Output file (default: standard output).
        plot: Folder for plots: PSNR against seconds; validation PSNR against epochs, for training runs in the result
            folders; and PSNR of each derained image against that of the rainy image.

    Raises:
        DerainError: If an option is wrong, there are no results, or they cannot be compared.
    """
    rows: list[ResultRow] = []
    if results or paper is None:
        rows, protocol = own_rows(results, protocol)
    sets = {score.dataset for row in rows for score in row.scores}
    if paper is not None:
        sets = paper_sets(paper)
        rows = restrict_to(rows, sets)
    if cost:
        rows = add_costs(rows, method)
    if published or paper is not None:
        rows += published_rows(sets, protocol, paper)
    if protocol is None:
        protocol = published_table(cast(str, paper))["protocol"]
    records = score_records(rows)
    if best and not _shows_best(format, out):
        form = "plain text" if format == "table" else format
        log.warning("--best: ignored: %s has no bold; use --format markdown or latex", form)
    write_results(format, results_table(rows, protocol, best=best), records, records, out)
    if plot is not None:
        if protocol is None or not results:
            raise DerainError(f"--plot {plot}: no results are given; give the folder of a run of derain test")
        files = write_plots(plot, rows, protocol, find_files(results, "metrics.csv"))
        print(f"wrote {len(files)} plots to {plot}", file=sys.stderr)
    return 0


def own_rows(results: Sequence[Path], protocol: str | None) -> tuple[list[ResultRow], str]:
    """Return the rows of the user's results, and their protocol.

    Args:
        results: Files ``summary.json``, or folders that contain such files.
        protocol: Protocol of the scores; None if all results have the same one.

    Raises:
        DerainError: If there are no results, or they cannot be compared.
    """
    files = find_files(results, "summary.json")
    if not files:
        problem = f"{', '.join(map(str, results))}: no summary.json" if results else "no results are given"
        raise DerainError(f"{problem}; run derain test, and give the folder of its run")
    selected, protocol = select_protocol([(file, read_summary(file)) for file in files], protocol)
    return merge_rows(selected), protocol


def paper_sets(paper: str) -> set[str]:
    """Return the names of the data sets in a table of a paper.

    Raises:
        DerainError: If derain does not know the table.
    """
    return {name for numbers in published_table(paper)["methods"].values() for name in numbers["results"]}


def restrict_to(rows: Sequence[ResultRow], sets: set[str]) -> list[ResultRow]:
    """Return rows with their scores on ``sets`` only; rows without such scores are skipped with a warning."""
    restricted = []
    for row in rows:
        scores = tuple(score for score in row.scores if score.dataset in sets)
        if scores:
            restricted.append(replace(row, scores=scores))
        else:
            log.warning("%s: skipped: no results on %s", row.file, ", ".join(sorted(sets)))
    return restricted


def _shows_best(format: Format, out: Path | None) -> bool:
    """Return whether an output of this format can show bold text."""
    if format == "table":
        return out is None and sys.stdout.isatty()
    return format in {"markdown", "latex"}


def add_costs(rows: Sequence[ResultRow], methods: Sequence[str] = ()) -> list[ResultRow]:
    """Return rows with the parameters and MACs of their methods; warn of rows whose cost cannot be counted.

    Args:
        rows: Rows of the user's results.
        methods: Class paths of methods outside derain.

    Raises:
        DerainError: If there is no such class.
    """
    from derain.commands.bench import build_method, count_cost
    from derain.methods.registry import find, use_method

    for name in methods:
        use_method(name)
    with_costs = []
    for row in rows:
        try:
            method_class = find(Path(row.file), row.metadata)
            method_class.check_trusted(Path(row.file), row.metadata["hyper_parameters"])
            method = build_method(method_class, **row.metadata["hyper_parameters"])
            cost = count_cost(method, COST_SIDE)
        except (KeyError, DerainError) as error:
            log.warning("%s: cost of %s cannot be counted: %s", row.file, row.method, error)
            with_costs.append(row)
            continue
        with_costs.append(replace(row, parameters=float(cost["parameters"]), macs=float(cost["macs"])))
    return with_costs


# The table.


def set_names(rows: Sequence[ResultRow]) -> list[str]:
    """Return the names of the sets: known sets in the order of the layouts, then Mixed, then unknown sets."""
    order = {name: index for index, name in enumerate([*LAYOUTS, "Mixed"])}
    names = dict.fromkeys(score.dataset for row in rows for score in row.scores)
    return sorted(names, key=lambda name: order.get(name, len(order)))


def footnote_numbers(rows: Sequence[ResultRow]) -> dict[str, int]:
    """Return the number of the footnote, from 1, by note; published rows may share a note."""
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return {note: number for number, note in enumerate(notes, start=1)}


def results_table(rows: Sequence[ResultRow], protocol: str | None, *, best: bool = False) -> Table:
    """Return the table, with a group of columns for each set.

    Args:
        rows: One row per method.
        protocol: Protocol of the scores; None if only a paper is shown that does not define its protocol.
        best: Whether the best scores are marked.
    """
    columns = [Column("method", align="left"), Column("trained on", align="left")]
    values = [
        _method_values(row, label, footnote_numbers(rows)) for row, label in zip(rows, row_labels(rows), strict=True)
    ]
    network = next((row.lpips_net for row in rows if row.lpips_net), None)
    for name in set_names(rows):
        scores = [next((score for score in row.scores if score.dataset == name), None) for row in rows]
        sequence_means = [None if score is None else score.sequences for score in scores]
        groups = {name: scores, f"{name}, {SEQUENCES}": sequence_means}
        for group, means in groups.items():
            for column, numbers in _score_columns(group, means, network, best=best):
                columns.append(column)
                for row_values, score, number in zip(values, scores, numbers, strict=True):
                    row_values.append(_mark_partial(number, score, column.header))
    for column, costs in _cost_columns(rows):
        columns.append(column)
        for row_values, cost in zip(values, costs, strict=True):
            row_values.append(cost)
    table_rows = [Row(row_values, dim=row.note is not None) for row, row_values in zip(rows, values, strict=True)]
    notes = table_notes(rows, protocol)
    if best and any(score.partial_of for row in rows for score in row.scores):
        notes.append(f"Bold: best score of a column; scores with {PARTIAL} are not compared.")
    return Table(columns, table_rows, notes)


def _method_values(row: ResultRow, label: str, footnotes: dict[str, int]) -> list[Value]:
    """Return the label of a row and its training sets; published rows have a footnote instead of training sets."""
    if row.note:
        return [Cell(label, footnote=footnotes[row.note]), ""]
    return [label, "; ".join(row.trained_on) or "unknown"]


def _score_columns(
    group: str, scores: Sequence[Score | None], network: str | None, *, best: bool
) -> Iterator[tuple[Column, list[float | None]]]:
    """Yield the columns of a data set, each with its values; columns without any value are omitted.

    Args:
        group: Header above the columns.
        scores: Scores of each row, or means over sequences; None for a row without them.
        network: Network of LPIPS, for the header; None if no row has one.
        best: Whether the best value of a column is marked; flicker has no best value.
    """
    for name, title, number_format, direction in SCORE_COLUMNS:
        values = [None if score is None else getattr(score, name) for score in scores]
        if all(value is None for value in values):
            continue
        header = f"{title} ({network})" if name == "lpips" and network else title
        yield Column(header, number_format, group=group, best=direction if best else None), values


def _mark_partial(number: float | None, score: Score | None, header: str) -> Value:
    """Return a number of a column, with a mark if it is PSNR or SSIM of a part of the images only."""
    marked = number is not None and score is not None and score.partial_of and header in {"PSNR", "SSIM"}
    return Cell(number, PARTIAL) if marked else number


def _cost_columns(rows: Sequence[ResultRow]) -> Iterator[tuple[Column, list[float | None]]]:
    """Yield the columns of parameters, MACs and seconds, each with its values, without empty columns."""
    candidates = (
        (Column("parameters (M)", ".2f"), [_scale(row.parameters, 1e-6) for row in rows]),
        (Column("MACs (G)", ".2f"), [_scale(row.macs, 1e-9) for row in rows]),
        (Column("seconds", ".3g"), [row.seconds for row in rows]),
    )
    for column, numbers in candidates:
        if any(number is not None for number in numbers):
            yield column, numbers


def _scale(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def table_notes(rows: Sequence[ResultRow], protocol: str | None) -> list[str]:
    """Return the notes below the table: definitions, warnings, and footnotes of published rows.

    Args:
        rows: Rows of the table.
        protocol: Protocol of the scores; None if it is not defined.
    """
    notes = [f"Protocol {protocol}: {resolve([protocol])[0].definition}."] if protocol else []
    for name in set_names(rows):
        scores = [score for row in rows for score in row.scores if score.dataset == name]
        fingerprints = dict.fromkeys(score.fingerprint for score in scores if score.fingerprint)
        if len(fingerprints) > 1:
            notes.append(f"{name}: rows were scored on different images (fingerprints {', '.join(fingerprints)}).")
    if any(score.sequences for row in rows for score in row.scores):
        notes.append(f"{SEQUENCES.capitalize()}: means over the sequences of videos, instead of over all frames.")
    if any(score.flicker is not None for row in rows for score in row.scores):
        notes.append(f"{TEMPORAL.capitalize()}: {TEMPORAL_DEFINITION}.")
    for label, row in zip(row_labels(rows), rows, strict=True):
        for score in row.scores:
            if score.partial_of:
                notes.append(f"{PARTIAL} partial: {label} on {score.dataset}{_partial_suffix(score)}.")
    if any(row.macs is not None and row.note is None for row in rows):
        notes.append(
            f"MACs: at {COST_SIDE}×{COST_SIDE} pixels; one route, without CLIP; one sampling step of a diffusion."
        )
    hardware = dict.fromkeys(row.hardware for row in rows if row.seconds is not None and row.hardware)
    if hardware:
        notes.append(f"Seconds: mean per test image, averaged over the data sets; on {'; '.join(hardware)}.")
    return notes + [f"[{number}] {note}." for note, number in footnote_numbers(rows).items()]


def _partial_suffix(score: Score) -> str:
    """Return text to append to a label, such as ``, 3 of 100 images``; empty if all images of the set were scored."""
    return f", {score.count} of {score.partial_of} images" if score.partial_of else ""


def score_records(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Return one record per method and set, in full precision, for CSV and JSON."""
    records = []
    for label, row in zip(row_labels(rows), rows, strict=True):
        for score in row.scores:
            sequences = score.sequences
            sequence_means = {
                f"sequence_{name}": None if sequences is None else getattr(sequences, name)
                for name, *_ in SCORE_COLUMNS
            }
            records.append(
                {
                    "method": label,
                    "trained_on": "; ".join(row.trained_on),
                    "protocol": row.protocol,
                    "dataset": score.dataset,
                    "psnr": score.psnr,
                    "ssim": score.ssim,
                    "lpips": score.lpips,
                    "flicker": score.flicker,
                    "warping_error": score.warping_error,
                    "images": score.count,
                    "sequences": None if sequences is None else sequences.count,
                    **sequence_means,
                    "partial_of": score.partial_of,
                    "fingerprint": score.fingerprint,
                    "seconds": score.seconds,
                    "parameters": row.parameters,
                    "macs": row.macs,
                    "hardware": row.hardware,
                    "weights": row.weights_hash,
                    "file": row.file,
                    "note": row.note,
                }
            )
    return records


# Plots.


def write_plots(folder: Path, rows: Sequence[ResultRow], protocol: str, logs: Iterable[Path]) -> list[Path]:
    """Write the plots for which there are numbers.

    Args:
        folder: Folder for the plots.
        rows: Rows of the table.
        protocol: Protocol of the scores.
        logs: Files ``metrics.csv`` of runs; files without validation scores are ignored.

    Returns:
        Paths of the plots.

    Raises:
        DerainError: If a log or the scores of the images cannot be read, or matplotlib is not installed.
    """
    from derain import plots

    names = _plot_names(rows)
    written: list[Path] = []
    for dataset in set_names(rows):
        points = {}
        for name, row in zip(names, rows, strict=True):
            for score in row.scores:
                if score.dataset == dataset and score.seconds is not None:
                    points[name + _partial_suffix(score)] = (score.seconds, score.psnr)
        if points:
            file = _unused(folder / f"seconds-{_slug(dataset)}.png", written)
            written.append(plots.trade_off(file, points, dataset, protocol))
    curves = {file: epochs for file in logs if (epochs := _read_epochs(file))}
    if curves:
        runs = shorten_paths([file.parent for file in curves])
        written.append(plots.curves(folder / "curves.png", dict(zip(runs, curves.values(), strict=True))))
    for name, row in zip(names, rows, strict=True):
        for score in row.scores:
            scores = _read_image_scores(score.image_scores_file, protocol)
            if scores:
                title = name + _partial_suffix(score)
                file = _unused(folder / f"images-{_slug(title)}-{_slug(score.dataset)}.png", written)
                written.append(plots.before_and_after(file, scores, title, score.dataset, protocol))
    return written


def _plot_names(rows: Sequence[ResultRow]) -> list[str]:
    """Return the labels of the rows; the training sets are appended to labels that several rows have."""
    labels = row_labels(rows)
    names = []
    for label, row in zip(labels, rows, strict=True):
        unique = labels.count(label) == 1
        names.append(label if unique else f"{label}, trained on {'; '.join(row.trained_on) or 'unknown'}")
    return names


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")


def _unused(file: Path, written: Sequence[Path]) -> Path:
    """Return the path of a plot; a number is added if another plot has that path, since names may have equal slugs."""
    for count in itertools.count(1):
        candidate = file if count == 1 else file.with_stem(f"{file.stem}-{count}")
        if candidate not in written:
            return candidate
    raise AssertionError


def _read_epochs(file: Path) -> list[tuple[float, float]]:
    """Return epochs and their ``val/psnr`` in dB from the log of a run; empty if the log has none."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row.get("val/psnr") and row.get("epoch")]
        return [(float(row["epoch"]), float(row["val/psnr"])) for row in rows]
    except (ValueError, csv.Error) as error:
        raise DerainError(f"{file}: not a log of derain fit ({error}); omit it") from error


def _read_image_scores(file: Path | None, protocol: str) -> list[tuple[float, float]]:
    """Return the PSNR in dB of each rainy image and of its derained image; empty if there is no file."""
    if file is None or not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row["protocol"] == protocol]
        return [(float(row["rainy_psnr"]), float(row["psnr"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DerainError(f"{file}: not written by derain test ({error!r}); omit --plot") from error
