import csv
import io
import json

import pytest

from derain.tables import Cell, Column, Row, Table, render

TABLE = Table(
    [
        Column("method", align="left"),
        Column("PSNR", ".2f", group="Rain_1", best="max"),
        Column("LPIPS", ".3f", group="Rain_1", best="min"),
        Column("seconds", ".3g"),
    ],
    [
        Row(["a|b", 30.004, 0.1, 0.5]),
        Row(["c [1]", 31.0, 0.2, None], dim=True),
        Row(["d", None, None, 2]),
        Row(["e", Cell(33.0, "*"), 0.1, 1.0]),
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
        "| e | 33.00* / **0.100** | 1 |",
    ]


def test_latex_has_a_row_of_groups():
    lines = TABLE.latex().splitlines()
    assert lines[0].startswith(r"\begin{tabular}{lrrr}")
    assert lines[2] == r"method & \multicolumn{2}{c}{Rain\_1} & seconds \\"
    assert lines[3] == r"\cmidrule(lr){2-3}"
    assert lines[4] == r" & PSNR & LPIPS &  \\"
    assert r"c\textsuperscript{1} & \textbf{31.00} & 0.200 & -- \\" in lines
    assert r"d & -- & -- & 2 \\" in lines
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
