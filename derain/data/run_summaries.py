"""Results of ``derain test`` and of papers, as rows of a table."""

import importlib.resources
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from derain.errors import DerainError
from derain.listing import natural_key

NAMES = {
    "CLIPRPNModule": "CLIP-RPN",
    "PLNLINGANModule": "PLNLIN-MCDDL",
    "PReNetModule": "PReNet",
    "RestormerModule": "Restormer",
    "DACLIPSDEModule": "DA-CLIP + IR-SDE",
}
"""Names of methods in papers, by class."""

TEST_SETS = {"RainTrainL": "Rain100L", "RainTrainH": "Rain100H", "RainTrainH-full": "Rain100H"}
"""Test sets by training set, where the two have different names."""

MIXED = {"Rain100L", "Rain100H", "Rain800"}
"""Data sets that CLIP-RPN's authors combine as Mixed."""


@dataclass(frozen=True)
class Score:
    """Mean scores of a method over the images, or over the sequences, of one data set.

    Attributes:
        dataset: Name of the data set; ``Mixed`` or ``A + B`` for several (`dataset_name`).
        psnr: PSNR in dB.
        ssim: SSIM, at most 1.
        lpips: LPIPS; None if it was not computed.
        count: Number of evaluated images, or of their sequences. This and the following attributes are None for
            published scores.
        fingerprint: Hash of the images.
        image_scores_file: File with the scores of each image.
        seconds: Mean time per image in seconds.
        partial_of: Number of images in the data set; None if all were evaluated.
        flicker: Mean absolute difference of consecutive frames in 8-bit levels; None if it was not computed.
        warping_error: Warping error (see `derain.metrics.temporal`); None if it was not computed.
        sequences: Means over the sequences of videos; None without videos.
    """

    dataset: str
    psnr: float
    ssim: float
    lpips: float | None = None
    count: int | None = None
    fingerprint: str | None = None
    image_scores_file: Path | None = None
    seconds: float | None = None
    partial_of: int | None = None
    flicker: float | None = None
    warping_error: float | None = None
    sequences: "Score | None" = None


@dataclass(frozen=True)
class ResultRow:
    """Row of a table of results, measured by derain or published.

    Attributes:
        method: Name of the network or method.
        details: Hyper-parameters and sampling options.
        trained_on: Names of the training sets.
        protocol: Evaluation protocol; None if a paper's is unknown.
        scores: One per data set.
        weights_hash: First 8 hexadecimal digits of the SHA-256 of the weights file; those of several files are
            separated by commas; None if unknown.
        file: Path of ``summary.json``, or several paths separated by commas; the source of a published row.
        metadata: Metadata of the weights, from which the method can be built; empty for a published row.
        parameters: Number of parameters of the network, as published.
        macs: Multiply-accumulate operations per image, as published; the note states the image size.
        hardware: Device and precision with which the time was measured.
        lpips_net: Network of LPIPS; None without LPIPS.
        note: Source and caveats of a published row; None for measured results.
    """

    method: str
    details: dict[str, Any]
    trained_on: tuple[str, ...]
    protocol: str | None
    scores: tuple[Score, ...]
    weights_hash: str | None
    file: str
    metadata: dict[str, Any] = field(default_factory=dict)
    parameters: float | None = None
    macs: float | None = None
    hardware: str | None = None
    lpips_net: str | None = None
    note: str | None = None

    @property
    def seconds(self) -> float | None:
        """Mean over the data sets of the mean time per image, in seconds; None if no time is known."""
        seconds = [score.seconds for score in self.scores if score.seconds is not None]
        return sum(seconds) / len(seconds) if seconds else None


