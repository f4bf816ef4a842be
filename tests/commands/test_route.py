import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from derain.cli import main
from derain.commands.route import find_images, sheet
from derain.data.pairs import Pair
from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.prompts import PROMPTS
from tests.factories import add_rain, clean_image, make_clip, make_set, save


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with sets, which remembers no scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    make_set(tmp_path / "data", "RainTrainL", "train", 5)
    make_set(tmp_path / "data", "Rain800", "train", 4, seed=50)
    return tmp_path


def paper_says(monkeypatch, name="3", **counts):
    monkeypatch.setitem(PROMPTS, name, PROMPTS[name]._replace(counts=PROMPTS[name].counts | counts))


def rows_of(folder):
    with (folder / "routes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_sets_are_counted_beside_the_paper_and_summed(place, clip, capsys, monkeypatch):
    paper_says(monkeypatch, Rain100L=(1, 4), Rain800=(3, 1))
    assert main(["route", "RainTrainL", "Rain800", "--prompts", "3", "--clip", clip]) == 0
    out = capsys.readouterr().out
    rows = rows_of(place / "runs/route")
    assert [row["set"] for row in rows] == ["RainTrainL"] * 5 + ["Rain800"] * 4
    summary = json.loads((place / "runs/route/summary.json").read_text())
    light, mixed, total = summary["sets"]
    taken = [int(row["route"]) for row in rows]
    assert light["counts"] == np.bincount(taken[:5], minlength=2).tolist()
    assert mixed["counts"] == np.bincount(taken[5:], minlength=2).tolist()
    assert (total["set"], total["images"]) == ("all", 9)
    assert total["counts"] == np.bincount(taken, minlength=2).tolist()
    assert [one["paper"] for one in summary["sets"]] == [[1, 4], [3, 1], [4, 5]]
    assert summary["prompts"]["texts"] == list(PROMPTS["3"].texts)
    lines = [line for line in out.splitlines() if "paper" in line]
    assert len(lines) == 3
    assert "1 (20.00%)" in lines[0]
    assert "4 (80.00%)" in lines[0]
    assert PROMPTS["3"].texts[1] in out


def test_scores_are_equation_1_and_the_route_is_the_largest(place, clip):
    assert main(["route", "RainTrainL", "--prompts", "1", "--clip", clip, "--output", "out"]) == 0
    rows = rows_of(place / "out")
    similarity, score = (
        np.array([[float(r[f"{k}_{i}"]) for i in range(3)] for r in rows]) for k in ("similarity", "score")
    )
    powers = np.exp(similarity)
    np.testing.assert_allclose(score, powers / powers.sum(1, keepdims=True), atol=1e-6)
    assert [int(row["route"]) for row in rows] == similarity.argmax(1).tolist()
    assert (np.abs(similarity) <= 1).all()


def test_dot_leaves_the_lengths_in(place, clip):
    for kind in ("cosine", "dot"):
        assert main(["route", "RainTrainL", "--similarity", kind, "--clip", clip, "--output", kind]) == 0
    cosine, dot = ([float(row["similarity_0"]) for row in rows_of(place / kind)] for kind in ("cosine", "dot"))
    assert not np.allclose(cosine, dot)


def test_the_rainy_half_is_perceived(place, clip):
    """Rain800 has clean and rainy image in one file: the rainy half alone gives the same scores."""
    rainy = [add_rain(clean_image(50 + i), 10_050 + i) for i in range(4)]
    for i, pixels in enumerate(rainy):
        save(place / f"alone/{i}.png", pixels)
    save(place / "data/RainTrainL/rain-1.png", rainy[0])
    for root in ("RainTrainL", "alone"):
        assert main(["route", root, "--clip", clip, "--output", f"out-{root}"]) == 0
    first, alone = (rows_of(place / f"out-{root}")[0] for root in ("RainTrainL", "alone"))
    assert first["similarity_0"] == alone["similarity_0"]


def test_seen_images_need_no_clip(place, clip, monkeypatch):
    command = ["route", "RainTrainL", "--clip", clip]
    assert main(command) == 0
    before = (place / "runs/route/routes.csv").read_bytes()
    monkeypatch.setattr(FrozenCLIP, "images", lambda *_: pytest.fail("CLIP ran again"))
    assert main(command) == 0
    assert (place / "runs/route/routes.csv").read_bytes() == before


def test_json_is_the_summary_and_nothing_else(place, clip, capsys):
    assert main(["route", "RainTrainL", "--clip", clip, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((place / "runs/route/summary.json").read_text())


def test_the_paper_is_named_only_where_it_counted(place, clip, capsys, monkeypatch):
    paper_says(monkeypatch, Rain100L=(1, 5))  # six images, here are five
    (place / "mine.yaml").write_text(yaml.safe_dump(["light rain", "heavy rain"]))
    for prompts in ("3", "mine.yaml"):
        assert main(["route", "RainTrainL", "--prompts", prompts, "--clip", clip, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["sets"][0]["paper"] is None


def test_a_folder_of_images_is_taken_whole(place, clip, capsys):
    for name in ("a.png", "deep/b.png", "deep/c.jpg"):
        save(place / "shots" / name, clean_image(len(name)))
    assert main(["route", "shots", "RainTrainL", "--clip", clip]) == 0
    rows = rows_of(place / "runs/route")
    assert [row["image"] for row in rows[:3]] == ["a.png", "deep/b.png", "deep/c.jpg"]
    assert len(rows) == 8


def test_a_data_set_without_the_split_is_no_folder_of_images(place):
    with pytest.raises(DerainError, match="no test pairs"):
        find_images(str(place / "data/Rain800"), "test")
    found = find_images(str(place / "data/Rain800"), "train")
    assert (found.layout, len(found.pairs)) == ("Rain800", 4)


def test_sheets_show_each_route_and_those_of_before_go(place, clip):
    (place / "out").mkdir()
    (place / "out/route-7.png").write_bytes(b"old")
    (place / "out/route-notes.png").write_bytes(b"the user's")
    assert main(["route", "RainTrainL", "--clip", clip, "--output", "out"]) == 0
    taken = {row["route"] for row in rows_of(place / "out")}
    sheets = {path.name for path in (place / "out").glob("*.png")}
    assert sheets == {f"route-{route}.png" for route in taken} | {"route-notes.png"}
    with Image.open(place / f"out/route-{min(taken)}.png") as picture:
        assert min(picture.size) > 48


def test_a_sheet_has_at_most_24_images_of_all_margins(tmp_path, monkeypatch):
    shown = []

    def read(pair):
        shown.append(pair.name)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr("derain.commands.route.rainy_image", read)
    sheet([(1 - i / 100, Pair(str(i), tmp_path)) for i in range(100)])
    assert len(shown) == len(set(shown)) == 24
    assert (shown[0], shown[-1]) == ("0", "99")
    assert set(np.diff([int(name) for name in shown])) <= {4, 5}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "neither a set (1, 2, 2-long, 3"),
        ("- light rain\n- [1, 2]\n", "expected a list of texts"),
        ("light: rain\n", "expected a list of texts"),
        ("- light rain\n", "give two different texts"),
        ("[", "no YAML"),
    ],
)
def test_prompts_that_are_none(place, capsys, content, told):
    if content is not None:
        (place / "mine.yaml").write_text(content)
    assert main(["route", "RainTrainL", "--prompts", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "mine.yaml" in error or "light rain" in error
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("root", "told"), [("nowhere", "nowhere: no such folder"), ("empty", "empty: no train pairs"), ("Rain12", "Rain12")]
)
def test_images_that_are_none(place, capsys, root, told):
    (place / "empty").mkdir()
    assert main(["route", root]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_damaged_image_is_named(place, clip, capsys):
    (place / "data/RainTrainL/rain-3.png").write_bytes(b"no image")
    assert main(["route", "RainTrainL", "--clip", clip]) == 2
    assert "rain-3.png: not an image" in capsys.readouterr().err
