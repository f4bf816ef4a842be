"""What ``derain test`` and the papers say of methods, as lines of a table."""

import importlib.resources
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from derain.errors import DerainError
from derain.images import natural_key

NAMES = {
    "CLIPRPNModule": "CLIP-RPN",
    "PLNLINGANModule": "PLNLIN-MCDDL",
    "PReNetModule": "PReNet",
    "RestormerModule": "Restormer",
    "DACLIPSDEModule": "DA-CLIP + IR-SDE",
}
"""What papers call the methods."""

TESTED_BY = {"RainTrainL": "Rain100L", "RainTrainH": "Rain100H", "RainTrainH-full": "Rain100H"}
"""Test sets of training sets, where they go by another name."""

MIXED = {"Rain100L", "Rain100H", "Rain800"}
"""What CLIP-RPN's authors call Mixed."""


@dataclass(frozen=True)
class Score:
    """A method's numbers on one set.

    Attributes:
        dataset: The set.
        psnr: In dB.
        ssim: At most 1.
        lpips: If it was computed.
        images: How many were evaluated.
        partial_of: How many the set has, where only some were evaluated.
        fingerprint: Of the images.
        each: The file of every image's scores.
        seconds: An image, mean.
    """

    dataset: str
    psnr: float
    ssim: float
    lpips: float | None = None
    images: int | None = None
    fingerprint: str | None = None
    each: Path | None = None
    seconds: float | None = None
    partial_of: int | None = None


@dataclass(frozen=True)
class ResultRow:
    """A line of the table.

    Attributes:
        method: As papers call it.
        details: Hyper-parameters and sampling.
        trained_on: Names of training sets, or what a paper says of them.
        protocol: How images were judged.
        scores: One a set.
        weights: Start of the hash of the file of weights, or of several.
        file: ``summary.json``, or the table of a paper.
        described: What rebuilds the method.
        parameters: Of the network.
        macs: Multiplications for an image.
        hardware: Where seconds were measured.
        lpips_net: What LPIPS compared with.
        note: What a reader must know of a published row.
    """

    method: str
    details: dict[str, Any]
    trained_on: tuple[str, ...]
    protocol: str | None
    scores: tuple[Score, ...]
    weights: str | None
    file: str
    described: dict[str, Any] = field(default_factory=dict)
    parameters: float | None = None
    macs: float | None = None
    hardware: str | None = None
    lpips_net: str | None = None
    note: str | None = None

    @property
    def seconds(self) -> float | None:
        """An image, mean over the sets."""
        told = [score.seconds for score in self.scores if score.seconds is not None]
        return sum(told) / len(told) if told else None


def find_files(places: Iterable[Path], name: str) -> list[Path]:
    """Files of a name, given or anywhere below folders.

    Raises:
        DerainError: If a place is neither a folder nor a file.
    """
    found: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise DerainError(f"{place}: no such file or folder; give summary.json files, or folders that hold some")
        below = sorted(place.rglob(name), key=natural_key) if place.is_dir() else [place]
        found |= {file.resolve(): file for file in below if place.is_dir() or place.suffix == Path(name).suffix}
    return list(found.values())


def read_summary(file: Path) -> dict[str, Any]:
    """Reads a summary.

    Raises:
        DerainError: If it is none of ``derain test``.
    """
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not summary["results"]:
            raise ValueError("it holds no results")
        described, data = summary["method"], summary["data"]
        _ = described["method"], described["hyper_parameters"], data["sets"], data["fingerprint"]
        _ = int(data["images"]), int(data.get("images_in_sets", 0))
        _ = [(one["protocol"], float(one["psnr"]), float(one["ssim"])) for one in summary["results"]]
        return dict(summary)
    except (ValueError, KeyError, TypeError) as error:
        raise DerainError(f"{file}: no summary of derain test ({error}); leave it out") from error


