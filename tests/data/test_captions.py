import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from derain.data.captions import (
    Caption,
    Journal,
    JournalEntry,
    file_hash,
    match_captions,
    read_captions,
    table_paths,
    write_captions,
)
from derain.data.pairs import Pair, find_pairs
from derain.errors import DerainError
from tests.factories import make_set

HEAD = "filepath\ttitle\n"


def refused(call, *parts):
    with pytest.raises(DerainError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_starts_without_torch():
    code = "import sys, derain.data.captions; print({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


# The table.


def test_tables_have_the_format_of_daclip(tmp_path):
    rows = [("rain-1.png", Caption("a street at night", "rainy")), ("b/2.png", Caption("a dog", "rainy"))]
    write_captions(tmp_path / "t.tsv", rows)
    text = (tmp_path / "t.tsv").read_bytes().decode()
    assert text == "filepath\ttitle\nrain-1.png\ta street at night: rainy\nb/2.png\ta dog: rainy\n"
    assert text.splitlines()[1].split("\t")[1].rsplit(": ", 1)[-1] == "rainy"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("sign: no: entry", "sign: no: entry"),
        ("tab\tin\nlines\r\nof it ", "tab in lines of it"),
        ('a sign that says "stop"', 'a sign that says "stop"'),
        ('"stop"', '"stop"'),
        ("", ""),
        ("Straße, 夜", "Straße, 夜"),
        ("colon:", "colon:"),
    ],
)
def test_any_caption_comes_back(tmp_path, text, kept):
    rows = {"a b.png": Caption(text, "rainy"), "c\td.png": Caption("x", "low-light")}
    write_captions(tmp_path / "t.tsv", rows.items())
    read = read_captions(tmp_path / "t.tsv")
    assert list(read) == list(rows)
    assert read["a b.png"] == (kept, "rainy")
    assert read["c\td.png"] == ("x", "low-light")


def test_tables_of_pandas_and_spreadsheets_are_read(tmp_path):
    """A mark of the byte order, Windows' ends of lines, no end of the last line, quoted fields."""
    file = tmp_path / "t.tsv"
    file.write_bytes('\ufeff"filepath"\ttitle\r\n/x/1.png\t"a ""b"": c: hazy"\r\n2.png\td: rainy'.encode())
    assert read_captions(file) == {"/x/1.png": ('a "b": c', "hazy"), "2.png": ("d", "rainy")}
    file.write_text(HEAD)
    assert read_captions(file) == {}


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"", 1, "filepath<TAB>title"),
        (b"1.png\ta: rainy\n", 1, "filepath<TAB>title"),
        (b"filepath,title\n", 1, "filepath<TAB>title"),
        (b"filepath\ttitle\n1.png\ta: rainy\n2.png a: rainy\n", 3, "1 columns"),
        (b"filepath\ttitle\n1.png\ta\tb: rainy\n", 2, "3 columns"),
        (b"filepath\ttitle\n1.png\ta: rainy\n\n", 3, "0 columns"),
        (b"filepath\ttitle\n1.png\ta:rainy\n", 2, "'a:rainy' has no ': '"),
        (b"filepath\ttitle\n1.png\ta: b\n2.png\ta: b\n1.png\tc: b\n", 4, "second caption of 1.png"),
        (b"filepath\ttitle\n1.png\ta: b\n2.png\tcaf\xe9: b\n", 3, "not UTF-8"),
        (b'filepath\ttitle\n1.png\ta: b\n2.png\t"c: b\n3.png\td: b\n', 3, "quotation marks"),
        (b'filepath\ttitle\n1.png\t"a" b: c\n', 2, "quotation marks"),
    ],
)
def test_malformed_tables_are_refused_with_the_line(tmp_path, content, line, reason):
    (tmp_path / "t.tsv").write_bytes(content)
    refused(lambda: read_captions(tmp_path / "t.tsv"), f"{tmp_path / 't.tsv'}:{line}: ", reason)


def test_a_table_that_is_not_there(tmp_path):
    refused(lambda: read_captions(tmp_path / "t.tsv"), tmp_path / "t.tsv", "derain caption")


# Captions of pairs.


