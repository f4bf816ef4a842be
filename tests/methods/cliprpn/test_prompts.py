"""Prompts and counts compared with the text of the paper."""

import os
import re
from pathlib import Path

import pytest

from derain.errors import DerainError
from derain.methods.cliprpn.prompts import PROMPTS, texts_of

SETS = {"Rain800": 700, "Rain100H": 1800, "Rain100L": 200}
MIXED = {
    "1": (674, 6, 2020),
    "2": (325, 202, 2173),
    "2-long": (325, 202, 2173),
    "3": (295, 2405),
    "3-distortion": (295, 2405),
    "rain": (2640, 60),
    "intensity": (1068, 277, 1355),
}


@pytest.fixture(scope="module")
def paper():
    """Text of the paper."""
    root = os.environ.get("DERAIN_DATA")
    file = Path(root).parent / "papers" / "S0_clip_rpn.txt" if root else None
    if file is None or not file.is_file():
        pytest.skip("the paper's text is not beside DERAIN_DATA")
    return file.read_text()


@pytest.mark.parametrize("name", PROMPTS)
def test_counts_add_up(name):
    texts, counts, _ = PROMPTS[name]
    assert {dataset: sum(row) for dataset, row in counts.items()} == SETS
    assert tuple(sum(route) for route in zip(*counts.values(), strict=True)) == MIXED[name]
    assert len(texts) == len(MIXED[name])


@pytest.mark.parametrize("name", PROMPTS)
def test_texts_equal_the_paper(paper, name):
    texts = PROMPTS[name].texts
    if name in {"1", "2", "3"}:  # as Table 5 quotes them, in a row that begins with the set's number
        listed = ", ".join(f'"{text}"' for text in texts)
        assert re.search(rf"^{name}\t\[{re.escape(listed)}\]", paper, re.MULTILINE)
    else:
        assert "Dataset\\Prompt\t" + "\t".join(texts) + "\n" in paper


@pytest.mark.parametrize("name", ["1", "2-long", "3-distortion", "rain", "intensity"])
def test_counts_equal_the_percentages_of_the_paper(paper, name):
    texts, counts, _ = PROMPTS[name]
    rows = paper.partition("Dataset\\Prompt\t" + "\t".join(texts) + "\n")[2].splitlines()[:4]
    assert len(rows) == 4
    for row in rows:
        first, *shares = row.rstrip("\t").split("\t")
        row_counts = counts[first.split()[0]] if first != "Mixed" else MIXED[name]
        for count, share in zip(row_counts, shares, strict=True):
            assert 100 * count / sum(row_counts) == pytest.approx(float(share), abs=0.0101), row


@pytest.mark.parametrize(("name", "variant"), [("2", "2-long"), ("3", "3-distortion")])
def test_variants_have_different_texts_and_equal_counts(name, variant):
    assert PROMPTS[name].texts != PROMPTS[variant].texts
    assert PROMPTS[name].counts == PROMPTS[variant].counts


def test_spellings_of_distortion():
    assert "distoration." in PROMPTS["3"].texts[0]
    assert PROMPTS["3"].texts[0].replace("distoration", "distortion") == PROMPTS["3-distortion"].texts[0]


def test_list_of_prompts_is_returned_unchanged():
    assert texts_of(["none", "some", "much"]) == ("none", "some", "much")
    assert texts_of("intensity") == PROMPTS["intensity"].texts


@pytest.mark.parametrize("prompts", ["4", [], ["rain"], ["rain", "rain"]])
def test_invalid_prompts_are_refused(prompts):
    with pytest.raises(DerainError, match=re.escape(f"prompts {prompts!r}")):
        texts_of(prompts)
