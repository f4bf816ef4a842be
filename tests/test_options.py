from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from derain.errors import DerainError
from derain.options import CommandParser


def command(
    source: str,
    target: Path | None = None,
    *,
    form: Literal["text", "json"] = "text",
    steps: int | None = None,
    max_size: float = 1.5,
    names: Sequence[str] = ("a", "b"),
    overwrite: bool = False,
) -> int:
    """Do something.

    Args:
        source: Input, 100 %.
        target: Output.
        form: Form
            of the output.
        steps: Steps.
        max_size: Largest size.
        names: Names.
        overwrite: Overwrite.

    Raises:
        DerainError: Never.
    """
    return 0


PARSER = CommandParser("derain command", command)


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("in", {"source": "in", "target": None}),
        ("in out", {"source": "in", "target": Path("out")}),
        ("in out --form json --steps 3", {"source": "in", "target": Path("out"), "form": "json", "steps": 3}),
        ("in out --max-size=2", {"source": "in", "target": Path("out"), "max_size": 2.0}),
        ("in out --names x y --names z", {"source": "in", "target": Path("out"), "names": ["x", "y", "z"]}),
        ("in out --overwrite", {"source": "in", "target": Path("out"), "overwrite": True}),
    ],
)
def test_arguments_have_the_types_of_the_signature(line, arguments):
    assert PARSER.parse(line.split()) == arguments


def test_help_is_the_docstring():
    text = " ".join(PARSER.format_help().split())
    for part in (
        "Do something.",
        "Input, 100 %",
        "Form of the output (default text)",
        "(default 1.5)",
        "(default a b)",
    ):
        assert part in text
    assert "Never" not in text


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", "source"),
        ("in out more", "more"),
        ("in --sizes 3", "--sizes"),
        ("in --max_size 3", "--max-size?"),
        ("in --steps x", "'x'"),
        ("in --form xml", "'xml'"),
        ("in --names", "--names"),
    ],
)
def test_wrong_arguments_are_refused(line, value):
    with pytest.raises(DerainError, match=value.replace("?", r"\?")):
        PARSER.parse(line.split())
