import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from derain.cli import main
from derain.commands.route import find_images, route_sheet
from derain.data.pairs import Pair
from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP
from derain.methods.cliprpn.prompts import PROMPTS
from tests.factories import add_rain, clean_image, make_clip, make_set, save


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with data sets and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    make_set(tmp_path / "data", "RainTrainL", "train", 5)
    make_set(tmp_path / "data", "Rain800", "train", 4, seed=50)
    return tmp_path


def set_paper_counts(monkeypatch, name="3", **counts):
    monkeypatch.setitem(PROMPTS, name, PROMPTS[name]._replace(counts=PROMPTS[name].counts | counts))


def rows_of(folder):
    with (folder / "routes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_counts_of_sets_of_the_paper_and_of_all_sets(folder, clip, capsys, monkeypatch):
    set_paper_counts(monkeypatch, Rain100L=(1, 4), Rain800=(3, 1))
    assert main(["route", "RainTrainL", "Rain800", "--prompts", "3", "--clip", clip]) == 0
    out = capsys.readouterr().out
    rows = rows_of(folder / "runs/route")
    assert [row["set"] for row in rows] == ["RainTrainL"] * 5 + ["Rain800"] * 4
    summary = json.loads((folder / "runs/route/summary.json").read_text())
    light, mixed, total = summary["sets"]
    routes = [int(row["route"]) for row in rows]
    assert light["counts"] == np.bincount(routes[:5], minlength=2).tolist()
    assert mixed["counts"] == np.bincount(routes[5:], minlength=2).tolist()
    assert (total["set"], total["images"]) == ("all", 9)
    assert total["counts"] == np.bincount(routes, minlength=2).tolist()
    assert [entry["paper"] for entry in summary["sets"]] == [[1, 4], [3, 1], [4, 5]]
    assert summary["prompts"]["texts"] == list(PROMPTS["3"].texts)
    lines = [line for line in out.splitlines() if "paper" in line]
    assert len(lines) == 3
    assert "1 (20.00%)" in lines[0]
    assert "4 (80.00%)" in lines[0]
    assert PROMPTS["3"].texts[1] in out


def test_scores_are_equation_1_and_the_route_has_the_largest(folder, clip):
    assert main(["route", "RainTrainL", "--prompts", "1", "--clip", clip, "--out", "out"]) == 0
    rows = rows_of(folder / "out")
    similarity, score = (
        np.array([[float(r[f"{k}_{i}"]) for i in range(3)] for r in rows]) for k in ("similarity", "score")
    )
    powers = np.exp(similarity)
    np.testing.assert_allclose(score, powers / powers.sum(1, keepdims=True), atol=1e-6)
    assert [int(row["route"]) for row in rows] == similarity.argmax(1).tolist()
    assert (np.abs(similarity) <= 1).all()


def test_dot_product_is_not_normalised(folder, clip):
    for kind in ("cosine", "dot"):
        assert main(["route", "RainTrainL", "--similarity", kind, "--clip", clip, "--out", kind]) == 0
    cosine, dot = ([float(row["similarity_0"]) for row in rows_of(folder / kind)] for kind in ("cosine", "dot"))
    assert not np.allclose(cosine, dot)


def test_only_the_rainy_half_is_scored(folder, clip):
    """Rain800 has clean and rainy image in one file; the scores are those of the rainy half."""
    rainy = [add_rain(clean_image(50 + i), 10_050 + i) for i in range(4)]
    for i, pixels in enumerate(rainy):
        save(folder / f"alone/{i}.png", pixels)
    save(folder / "data/RainTrainL/rain-1.png", rainy[0])
    for root in ("RainTrainL", "alone"):
        assert main(["route", root, "--clip", clip, "--out", f"out-{root}"]) == 0
    first, alone = (rows_of(folder / f"out-{root}")[0] for root in ("RainTrainL", "alone"))
    assert first["similarity_0"] == alone["similarity_0"]


def test_scores_are_cached(folder, clip, monkeypatch):
    command = ["route", "RainTrainL", "--clip", clip]
    assert main(command) == 0
    before = (folder / "runs/route/routes.csv").read_bytes()
    monkeypatch.setattr(FrozenCLIP, "image_features", lambda *_: pytest.fail("CLIP ran again"))
    assert main(command) == 0
    assert (folder / "runs/route/routes.csv").read_bytes() == before


def test_json_is_the_summary(folder, clip, capsys):
    assert main(["route", "RainTrainL", "--clip", clip, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "runs/route/summary.json").read_text())


def test_counts_of_the_paper_need_the_same_images(folder, clip, capsys, monkeypatch):
    set_paper_counts(monkeypatch, Rain100L=(1, 5))  # six images; this set has five
    (folder / "mine.yaml").write_text(yaml.safe_dump(["light rain", "heavy rain"]))
    for prompts in ("3", "mine.yaml"):
        assert main(["route", "RainTrainL", "--prompts", prompts, "--clip", clip, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["sets"][0]["paper"] is None


def test_all_images_of_a_folder_are_counted(folder, clip, capsys):
    for name in ("a.png", "deep/b.png", "deep/c.jpg"):
        save(folder / "shots" / name, clean_image(len(name)))
    assert main(["route", "shots", "RainTrainL", "--clip", clip]) == 0
    rows = rows_of(folder / "runs/route")
    assert [row["image"] for row in rows[:3]] == ["a.png", "deep/b.png", "deep/c.jpg"]
    assert len(rows) == 8


def test_a_data_set_without_the_split_is_refused(folder):
    with pytest.raises(DerainError, match="Rain800"):
        find_images(str(folder / "data/Rain800"), "test")
    pair_set = find_images(str(folder / "data/Rain800"), "train")
    assert (pair_set.layout, len(pair_set.pairs)) == ("Rain800", 4)


def test_contact_sheets_replace_those_of_earlier_runs(folder, clip):
    (folder / "out").mkdir()
    (folder / "out/route-7.png").write_bytes(b"old")
    (folder / "out/route-notes.png").write_bytes(b"the user's")
    assert main(["route", "RainTrainL", "--clip", clip, "--out", "out"]) == 0
    routes = {row["route"] for row in rows_of(folder / "out")}
    sheets = {path.name for path in (folder / "out").glob("*.png")}
    assert sheets == {f"route-{route}.png" for route in routes} | {"route-notes.png"}
    with Image.open(folder / f"out/route-{min(routes)}.png") as picture:
        assert min(picture.size) > 48


def test_a_contact_sheet_has_24_images_of_all_margins(tmp_path, monkeypatch):
    shown = []

    def read(pair):
        shown.append(pair.name)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr("derain.commands.route.read_rainy", read)
    route_sheet([(1 - i / 100, Pair(str(i), tmp_path)) for i in range(100)])
    assert len(shown) == len(set(shown)) == 24
    assert (shown[0], shown[-1]) == ("0", "99")
    assert set(np.diff([int(name) for name in shown])) <= {4, 5}


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (None, "2-long"),
        ("- light rain\n- [1, 2]\n", "mine.yaml"),
        ("light: rain\n", "mine.yaml"),
        ("- light rain\n", "light rain"),
        ("[", "mine.yaml"),
    ],
)
def test_bad_prompts_are_refused(folder, capsys, content, value):
    if content is not None:
        (folder / "mine.yaml").write_text(content)
    assert main(["route", "RainTrainL", "--prompts", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert value in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("root", ["nowhere", "empty", "Rain12"])
def test_missing_images_are_refused(folder, capsys, root):
    (folder / "empty").mkdir()
    assert main(["route", root]) == 2
    error = capsys.readouterr().err
    assert root in error
    assert error.count("\n") == 1


def test_a_damaged_image_is_named(folder, clip, capsys):
    (folder / "data/RainTrainL/rain-3.png").write_bytes(b"no image")
    assert main(["route", "RainTrainL", "--clip", clip]) == 2
    assert "rain-3.png" in capsys.readouterr().err
