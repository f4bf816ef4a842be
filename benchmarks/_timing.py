"""Time variants in alternation, and print tables of the results."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

Times = tuple[float, float]
"""Wall-clock time and processor time in seconds."""


def time_alternately(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Return the median times of each variant; each round runs all variants, after a warm-up round."""
    times: dict[str, list[Times]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    medians = {}
    for name, measured in times.items():
        walls, processors = zip(*measured[1:], strict=True)
        medians[name] = (statistics.median(walls), statistics.median(processors))
    return medians


def report(title: str, times: Mapping[str, Times], differences: Mapping[str, float] | None = None) -> float:
    """Print a table of at least two variants, compared with the first.

    Args:
        title: Title of the table.
        times: Times of each variant.
        differences: Maximum difference of each variant's output from that of a reference.

    Returns:
        The speed-up of the second variant over the first, by wall-clock time.
    """
    columns = ["variant", "seconds", "speed-up", "processor seconds", "speed-up"]
    if differences:
        columns.append("max. difference")
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    (first_wall, first_processor), (second_wall, _), *_ = times.values()
    for variant, (wall, processor) in times.items():
        row = [
            variant,
            f"{wall:.2f}",
            f"{first_wall / wall:.2f}",
            f"{processor:.2f}",
            f"{first_processor / processor:.2f}",
        ]
        if differences:
            row.append(f"{differences[variant]:.0e}")
        table.add_row(*row)
    Console(width=110).print(table)
    return first_wall / second_wall


def references(method: str) -> ModuleType:
    """Return the module with the textbook form of a method, ``tests/methods/METHOD/references.py``."""
    path = Path(__file__).parents[1] / "tests" / "methods" / method / "references.py"
    spec = importlib.util.spec_from_file_location(f"{method}_references", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
