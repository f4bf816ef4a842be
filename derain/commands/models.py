"""List the weights that derain ships, or tell where one comes from and what it gives."""

import argparse
import sys

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from derain.errors import DerainError
from derain.models import bundled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the tasks."""
    tasks = parser.add_subparsers(title="tasks", dest="task", required=True, metavar="TASK")
    tasks.add_parser("list", help="names for --weights, with method, size and training sets")
    info = tasks.add_parser("info", help="the model card: data and their terms, budget, results, limits")
    info.add_argument("name", nargs="?", default="default")


def run(args: argparse.Namespace) -> int:
    """Prints a table, or a card: rendered on a terminal, as Markdown elsewhere."""
    shipped = bundled()
    if args.task == "list":
        from derain.files.weights import read

        table = Table("name", "method", "parameters", "MB", "trained on", title_justify="left")
        for name, file in shipped.items():
            content = read(file)
            told, size = content.metadata, file.stat().st_size / 1e6
            count = sum(tensor.numel() for tensor in content.state.values())
            table.add_row(name, told["method"], f"{count:,}", f"{size:.1f}", ", ".join(told["trained_on"]))
        console = Console()
        console.print(table)
        console.print("others: --weights hub:OWNER/NAME, or a file", highlight=False)
        return 0
    if args.name not in shipped:
        raise DerainError(f"no model {args.name!r} in the box; known are {', '.join(shipped)}")
    card = shipped[args.name].with_suffix(".md").read_text(encoding="utf-8")
    if sys.stdout.isatty():
        Console(width=100).print(Markdown(card))
    else:
        print(card, end="")
    return 0
