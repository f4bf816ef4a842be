"""List the bundled models, or show a model card."""

import sys

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from derain.errors import DerainError
from derain.models import bundled


def list_models() -> int:
    """List the names for --weights, with method, size and training sets."""
    from derain.files.weights import read

    table = Table("name", "method", "parameters", "MB", "trained on", title_justify="left")
    for name, file in bundled().items():
        content = read(file)
        parameters = sum(tensor.numel() for tensor in content.state.values())
        table.add_row(
            name,
            content.metadata["method"],
            f"{parameters:,}",
            f"{file.stat().st_size / 1e6:.1f}",
            ", ".join(content.metadata["trained_on"]),
        )
    console = Console()
    console.print(table)
    console.print("further models: --weights hub:OWNER/NAME, or a file", highlight=False)
    return 0


def show_model(name: str = "default") -> int:
    """Show the model card: training data and its terms, budget, results, limits.

    Args:
        name: Name of a bundled model.

    Raises:
        DerainError: If there is no such model.
    """
    models = bundled()
    if name not in models:
        raise DerainError(f"no bundled model {name!r}; choose {', '.join(models)}")
    card = models[name].with_suffix(".md").read_text(encoding="utf-8")
    if sys.stdout.isatty():
        Console(width=100).print(Markdown(card))
    else:
        print(card, end="")
    return 0


SUBCOMMANDS = {"list": list_models, "info": show_model}
