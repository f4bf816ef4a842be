"""Results as tables in plain text, Markdown and LaTeX, and as CSV and JSON."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import rich.table
from rich.console import Console, Group
from rich.text import Text

from derain.images import ESCAPED, write_whole

Format = Literal["table", "json", "csv", "markdown", "latex"]
"""Format of results; ``table`` is plain text."""

MISSING = "–"
"""Text of a missing value."""

LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "σ": r"$\sigma$",
        "×": r"$\times$",
        "±": r"$\pm$",
    }
)

WIDTH = 160
"""Line length of plain text that is not printed on a terminal, in characters; larger if the table is wider."""


class Cell(NamedTuple):
    """Value with a suffix, such as an interval, or with a footnote. It is never marked as the best of its column.

    Attributes:
        value: Number, text, or None for a missing value.
        suffix: Text directly after the value.
        footnote: Number of a footnote: 1 for the note that begins with ``[1]``.
    """

    value: str | int | float | None
    suffix: str = ""
    footnote: int | None = None


Value = str | int | float | Cell | None


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes:
        header: Title.
        spec: Format specification of numbers, such as ``.2f``.
        align: Alignment of the values.
        group: Title of several neighbouring columns. Text and Markdown show a group as one column, with values
            separated by slashes.
        best: Which number is printed in bold: the largest, the smallest, or none. Numbers in a `Cell` do not count; the
            column must have at least two others.
    """

    header: str
    spec: str = ""
    align: Literal["left", "right"] = "right"
    group: str | None = None
    best: Literal["max", "min"] | None = None


class _Formatted(NamedTuple):
    """Text of a cell, whether it is the best of its column, and the number of its footnote."""

    text: str
    best: bool
    footnote: int | None

    @property
    def with_footnote(self) -> str:
        return self.text if self.footnote is None else f"{self.text} [{self.footnote}]"


@dataclass(frozen=True)
class Row:
    """Row of a table.

    Attributes:
        values: One value per column.
        dim: Whether a terminal shows the row dimmed, for example results copied from a paper.
    """

    values: Sequence[Value]
    dim: bool = False


@dataclass(frozen=True)
class Table:
    """Table with footnotes.

    Attributes:
        columns: Columns from left to right.
        rows: Rows from top to bottom.
        notes: Notes below the table; those that cells refer to by ``footnote`` begin with ``[1]``, ``[2]``, …
        title: Title above the table in plain text; Markdown and LaTeX have no title.

    Example:
        >>> columns = [Column("method", align="left"), Column("PSNR", ".2f", best="max")]
        >>> print(Table(columns, [Row(["a", 27.123]), Row(["b", 28.0])]).markdown(), end="")
        | method | PSNR |
        | --- | ---: |
        | a | 27.12 |
        | b | **28.00** |
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    title: str | None = None

    def renderable(self) -> Group:
        """Return the table and its notes as an object that the package rich prints."""
        table = rich.table.Table(title=self.title, title_justify="left")
        for columns in self._groups():
            group_title = columns[0].group
            header = " / ".join(column.header for column in columns)
            table.add_column(
                Text(header if group_title is None else f"{group_title}\n{header}"),
                justify=columns[0].align,
                no_wrap=group_title is not None,
            )
        for row, cells in zip(self.rows, self._formatted(), strict=True):
            texts = [
                [Text(cell.with_footnote, "bold" if cell.best else "") for cell in group]
                for group in self._grouped(cells)
            ]
            table.add_row(*map(Text(" / ").join, texts), style="dim" if row.dim else None)
        return Group(table, *map(Text, self.notes))

    def text(self, *, terminal: bool = False) -> str:
        """Return the table as plain text.

        Args:
            terminal: Whether to fit the width of the terminal and use its styles. Otherwise each row is one line, and
                notes are wrapped at ``WIDTH`` characters, or at the width of the table if that is larger.
        """
        renderable = self.renderable()
        console = Console() if terminal else Console(file=io.StringIO(), force_terminal=False, color_system=None)
        if not terminal:
            table = renderable.renderables[0]
            console.width = max(WIDTH, console.measure(table, options=console.options.update(width=10_000)).maximum)
        with console.capture() as captured:
            console.print(renderable)
        return captured.get()

    def markdown(self) -> str:
        """Return the table as Markdown."""
        headers, rules = [], []
        for columns in self._groups():
            header = " / ".join(column.header for column in columns)
            group_title = columns[0].group
            headers.append(header if group_title is None else f"{group_title}, {header}")
            rules.append("---" if columns[0].align == "left" else "---:")
        lines = [headers, rules]
        for cells in self._formatted():
            texts = [
                [f"**{cell.text}**" if cell.best else cell.with_footnote for cell in group]
                for group in self._grouped(cells)
            ]
            lines.append([" / ".join(group) for group in texts])
        escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
        table = [f"| {' | '.join(line)} |" for line in escaped]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([*table, *notes]) + "\n"

    def latex(self) -> str:
        """Return the table as LaTeX for the package booktabs."""
        alignment = "".join(column.align[0] for column in self.columns)
        rows = [_latex_row(map(_latex_cell, cells)) for cells in self._formatted()]
        lines = [
            rf"\begin{{tabular}}{{{alignment}}}  % needs booktabs",
            r"\toprule",
            *self._latex_header(),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *latex_notes(self.notes),
        ]
        return "\n".join(lines) + "\n"

    def _latex_header(self) -> list[str]:
        """Return the row of headers; if there are groups, their titles, rules and a second row of headers."""
        headers = [escape_latex(column.header) for column in self.columns]
        if all(column.group is None for column in self.columns):
            return [_latex_row(headers)]
        over, rules, below = [], [], []
        first = 1
        for columns in self._groups():
            last = first + len(columns) - 1
            if columns[0].group is None:
                over.append(escape_latex(columns[0].header))
                below.append("")
            else:
                over.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{escape_latex(columns[0].group)}}}")
                rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
                below += headers[first - 1 : last]
            first = last + 1
        return [_latex_row(over), " ".join(rules), _latex_row(below)]

    def _groups(self) -> list[list[Column]]:
        """Return the columns by group; a column without a group is a group of its own."""
        groups: list[list[Column]] = []
        for column in self.columns:
            if groups and column.group is not None and column.group == groups[-1][0].group:
                groups[-1].append(column)
            else:
                groups.append([column])
        return groups

    def _grouped(self, cells: Sequence[_Formatted]) -> Iterator[list[_Formatted]]:
        """Yield the cells of a row by group; a group in which all values are missing is reduced to one cell."""
        remaining = iter(cells)
        for columns in self._groups():
            group = list(islice(remaining, len(columns)))
            missing = all(cell.text == MISSING for cell in group)
            yield group[:1] if missing else group

    def _formatted(self) -> list[list[_Formatted]]:
        """Return the cells as text, row by row."""
        columns = []
        for index, column in enumerate(self.columns):
            values = [row.values[index] for row in self.rows]
            best_text = _best_text(column, values)
            columns.append([_formatted_cell(value, column, best_text) for value in values])
        return [list(row) for row in zip(*columns, strict=True)]


def _formatted_cell(value: Value, column: Column, best_text: str | None) -> _Formatted:
    text = _format(value, column)
    if isinstance(value, Cell):
        return _Formatted(text, False, value.footnote)
    return _Formatted(text, text == best_text, None)


def _format(value: Value, column: Column) -> str:
    if isinstance(value, Cell):
        return _format(value.value, column) + value.suffix
    if value is None:
        return MISSING
    return value if isinstance(value, str) else format(value, column.spec)


def _best_text(column: Column, values: Sequence[Value]) -> str | None:
    """Return the text of the best number of a column; None if no number is marked."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if column.best is None or len(numbers) < 2:
        return None
    return _format(max(numbers) if column.best == "max" else min(numbers), column)