def select_protocol(
    summaries: Sequence[tuple[Path, dict[str, Any]]], wanted: str | None
) -> tuple[list[ResultRow], str]:
    """Takes the results by one protocol, one row a summary.

    Args:
        summaries: Files and what they hold.
        wanted: The protocol, if it was chosen.

    Returns:
        The rows, and the protocol's name.

    Raises:
        DerainError: If results follow several protocols and none was chosen, or one has none by the chosen one.
    """
    counts = Counter(one["protocol"] for _, summary in summaries for one in summary["results"])
    if wanted is None and len(counts) > 1:
        told = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        raise DerainError(f"results by several protocols cannot be compared: {told}; choose one by --protocol")
    protocol = wanted or next(iter(counts))
    rows = []
    for file, summary in summaries:
        results = [one for one in summary["results"] if one["protocol"] == protocol]
        if not results:
            has = ", ".join(one["protocol"] for one in summary["results"])
            raise DerainError(f"{file}: has no results by {protocol}, only by {has}; test again by it, or leave it out")
        rows.append(_row(file, summary, results[0]))
    nets = {row.lpips_net for row in rows if row.lpips_net}
    if len(nets) > 1:
        raise DerainError(f"LPIPS by several networks cannot be compared: {', '.join(sorted(nets))}; test by one")
    return rows, protocol


def _row(file: Path, summary: dict[str, Any], result: dict[str, Any]) -> ResultRow:
    described, sampling = summary["method"], summary.get("sampling")
    details = {key: value for key, value in described["hyper_parameters"].items() if key != "clip"}
    method = described.get("architecture") or NAMES.get(described["method"], described["method"])
    if details.get("contexts") == "none":
        method = "IR-SDE"
    if sampling:
        details["sampling"] = f"{sampling['solver']}, steps {sampling['steps'] or 'all'}"
    weights, hardware = summary.get("weights"), summary.get("hardware")
    total = summary["data"].get("images_in_sets", summary["data"]["images"])
    images = result.get("count", total)
    return ResultRow(
        method,
        details,
        tuple(described.get("trained_on") or ()),
        result["protocol"],
        (
            Score(
                dataset_name(summary["data"]["sets"]),
                result["psnr"],
                result["ssim"],
                result.get("lpips"),
                images,
                summary["data"]["fingerprint"],
                file.with_name("images.csv"),
                summary.get("seconds"),
                total if total > images else None,
            ),
        ),
        weights["sha256"][:8] if weights else None,
        str(file),
        described,
        hardware=hardware and f"{hardware['device']}, {hardware['precision']}",
        lpips_net=summary.get("lpips_net") if "lpips" in result else None,
    )


def dataset_name(sets: str | list[str]) -> str:
    """What a set or several are called in a table.

    Example:
        >>> dataset_name(["Rain800", "Rain100H", "Rain100L"]), dataset_name(["a", "b"]), dataset_name("data/Rain12")
        ('Mixed', 'a + b', 'Rain12')
    """
    names = [Path(name).name for name in ([sets] if isinstance(sets, str) else sets)]
    return "Mixed" if set(names) == MIXED else " + ".join(names)


def merge_rows(found: Sequence[ResultRow]) -> list[ResultRow]:
    """Puts results of one method on several sets into one line, as papers do.

    A line is of one file of weights, or of several that were each trained for the one set that they were tested on.
    Where a method was tested on a set twice, nothing is put together that would hide it.
    """
    rows: list[ResultRow] = []
    for _, kin in _groups(found, lambda row: (row.method, row.details)):
        lines: list[list[ResultRow]] = []
        for weights, members in _groups(kin, lambda row: row.weights):
            lines += [members] if weights and _once(members) else [[row] for row in members]
        single = [line for line in lines if len(line) == 1 and _own(line[0])]
        together = [row for line in single for row in line]
        if _once(together) and together:
            lines = [together, *(line for line in lines if line not in single)]
        rows += map(_joined, lines)
    return rows


def _once(rows: Sequence[ResultRow]) -> bool:
    """Whether no set occurs twice."""
    return len({row.scores[0].dataset for row in rows}) == len(rows)


def _own(row: ResultRow) -> bool:
    """Whether weights were trained on what belongs to the set that they are tested on."""
    name = row.scores[0].dataset
    return {TESTED_BY.get(one, one) for one in row.trained_on} == (MIXED if name == "Mixed" else {name})