def test_pairs_get_their_captions_by_relative_and_absolute_paths(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "data", "RainTrainL", "train", 3)
    pairs = find_pairs(folder, "train").pairs
    mixed = {
        "data/RainTrainL/rain-3.png": Caption("three", "rainy"),
        str(folder / "rain-1.png"): Caption("one", "rainy"),
        "data/other/../RainTrainL/rain-2.png": Caption("two", "rainy"),
        "data/nowhere/rain-1.png": Caption("of another set", "rainy"),
    }
    for table in (tmp_path / "t.tsv", Path(os.path.relpath(tmp_path / "t.tsv"))):
        assert [caption.text for caption in match_captions(pairs, {table: mixed})] == ["one", "two", "three"]
    monkeypatch.chdir(folder)
    pairs = find_pairs(".", "train").pairs
    assert [caption.text for caption in match_captions(pairs, {tmp_path / "t.tsv": mixed})] == ["one", "two", "three"]


def test_links_of_folders_are_followed(tmp_path):
    folder = make_set(tmp_path / "data", "RainTrainL", "train", 2)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    pairs = find_pairs(tmp_path / "link" / folder.name, "train").pairs
    table = {name: Caption(name, "rainy") for name in table_paths([pair.rainy for pair in pairs], tmp_path / "t.tsv")}
    assert list(table) == ["data/RainTrainL/rain-1.png", "data/RainTrainL/rain-2.png"]
    assert match_captions(pairs, {tmp_path / "t.tsv": table}) == list(table.values())
    assert match_captions(find_pairs(folder, "train").pairs, {tmp_path / "t.tsv": table}) == list(table.values())


def test_halves_of_one_file_are_keyed_by_the_file(tmp_path):
    folder = make_set(tmp_path, "Rain800", "train", 2)
    pairs = find_pairs(folder, "train").pairs
    table = {"training/1.jpg": Caption("one", "rainy"), "training/2.jpg": Caption("two", "rainy")}
    assert match_captions(pairs, {folder / "t.tsv": table}) == [("one", "rainy"), ("two", "rainy")]


def test_pairs_without_caption_are_counted_and_the_first_named(tmp_path):
    pairs = [Pair(str(i), tmp_path / f"{i}.png") for i in range(5)]
    table = {"0.png": Caption("a", "rainy"), "3.png": Caption("b", "rainy")}
    refused(lambda: match_captions(pairs, {tmp_path / "t.tsv": table}), "t.tsv", "3 of 5", tmp_path / "1.png")


def test_two_captions_of_one_file(tmp_path):
    pairs = [Pair("1", tmp_path / "1.png")]
    table = {"1.png": Caption("a", "rainy"), str(tmp_path / "1.png"): Caption("b", "rainy")}
    refused(lambda: match_captions(pairs, {tmp_path / "t.tsv": table}), "t.tsv: ", "1.png")
    table[str(tmp_path / "1.png")] = Caption("a", "rainy")
    assert match_captions(pairs, {tmp_path / "t.tsv": table}) == [("a", "rainy")]


def test_several_tables_caption_together(tmp_path):
    pairs = [Pair("1", tmp_path / "a" / "1.png"), Pair("2", tmp_path / "b" / "1.png")]
    tables = {tmp_path / part / "t.tsv": {"1.png": Caption(part, "rainy")} for part in "ab"}
    assert [caption.text for caption in match_captions(pairs, tables)] == ["a", "b"]
    refused(lambda: match_captions([*pairs, Pair("3", tmp_path / "c.png")], tables), "a/t.tsv, ", "b/t.tsv", "1 of 3")
    tables[tmp_path / "t.tsv"] = {"b/1.png": Caption("another", "rainy")}
    refused(lambda: match_captions(pairs, tables), "t.tsv: ", "b/1.png")


def test_paths_are_relative_only_below_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path("set/rain/1.png"), tmp_path / "2.png", tmp_path.parent / "3.png"]
    (tmp_path / "deep").mkdir()
    assert table_paths(files, Path("t.tsv")) == ["set/rain/1.png", "2.png", str(tmp_path.parent / "3.png")]
    assert table_paths(files[:1], Path("deep/t.tsv")) == [str(tmp_path / "set/rain/1.png")]
    assert table_paths([Path("deep/../2.png")], Path("t.tsv")) == ["2.png"]
    refused(lambda: table_paths([Path(os.fsdecode(b"caf\xe9.png"))], Path("t.tsv")), "UTF-8")


# The journal.

RUN = {"captioner": "x", "max_tokens": 5}


