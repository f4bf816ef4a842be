"""Write the page of ``make gpu`` from its JSON files."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.items import ITEMS

INTRODUCTION = """# Benchmarks on a GPU

```
make gpu
```

Seconds are medians of up to five calls after a warm-up; those of training steps are means of twelve. The share of the
roofline is the minimum time of the device divided by the measured time. The minimum time is a sum over the operators:
for each, the larger of its operations over the measured rate of matrix products, and its bytes over the measured rate
of copies. A compiled network fuses operators and can exceed 100 %.

Photos start and end in main memory. With TF32, products of float32 are computed in TF32, also in training steps.
Weights are random, except those of the bundled model.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as Markdown.

    Args:
        results: Content of the JSON files by name of the item.
    """
    environments = [result["environment"] for result in results.values()]
    lines = [INTRODUCTION]
    for environment in [first for index, first in enumerate(environments) if first not in environments[:index]]:
        lines.append("Measured with " + ", ".join(f"{name} {value}" for name, value in environment.items()) + ".\n")
    for section, items in itertools.groupby(ITEMS, lambda item: item.section):
        found = [results[item.name] for item in items if item.name in results]
        rows = [row for result in found for row in result["rows"]]
        notes = [note for result in found for note in result["notes"]]
        if found:
            lines += [f"## {section}\n", *table(rows)]
            lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    missing = [item.name for item in ITEMS if item.name not in results]
    if missing:
        lines.append(f"Items that have not run: {', '.join(missing)}.")
    return "\n".join(lines).rstrip() + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; columns are the keys of all rows, in order of first occurrence."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return []
    body = [[cell(name, row.get(name)) for name in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *body]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def cell(name: str, value: Any) -> str:
    """Return a value as text.

    Example:
        >>> cell("share of roofline", 0.423), cell("seconds", 0.012345), cell("value", 412.7), cell("peak GiB", None)
        ('42 %', '0.0123', '413', '–')
    """
    if value is None:
        return "–"
    if name == "share of roofline":
        return f"{value:.0%}".replace("%", " %")
    return f"{value:.3g}" if isinstance(value, float) else str(value)