def _groups(rows: Iterable[ResultRow], key: Callable[[ResultRow], Any]) -> list[tuple[Any, list[ResultRow]]]:
    """Rows that agree in a key, which need not be hashable, in the order they came."""
    groups: list[tuple[Any, list[ResultRow]]] = []
    for row in rows:
        mine = key(row)
        for other, members in groups:
            if other == mine:
                members.append(row)
                break
        else:
            groups.append((mine, [row]))
    return groups


def _joined(rows: list[ResultRow]) -> ResultRow:
    """One line of several; what differs is told side by side."""
    sets = tuple(dict.fromkeys(name for row in rows for name in row.trained_on))
    return replace(
        rows[0],
        trained_on=sets,
        scores=tuple(score for row in rows for score in row.scores),
        weights=", ".join(dict.fromkeys(row.weights for row in rows if row.weights)) or None,
        file=", ".join(row.file for row in rows),
        hardware="; ".join(dict.fromkeys(row.hardware for row in rows if row.hardware)) or None,
        lpips_net=next((row.lpips_net for row in rows if row.lpips_net), None),
    )


def published_rows(sets: set[str], protocol: str) -> list[ResultRow]:
    """Rows of the papers that have numbers on any of the sets; a note says what they stand on."""
    text = (importlib.resources.files("derain") / "published.yaml").read_text(encoding="utf-8")
    rows = []
    for table in yaml.safe_load(text):
        judged = f"protocol {table['protocol']}, " if table["protocol"] else ""
        other = "" if table["protocol"] == protocol else f"; another protocol than {protocol}: not to be compared"
        cost = f"; {table['cost']}" if "cost" in table else ""
        note = f"published: {table['source']}: {judged}{table['told']}; trained on {table['trained_on']}{cost}{other}"
        for method, numbers in table["methods"].items():
            scores = tuple(Score(name, *values) for name, values in numbers["results"].items() if name in sets)
            millions, billions = numbers.get("cost", (None, None))
            if scores:
                rows.append(
                    ResultRow(
                        method,
                        {},
                        (),
                        table["protocol"],
                        scores,
                        None,
                        table["source"],
                        parameters=millions and millions * 1e6,
                        macs=billions and billions * 1e9,
                        note="; ".join([note, *([numbers["doubt"]] if "doubt" in numbers else [])]),
                    )
                )
    return rows


def row_labels(rows: Sequence[ResultRow]) -> list[str]:
    """Names of the rows: the method, where it differs from another row of it, and weights or file where it does not."""
    told = []
    for row in rows:
        kin = [other for other in rows if other.method == row.method and other.note is None]
        if row.note is not None:
            told.append(row.method)
            continue
        differing = [key for key in row.details if any(other.details.get(key) != row.details[key] for other in kin)]
        told.append(", ".join([row.method, *(_detail(key, row.details[key]) for key in differing)]))
    ours = [place for place, row in enumerate(rows) if row.note is None]
    files = dict(zip(ours, shorten_paths([Path(rows[place].file) for place in ours]), strict=True))
    for known in ({place: rows[place].weights or "no weights" for place in ours}, files):
        seen = Counter((told[place], rows[place].trained_on) for place in ours)
        twice = [place for place in ours if seen[told[place], rows[place].trained_on] > 1]
        for place in twice:
            told[place] += f" [{known[place]}]"
    return told


def shorten_paths(paths: Sequence[Path]) -> list[str]:
    """Names of several places without the folders that they have in common.

    Example:
        >>> shorten_paths([Path("/runs/a/fit-1"), Path("/runs/b/fit-1")]), shorten_paths([Path("/runs/a/fit-1")])
        (['a/fit-1', 'b/fit-1'], ['fit-1'])
    """
    parts = [path.resolve().parts for path in paths]
    same = 0
    while parts and all(len(one) > same + 1 and one[same] == parts[0][same] for one in parts):
        same += 1
    return ["/".join(one[same:]) for one in parts]


def _detail(key: str, value: Any) -> str:
    if key == "sampling":
        return str(value)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{key} {Path(value).name if isinstance(value, str) and '/' in value else value}"