def _latex_row(cells: Iterable[str]) -> str:
    return rf"{' & '.join(cells)} \\"


def _latex_cell(cell: _Formatted) -> str:
    text = escape_latex(cell.text)
    if cell.footnote is not None:
        text += rf"\textsuperscript{{{cell.footnote}}}"
    return rf"\textbf{{{text}}}" if cell.best else text


def latex_notes(notes: Sequence[str]) -> list[str]:
    """Return lines of LaTeX with the notes below a table; a leading ``[1]`` becomes a superscript, as in the cells."""
    if not notes:
        return []
    lines = [re.sub(r"^\[(\d+)\]", r"\\textsuperscript{\1}", escape_latex(note)) + r"\par" for note in notes]
    return [r"\par\smallskip", r"{\footnotesize\raggedright", *lines, "}"]


def escape_latex(text: str) -> str:
    r"""Escape the special characters of LaTeX.

    Example:
        >>> print(escape_latex("my_set: 50 %"))
        my\_set: 50 \%
    """
    return text.translate(LATEX)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records, which all have the same keys, as CSV; empty if there are no records."""
    if not records:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def json_text(content: Any) -> str:
    """Return content as indented JSON.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_results(
    format: Format, table: Table, records: Sequence[Mapping[str, Any]], content: Any, out: Path | None
) -> None:
    """Print results in a format, or write them to a file.

    Args:
        format: Format of the results.
        table: Results for text, Markdown and LaTeX.
        records: Results for CSV: one dictionary per row.
        content: Results for JSON.
        out: File to write, completely or not at all; None to print.

    Raises:
        ValueError: If the format is JSON, and a number is NaN or infinite.
    """
    terminal = out is None and sys.stdout.isatty()
    text = render(format, table, records, content, terminal=terminal)
    if out is None:
        print(text, end="")
        return
    with write_whole(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=ESCAPED)
    print(f"wrote {out}", file=sys.stderr)


def render(
    format: Format, table: Table, records: Sequence[Mapping[str, Any]], content: Any, *, terminal: bool = False
) -> str:
    """Return results in a format.

    Args:
        format: Format of the results.
        table: Results for text, Markdown and LaTeX.
        records: Results for CSV.
        content: Results for JSON.
        terminal: Whether plain text is for a terminal (`Table.text`); ignored for other formats.

    Raises:
        ValueError: If the format is JSON, and a number is NaN or infinite.
    """
    if format == "json":
        return json_text(content)
    if format == "csv":
        return csv_text(records)
    if format == "table":
        return table.text(terminal=terminal)
    return {"markdown": table.markdown, "latex": table.latex}[format]()