def find_files(paths: Iterable[Path], name: str) -> list[Path]:
    """Return the given files, and all files called ``name`` below the given folders, each once.

    Args:
        paths: Files and folders. Given files with another suffix than that of ``name`` are ignored, since a pattern
            such as ``runs/*`` may match them.
        name: Name of the files in folders, such as ``summary.json``.

    Raises:
        DerainError: If a path is neither a folder nor a file.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob(name), key=natural_key):
                files[file.resolve()] = file
        elif not path.exists():
            raise DerainError(f"{path}: no such file or folder; give {name} files, or folders that contain some")
        elif path.suffix == Path(name).suffix:
            files[path.resolve()] = path
    return list(files.values())


def read_summary(file: Path) -> dict[str, Any]:
    """Read a summary written by ``derain test``.

    Raises:
        DerainError: If the file is not such a summary.
    """
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        _check_summary(summary)
    except (ValueError, KeyError, TypeError) as error:
        raise DerainError(f"{file}: not a summary of derain test ({error}); omit the file") from error
    return dict(summary)


def _check_summary(summary: Any) -> None:
    """Access all required fields, so that a missing or invalid one raises."""
    method, data = summary["method"], summary["data"]
    for key in ("method", "hyper_parameters"):
        method[key]
    for key in ("sets", "fingerprint"):
        data[key]
    int(data["images"])
    int(data.get("images_in_sets", 0))
    if not summary["results"]:
        raise ValueError("it contains no results")
    for result in summary["results"]:
        result["protocol"]
        float(result["psnr"])
        float(result["ssim"])
        if "sequences" in result:
            int(result["sequences"]["count"])
            float(result["sequences"]["psnr"])
            float(result["sequences"]["ssim"])


def select_protocol(
    summaries: Sequence[tuple[Path, dict[str, Any]]], protocol: str | None
) -> tuple[list[ResultRow], str]:
    """Return the results under one protocol, one row per summary, and the name of the protocol.

    Args:
        summaries: Files and their contents; at least one.
        protocol: Name of the protocol; None if all results have the same one.

    Raises:
        DerainError: If the protocol is not given and results have several; if a summary has no results under it; or if
            LPIPS was computed by several networks.
    """
    counts = Counter(result["protocol"] for _, summary in summaries for result in summary["results"])
    if protocol is None:
        if len(counts) > 1:
            listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
            raise DerainError(f"cannot compare results under several protocols: {listed}; choose one by --protocol")
        protocol = next(iter(counts))
    rows = []
    for file, summary in summaries:
        results = [result for result in summary["results"] if result["protocol"] == protocol]
        if not results:
            available = ", ".join(result["protocol"] for result in summary["results"])
            raise DerainError(
                f"{file}: no results under {protocol}, only under {available}; test again under {protocol}, or omit "
                "the file"
            )
        rows.append(_to_row(file, summary, results[0]))
    nets = {row.lpips_net for row in rows if row.lpips_net}
    if len(nets) > 1:
        raise DerainError(f"cannot compare LPIPS of several networks: {', '.join(sorted(nets))}; test with one of them")
    return rows, protocol


def _to_row(file: Path, summary: dict[str, Any], result: dict[str, Any]) -> ResultRow:
    metadata, data = summary["method"], summary["data"]
    sampling, weights, hardware = summary.get("sampling"), summary.get("weights"), summary.get("hardware")
    details = {key: value for key, value in metadata["hyper_parameters"].items() if key != "clip"}
    title = metadata.get("architecture") or metadata.get("title")
    method = title or NAMES.get(metadata["method"], metadata["method"])
    if details.get("contexts") == "none":  # without the contexts of DA-CLIP
        method = "IR-SDE"
    if sampling:
        details["sampling"] = f"{sampling['solver']}, steps {sampling['steps'] or 'all'}"
    total = data.get("images_in_sets", data["images"])
    count = result.get("count", total)
    dataset = dataset_name(data["sets"])
    sequences = result.get("sequences")
    score = Score(
        **_means(dataset, result),
        count=count,
        fingerprint=data["fingerprint"],
        image_scores_file=file.with_name("images.csv"),
        seconds=summary.get("seconds"),
        partial_of=total if total > count else None,
        sequences=Score(**_means(dataset, sequences), count=sequences["count"]) if sequences else None,
    )
    return ResultRow(
        method=method,
        details=details,
        trained_on=tuple(metadata.get("trained_on") or ()),
        protocol=result["protocol"],
        scores=(score,),
        weights_hash=weights["sha256"][:8] if weights else None,
        file=str(file),
        metadata=metadata,
        hardware=f"{hardware['device']}, {hardware['precision']}" if hardware else None,
        lpips_net=summary.get("lpips_net") if "lpips" in result else None,
    )


def _means(dataset: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Score` that are means."""
    means = {name: result.get(name) for name in ("psnr", "ssim", "lpips", "flicker", "warping_error")}
    return {"dataset": dataset, **means}


