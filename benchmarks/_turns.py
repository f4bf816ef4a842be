"""Ways that take turns, and the tables of their times."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

Times = tuple[float, float]
"""Seconds by the clock and of the processors."""


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Median times of every way, measured in turns after one round that warms up."""
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start, worked = time.perf_counter(), time.process_time()
            way()
            times[name].append((time.perf_counter() - start, time.process_time() - worked))
    return {name: tuple(map(statistics.median, zip(*found[1:], strict=True))) for name, found in times.items()}


def report(title: str, times: Mapping[str, Times], apart: Mapping[str, float] | None = None) -> float:
    """Prints a table of ways against the first of them, and how far from its output they are.

    Returns:
        How many times as fast the second way is as the first, by the clock.
    """
    table = Table(title=title)
    columns = ["way", "seconds", "times as fast", "of processors", "times as fast"] + ["furthest apart"] * bool(apart)
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    first, second, *_ = times.values()
    for way, own in times.items():
        ratios = [f"{reference / mine:.2f}" for reference, mine in zip(first, own, strict=True)]
        far = [f"{apart[way]:.0e}"] if apart else []
        table.add_row(way, f"{own[0]:.2f}", ratios[0], f"{own[1]:.2f}", ratios[1], *far)
    Console(width=110).print(table)
    return first[0] / second[0]


def references(method: str) -> ModuleType:
    """The textbook forms of a method that its tests check against, ``tests/methods/METHOD/references.py``."""
    path = Path(__file__).parents[1] / "tests" / "methods" / method / "references.py"
    spec = importlib.util.spec_from_file_location(f"{method}_references", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
