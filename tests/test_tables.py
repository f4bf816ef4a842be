import csv
import io
import json

import pytest

from derain.tables import Cell, Column, Row, Table, render, write_results

TABLE = Table(
    [
        Column("method", align="left"),
        Column("PSNR", ".2f", group="Rain_1", best="max"),
        Column("LPIPS", ".3f", group="Rain_1", best="min"),
        Column("seconds", ".3g"),
    ],
    [
        Row(["a|b", 30.004, 0.1, 0.5]),
        Row([Cell("c", footnote=1), 31.0, 0.2, None], dim=True),
        Row(["d", None, None, 2]),
        Row(["e [2]", Cell(33.0, "*"), 0.1, 1.0]),
    ],
    ["[1] 50 % published."],
)


def test_markdown_joins_groups_and_marks_the_best():
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "| method | Rain_1, PSNR / LPIPS | seconds |"
    assert lines[2:6] == [
        r"| a\|b | 30.00 / **0.100** | 0.5 |",
        "| c [1] | **31.00** / 0.200 | – |",
        "| d | – | 2 |",
        "| e [2] | 33.00* / **0.100** | 1 |",
    ]


def test_latex_has_a_row_of_groups():
    lines = TABLE.latex().splitlines()
    assert lines[0].startswith(r"\begin{tabular}{lrrr}")
    assert lines[2] == r"method & \multicolumn{2}{c}{Rain\_1} & seconds \\"
    assert lines[3] == r"\cmidrule(lr){2-3}"
    assert lines[4] == r" & PSNR & LPIPS &  \\"
    assert r"c\textsuperscript{1} & \textbf{31.00} & 0.200 & -- \\" in lines
    assert r"d & -- & -- & 2 \\" in lines
    assert any(line.startswith("e [2] & 33.00*") for line in lines)  # a name, not a footnote
    assert any(line.startswith(r"\textsuperscript{1} 50 \%") for line in lines)


def test_text_has_no_markup():
    text = TABLE.text()
    assert "30.00 / 0.100" in text
    assert "**" not in text
    assert text.splitlines()[-1] == "[1] 50 % published."


@pytest.mark.parametrize("form", ["csv", "json"])
def test_csv_and_json_have_the_records(form):
    records = [{"method": "a", "psnr": 30.004}]
    text = render(form, TABLE, records, records)
    if form == "json":
        assert json.loads(text) == records
    else:
        assert list(csv.DictReader(io.StringIO(text))) == [{"method": "a", "psnr": "30.004"}]


def test_files_have_no_styles_of_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write_results("table", TABLE, [], [], tmp_path / "table.txt")
    text = (tmp_path / "table.txt").read_text()
    assert "\x1b" not in text
    assert text == TABLE.text()
    write_results("table", TABLE, [], [], None)
    assert "\x1b[1m" in capsys.readouterr().out


def test_columns_that_need_more_width_are_not_cut():
    columns = [Column(f"PSNR {number}", ".2f", group=f"set-{number}") for number in range(30)]
    text = Table(columns, [Row([10.25 + number for number in range(30)])]).text()
    assert all(f"{10.25 + number:.2f}" in text for number in range(30))


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "csv", "json"])
def test_a_table_may_have_no_rows(form):
    text = render(form, Table(TABLE.columns, []), [], [])
    assert form in {"csv", "json"} or "method" in text