@pytest.fixture
def pairs(tmp_path):
    """Five pairs; the first two have one clean image."""
    for name in "abcd":
        (tmp_path / name).write_text(name)
    return [(f"{i}.png", tmp_path / name) for i, name in enumerate("aabcd")]


@pytest.fixture
def rows(pairs):
    return [JournalEntry(file, f"{file} shöws: \t'\n", file_hash(clean)) for file, clean in pairs]


def test_rows_survive_wherever_the_process_died(tmp_path, pairs, rows):
    """The file is cut at every byte: complete rows stay, and further rows are appended to them."""
    journal = Journal(tmp_path / "deep/t.part", RUN)
    assert journal.begin(pairs) == []
    journal.add(rows[:2])
    journal.add(rows[2:])
    whole = journal.path.read_bytes()
    for size in range(len(whole) + 1):
        journal.path.write_bytes(whole[:size])
        kept = journal.begin(pairs)
        assert kept == rows[: max(0, whole[:size].count(b"\n") - 1)]
        journal.add(rows[len(kept) :])
        assert journal.path.read_bytes() == whole
    journal.path.unlink()
    assert journal.begin(pairs) == []


@pytest.mark.parametrize(
    ("run", "difference"),
    [
        ({"captioner": "y", "max_tokens": 5}, "captioner x, not y"),
        ({"captioner": "x", "max_tokens": 6}, "max_tokens 5, not 6"),
        ({"captioner": "x", "max_tokens": 5, "sha256": "1"}, "sha256 None, not 1"),
        ({"captioner": "x"}, "max_tokens 5, not None"),
    ],
)
def test_another_run_cannot_resume(tmp_path, pairs, rows, run, difference):
    journal = Journal(tmp_path / "t.part", RUN)
    journal.begin(pairs)
    journal.add(rows)
    before = journal.path.read_bytes()
    other = Journal(tmp_path / "t.part", run)
    refused(lambda: other.begin(pairs), tmp_path / "t.part", difference, "--overwrite")
    assert journal.path.read_bytes() == before
    assert other.begin(pairs, overwrite=True) == []
    assert other.begin(pairs) == []
    assert Journal(tmp_path / "t.part", run).path.read_bytes().count(b"\n") == 1


def test_overwrite_keeps_what_the_same_run_left(tmp_path, pairs, rows):
    journal = Journal(tmp_path / "t.part", RUN)
    journal.begin(pairs)
    journal.add(rows[:3])
    assert journal.begin(pairs, overwrite=True) == rows[:3]


def test_other_images_cannot_resume(tmp_path, pairs, rows):
    journal = Journal(tmp_path / "t.part", RUN)
    journal.begin(pairs)
    journal.add(rows[:4])
    refused(lambda: journal.begin(pairs[:3]), "t.part: has 4 ")
    refused(lambda: journal.begin([pairs[1], pairs[0], *pairs[2:]]), "0.png")
    pairs[4][1].write_text("not captioned yet: it may change")
    assert journal.begin(pairs) == rows[:4]
    assert journal.begin([*pairs[:4], ("9.png", pairs[4][1])]) == rows[:4]
    pairs[2][1].write_text("changed")
    refused(lambda: journal.begin(pairs), pairs[2][1], "--overwrite")
    pairs[2][1].unlink()
    refused(lambda: journal.begin(pairs), pairs[2][1])
    assert journal.begin(pairs, overwrite=True) == []


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"[1]\n", b"\xff\xfe\n", b'{"other": 1}\n'])
def test_another_file_is_not_overwritten(tmp_path, pairs, content):
    (tmp_path / "t.part").write_bytes(content)
    journal = Journal(tmp_path / "t.part", RUN)
    refused(lambda: journal.begin(pairs), "t.part: ", "--overwrite")
    assert journal.path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{}", b"[1, 2, 3]", b'["a", "b"]', b"", b"\0\0"])
def test_a_damaged_row_is_rejected(tmp_path, pairs, line):
    (tmp_path / "t.part").write_bytes(json.dumps(RUN).encode() + b"\n" + line + b"\n")
    refused(lambda: Journal(tmp_path / "t.part", RUN).begin(pairs), "t.part: ", "--overwrite")


def test_images_without_hash_may_change(tmp_path, pairs):
    journal = Journal(tmp_path / "t.part", RUN)
    journal.begin(pairs)
    journal.add([JournalEntry("0.png", "a photo", "")])
    pairs[0][1].write_text("changed")
    assert journal.begin(pairs) == [("0.png", "a photo", "")]
