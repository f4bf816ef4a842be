"""List the models that are loaded by name, or show a model card."""

import sys

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from derain.errors import DerainError
from derain.models import bundled, public


def list_models(*, all: bool = False) -> int:
    """List the bundled models by the name that --weights accepts, with method, size and training sets.

    Args:
        all: Also list public models of other people, which are downloaded from the Hugging Face hub on first use.
    """
    from derain.files.weights import read

    table = Table("name", "method", "parameters", "MB", "trained on", title_justify="left")
    for name, file in bundled().items():
        content = read(file)
        parameters = sum(tensor.numel() for tensor in content.state.values())
        table.add_row(
            name,
            content.metadata.get("title") or content.metadata["method"],
            f"{parameters:,}",
            f"{file.stat().st_size / 1e6:.1f}",
            ", ".join(content.metadata["trained_on"]),
        )
    console = Console()
    console.print(table)
    if all:
        console.print(_public_table())
    more = "" if all else "derain models list --all, "
    console.print(f"further models: {more}--weights hub:OWNER/NAME, or a file", highlight=False)
    return 0


def _public_table() -> Table:
    table = Table("name", "method", "licence", "trained on", title="downloaded from the Hugging Face hub on first use")
    table.columns[0].no_wrap = True
    for name, model in public().items():
        table.add_row(name, model.method, model.licence, ", ".join(model.trained_on))
    return table


def show_model(name: str = "default") -> int:
    """Show a model card: for bundled models, training data and its terms, training budget, results and limits.

    Public models have a short card: source, licence, training sets and published results.

    Args:
        name: Name from derain models list --all.

    Raises:
        DerainError: If there is no such model.
    """
    models = bundled()
    if name in public():
        print(_public_card(name), end="")
        return 0
    if name not in models:
        raise DerainError(f"no model {name!r}; choose {', '.join([*models, *public()])}")
    card = models[name].with_suffix(".md").read_text(encoding="utf-8")
    if sys.stdout.isatty():
        Console(width=100).print(Markdown(card))
    else:
        print(card, end="")
    return 0


def _public_card(name: str) -> str:
    """Return a short card of a public model."""
    model = public()[name]
    lines = [
        f"{name}: {model.method}",
        f"downloaded on first use from https://huggingface.co/{model.hub} ({model.file})",
        f"licence: {model.licence}",
        f"trained on: {', '.join(model.trained_on)}",
    ]
    if model.published:
        lines.append("published results in RGB, not reproduced by derain (PSNR in dB, SSIM):")
        lines += [f"  {dataset}: {psnr:.2f}, {ssim:.3f}" for dataset, (psnr, ssim) in model.published.items()]
    return "".join(f"{line}\n" for line in lines)


SUBCOMMANDS = {"list": list_models, "info": show_model}