def dataset_name(sets: str | list[str]) -> str:
    """Return the name of one or several data sets in a table.

    Example:
        >>> dataset_name(["Rain800", "Rain100H", "Rain100L"]), dataset_name(["a", "b"]), dataset_name("data/Rain12")
        ('Mixed', 'a + b', 'Rain12')
    """
    paths = [sets] if isinstance(sets, str) else sets
    names = [Path(path).name for path in paths]
    return "Mixed" if set(names) == MIXED else " + ".join(names)


def merge_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Merge the results of one method with equal details on several data sets into one row, as papers do.

    A merged row has the results of a single weights file, or those of several files, each of which was trained for the
    data set that it was tested on. Rows that were tested on the same data set are not merged, since that would hide a
    result.
    """
    merged: list[ResultRow] = []
    for same_method in _group(rows, lambda row: (row.method, row.details)):
        groups: list[list[ResultRow]] = []
        for same_weights in _group(same_method, lambda row: row.weights_hash):
            if same_weights[0].weights_hash and _distinct_sets(same_weights):
                groups.append(same_weights)
            else:
                groups += [[row] for row in same_weights]
        specialised = [group for group in groups if len(group) == 1 and _trained_for_its_set(group[0])]
        specialised_rows = [group[0] for group in specialised]
        if specialised and _distinct_sets(specialised_rows):
            groups = [specialised_rows, *(group for group in groups if group not in specialised)]
        merged += [_merge(group) for group in groups]
    return merged


def _distinct_sets(rows: Sequence[ResultRow]) -> bool:
    return len({row.scores[0].dataset for row in rows}) == len(rows)


def _trained_for_its_set(row: ResultRow) -> bool:
    """Return whether the weights were trained only on the training set that belongs to the test set."""
    name = row.scores[0].dataset
    expected = MIXED if name == "Mixed" else {name}
    return {TEST_SETS.get(training_set, training_set) for training_set in row.trained_on} == expected


def _group(rows: Iterable[ResultRow], key: Callable[[ResultRow], Any]) -> list[list[ResultRow]]:
    """Group rows by a key, which need not be hashable, in order of first occurrence."""
    groups: list[tuple[Any, list[ResultRow]]] = []
    for row in rows:
        row_key = key(row)
        for group_key, group in groups:
            if group_key == row_key:
                group.append(row)
                break
        else:
            groups.append((row_key, [row]))
    return [group for _, group in groups]


def _merge(rows: list[ResultRow]) -> ResultRow:
    """Merge rows of one method into one; different training sets, weights, files and hardware are listed."""
    training_sets = dict.fromkeys(name for row in rows for name in row.trained_on)
    weights_hashes = dict.fromkeys(row.weights_hash for row in rows if row.weights_hash)
    hardware = dict.fromkeys(row.hardware for row in rows if row.hardware)
    lpips_nets = [row.lpips_net for row in rows if row.lpips_net]
    return replace(
        rows[0],
        trained_on=tuple(training_sets),
        scores=tuple(score for row in rows for score in row.scores),
        weights_hash=", ".join(weights_hashes) or None,
        file=", ".join(row.file for row in rows),
        hardware="; ".join(hardware) or None,
        lpips_net=lpips_nets[0] if lpips_nets else None,
    )


def published_tables() -> dict[str, dict[str, Any]]:
    """Return the published tables in ``published.yaml`` by their ids, such as ``cliprpn:3``."""
    text = (importlib.resources.files("derain") / "published.yaml").read_text(encoding="utf-8")
    return {table["id"]: table for table in yaml.safe_load(text)}


def published_table(paper: str) -> dict[str, Any]:
    """Return the published table with an id such as ``cliprpn:3``.

    Raises:
        DerainError: If there is no such table.
    """
    tables = published_tables()
    if paper not in tables:
        raise DerainError(f"--paper {paper}: expected one of {', '.join(tables)}")
    return tables[paper]


def published_rows(sets: set[str], protocol: str | None, paper: str | None = None) -> list[ResultRow]:
    """Return the published rows with scores on any of the data sets; scores on other data sets are omitted.

    Args:
        sets: Names of the data sets.
        protocol: Protocol of the results to compare with; None if there are none. The note of a row under another
            protocol says that the row is not comparable.
        paper: Id of the table; by default all tables except those of ablations.

    Raises:
        DerainError: If there is no table with this id.
    """
    tables = (
        [published_table(paper)]
        if paper
        else [table for table in published_tables().values() if not table.get("ablation")]
    )
    rows = []
    for table in tables:
        note = _table_note(table, protocol)
        for method, entry in table["methods"].items():
            scores = tuple(Score(name, *values) for name, values in entry["results"].items() if name in sets)
            if not scores:
                continue
            millions, billions = entry.get("cost", (None, None))
            row = ResultRow(
                method=method,
                details={},
                trained_on=(),
                protocol=table["protocol"],
                scores=scores,
                weights_hash=None,
                file=table["source"],
                parameters=millions * 1e6 if millions else None,
                macs=billions * 1e9 if billions else None,
                note=f"{note}; {entry['caveat']}" if "caveat" in entry else note,
            )
            rows.append(row)
    return rows


def _table_note(table: dict[str, Any], protocol: str | None) -> str:
    """Return the note on a published table: source, evaluation, training, cost, and whether it can be compared."""
    evaluation = f"protocol {table['protocol']}, {table['evaluation']}" if table["protocol"] else table["evaluation"]
    parts = [f"published: {table['source']}: {evaluation}", f"trained on {table['trained_on']}"]
    if "cost" in table:
        parts.append(table["cost"])
    if protocol is not None and table["protocol"] != protocol:
        parts.append(f"not comparable: protocol differs from {protocol}")
    return "; ".join(parts)


def row_labels(rows: Sequence[ResultRow]) -> list[str]:
    """Return the labels of the rows.

    The label of a published row is its method. The label of a measured row adds the details that differ between the
    measured rows of the method. If measured rows with equal training sets still have equal labels, the hash of the
    weights is added; if that does not suffice, the shortened path of the file is added as well.
    """
    labels = []
    for row in rows:
        details = [] if row.note is not None else _differing_details(row, rows)
        labels.append(", ".join([row.method, *details]))
    measured_indices = [index for index, row in enumerate(rows) if row.note is None]
    weights_hashes = [rows[index].weights_hash or "no weights" for index in measured_indices]
    files = shorten_paths([Path(rows[index].file) for index in measured_indices])
    for suffixes in (weights_hashes, files):
        counts = Counter((labels[index], rows[index].trained_on) for index in measured_indices)
        ambiguous = [counts[labels[index], rows[index].trained_on] > 1 for index in measured_indices]
        for index, suffix, is_ambiguous in zip(measured_indices, suffixes, ambiguous, strict=True):
            if is_ambiguous:
                labels[index] += f" [{suffix}]"
    return labels


def _differing_details(row: ResultRow, rows: Sequence[ResultRow]) -> list[str]:
    """Return the row's details that differ between measured rows of the same method, as text."""
    same_method = [candidate for candidate in rows if candidate.method == row.method and candidate.note is None]
    details = []
    for key, value in row.details.items():
        if any(candidate.details.get(key) != value for candidate in same_method):
            details.append(_format_detail(key, value))
    return details


def shorten_paths(paths: Sequence[Path]) -> list[str]:
    """Return paths, made absolute, without the leading folders that they have in common.

    Example:
        >>> shorten_paths([Path("/runs/a/fit-1"), Path("/runs/b/fit-1")]), shorten_paths([Path("/runs/a/fit-1")])
        (['a/fit-1', 'b/fit-1'], ['fit-1'])
    """
    all_parts = [path.resolve().parts for path in paths]
    common = 0
    while all_parts and all(len(parts) > common + 1 and parts[common] == all_parts[0][common] for parts in all_parts):
        common += 1
    return ["/".join(parts[common:]) for parts in all_parts]


def _format_detail(key: str, value: Any) -> str:
    if key == "sampling":
        return str(value)
    if isinstance(value, list):
        return f"{key} {' '.join(map(str, value))}"
    if isinstance(value, str) and "/" in value:
        return f"{key} {Path(value).name}"
    return f"{key} {value}"
