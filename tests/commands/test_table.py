import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

from derain.cli import main
from derain.commands.table import escape, footnotes, notes
from derain.data.layouts import LAYOUTS
from derain.data.run_summaries import merge_rows, published_rows, read_summary, row_labels, select_protocol
from derain.images import read_rgb
from derain.methods import PReNetModule
from derain.metrics import PROTOCOLS
from tests.factories import make_set

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"test": "Rain800", "workers": 0},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    "protocol": ["matlab-y", "plnlin"],
}


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """The folder that a real test of an untrained PReNet by two protocols leaves behind."""
    place = tmp_path_factory.mktemp("tested")
    make_set(place / "data", "Rain800", "test", count=5)
    torch.manual_seed(0)
    method = PReNetModule(stages=1)
    method.trained_on = ("Rain800",)
    method.save_weights(place / "w.safetensors")
    (place / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DERAIN_DATA", str(place / "data"))
        assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors"]) == 0
    return place / "runs/exp/test-1"


@pytest.fixture
def copy(tested, tmp_path):
    """Makes a copy of the run that differs: another set, other weights, another method."""

    def make(name, sets="Rain800", trained_on=("Rain800",), sha=None, protocols=("matlab-y",), **changes):
        folder = tmp_path / "results" / name
        shutil.copytree(tested, folder)
        summary = json.loads((folder / "summary.json").read_text())
        summary["data"]["sets"] = sets
        summary["method"]["trained_on"] = list(trained_on)
        summary["weights"]["sha256"] = (sha or name).ljust(64, "0")
        summary["results"] = [one for one in summary["results"] if one["protocol"] in protocols]
        for key, value in changes.items():
            target = summary["method"] if key in {"method", "hyper_parameters"} else summary
            target[key] = value
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    make.folder = tmp_path / "results"
    return make


def table(capsys, *arguments):
    """What the command prints as CSV, row by row."""
    assert main(["table", *map(str, arguments), "--format", "csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def rows_of(folder):
    return merge_rows(
        select_protocol([(file, read_summary(file)) for file in sorted(folder.rglob("summary.json"))], None)[0]
    )


def test_a_real_run_gives_its_numbers(tested, capsys):
    (row,) = table(capsys, tested, "--protocol", "plnlin", "--cost")
    summary = json.loads((tested / "summary.json").read_text())
    expected = summary["results"][1]
    assert expected["protocol"] == row["protocol"] == "plnlin"
    assert (row["method"], row["dataset"], row["trained_on"], row["images"]) == ("PReNet", "Rain800", "Rain800", "5")
    assert float(row["psnr"]) == expected["psnr"]
    assert float(row["ssim"]) == expected["ssim"]
    assert row["weights"] == summary["weights"]["sha256"][:8]
    assert float(row["parameters"]) == sum(p.numel() for p in PReNetModule(stages=1).parameters())
    assert float(row["macs"]) > float(row["parameters"]) * 1000
    assert 0 < float(row["seconds"]) == summary["seconds"] < 10


def test_results_of_a_part_of_a_set_are_marked_in_every_form(tested, copy, capsys):
    copy("whole")
    folder = copy("part", hyper_parameters={"variant": "PReNet", "stages": 1})
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"][0]["count"] = 3  # as every version has written it
    (folder / "summary.json").write_text(json.dumps(summary))
    marks = {"table": "*", "markdown": "*", "latex": "*"}
    for form, mark in marks.items():
        assert main(["table", str(copy.folder), "--format", form]) == 0
        shown = capsys.readouterr().out
        number = f"{summary['results'][0]['psnr']:.2f}"
        assert shown.count(f"{number}{mark}") == 1
        assert shown.count(number) == 2
        assert "3 of 5 images" in shown
    assert [(row["images"], row["partial_of"]) for row in table(capsys, copy.folder)] == [("3", "5"), ("5", "")]
    assert main(["table", str(copy.folder), "--plot", str(copy.folder / "plots")]) == 0
    assert [file for file in (copy.folder / "plots").iterdir() if "3-of-5" in file.name]


def test_seconds_are_of_a_set_and_the_table_prints_their_mean(copy, capsys):
    copy("a", seconds=0.25)
    copy("b", "Rain100L", ["RainTrainL"], seconds=0.75)
    told = {row["dataset"]: float(row["seconds"]) for row in table(capsys, copy.folder)}
    assert told == {"Rain800": 0.25, "Rain100L": 0.75}
    (row,) = rows_of(copy.folder)
    assert row.seconds == 0.5


def test_protocols_are_not_mixed(tested, copy, capsys):
    assert main(["table", str(tested)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "matlab-y (1), plnlin (1); choose one by --protocol" in told[0]
    copy("a", protocols=["matlab-y"])
    copy("b", protocols=["plnlin"])
    assert main(["table", str(copy.folder)]) == 2
    assert "several protocols" in capsys.readouterr().err
    assert main(["table", str(copy.folder), "--protocol", "plnlin"]) == 2
    assert "a/summary.json: " in capsys.readouterr().err
    assert main(["table", str(tested), "--protocol", "plnlin", "--format", "markdown"]) == 0
    told = capsys.readouterr().out
    assert "Protocol plnlin: RGB in floating point" in told
    assert "| PReNet | Rain800 |" in told


def test_each_set_by_weights_of_its_own_makes_one_line(copy):
    copy("one", "Rain100L", ["RainTrainL"])
    copy("two", "Rain100H", ["RainTrainH-full"])
    copy("three", ["Rain100H", "Rain100L", "Rain800"], ["RainTrainL", "RainTrainH-full", "Rain800"])
    (row,) = rows_of(copy.folder)
    assert {score.dataset for score in row.scores} == {"Rain100L", "Rain100H", "Mixed"}
    assert set(row.trained_on) == {"RainTrainL", "RainTrainH-full", "Rain800"}


def test_one_file_of_weights_on_several_sets_makes_one_line(copy):
    copy("one", "Rain800", sha="abc")
    copy("two", "Rain100L", sha="abc")
    copy("three", "Rain100H", ["RainTrainH"], sha="def")
    rows = rows_of(copy.folder)
    assert [{score.dataset for score in row.scores} for row in rows] == [{"Rain100H"}, {"Rain800", "Rain100L"}]
    assert len(set(row_labels(rows))) == 1  # what they were trained on tells them apart


def test_a_method_tested_twice_has_two_lines(copy):
    copy("a", sha="11111111")
    copy("b", sha="22222222")
    copy("c", sha="22222222")
    rows = rows_of(copy.folder)
    assert row_labels(rows) == [
        "PReNet [11111111]",
        "PReNet [22222222] [b/summary.json]",
        "PReNet [22222222] [c/summary.json]",
    ]


def test_what_differs_is_part_of_the_name(copy):
    copy("a", hyper_parameters={"variant": "PReNet", "stages": 1, "channels": 32})
    copy("b", hyper_parameters={"variant": "PReNet", "stages": 6, "channels": 32})
    one = {"solver": "posterior", "steps": 10, "seed": 0}
    copy("c", method="DACLIPSDEModule", hyper_parameters={"contexts": "none"}, sampling=one)
    copy("d", method="DACLIPSDEModule", hyper_parameters={"contexts": "none"}, sampling=one | {"steps": None})
    copy("e", method="CLIPRPNModule", hyper_parameters={"dim": 48})
    assert row_labels(rows_of(copy.folder)) == [
        "PReNet, stages 1",
        "PReNet, stages 6",
        "IR-SDE, posterior, steps 10",
        "IR-SDE, posterior, steps all",
        "CLIP-RPN",
    ]


def test_published_rows_say_where_they_come_from(tested, copy, capsys):
    copy("a", "Rain200H", ["Rain200H"], protocols=["plnlin"])
    copy("b", "Rain100H", ["RainTrainH"], protocols=["plnlin"])
    assert main(["table", str(copy.folder), "--published", "--format", "markdown"]) == 0
    told = capsys.readouterr().out
    assert "| PLNLIN-MCDDL [5] |  | – | 30.16 / 0.9227 | 2.25 | – |" in told
    assert "| CLIP-RPN [1] |  | 29.66 / 0.8423" in told
    assert "| DA-CLIP + IR-SDE [2] |  | 29.98 / 0.8867 / 0.0505 |" in told
    notes = {line[:3]: line for line in told.splitlines() if line.startswith("[")}
    for place in ("[4]", "[5]"):
        assert "Table 2" in notes[place]
        assert "another protocol" not in notes[place]
    assert "Table 3" in notes["[1]"]
    assert all("another protocol than plnlin" in notes[f"[{place}]"] for place in (1, 2, 3))


def test_published_numbers_have_the_averages_that_the_paper_prints():
    """CLIP-RPN, Table 3: its last two columns are means over the four sets."""
    average = {"PReNet": (27.49, 0.8085), "Restormer": (31.55, 0.8603), "CLIP-RPN": (31.67, 0.8607)}
    rows = [
        row for row in published_rows({"Rain100L", "Rain100H", "Rain800", "Mixed"}, "matlab-y") if len(row.scores) == 4
    ]
    assert {row.method for row in rows} == set(average)
    for row in rows:
        means = np.mean([(score.psnr, score.ssim) for score in row.scores], axis=0)
        assert abs(means[0] - average[row.method][0]) < 0.0051
        assert abs(means[1] - average[row.method][1]) < 0.000051


def test_latex_has_as_many_cells_in_every_line(copy, tmp_path, capsys):
    copy("a", "my_set", ["my_set"])
    copy("b", "Rain100H", ["RainTrainH"])
    out = tmp_path / "table.tex"
    assert main(["table", str(copy.folder), "--published", "--format", "latex", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    lines = [line for line in out.read_text().splitlines() if "&" in line and not line.startswith("%")]
    spanned = [line.count("&") + line.count("{2}{c}") + 2 * line.count("{3}{c}") for line in lines]
    assert len(set(spanned)) == 1
    assert r"\multicolumn{2}{c}{my\_set}" in lines[0]
    assert r"\multicolumn{3}{c}{Rain100H}" in lines[0]
    told, below = out.read_text().split(r"\end{tabular}")
    assert "CLIP-RPN\\textsuperscript{1}" in told
    printed = [line for line in below.splitlines() if not line.startswith("%")]
    assert any(line.startswith("Protocol matlab-y: BT.601") for line in printed)
    assert any(line.startswith("\\textsuperscript{1} published: Guan") and "trained on" in line for line in printed)


def test_latex_has_nothing_that_it_cannot_print():
    """Definitions of protocols and notes of published rows hold Greek letters and signs."""
    for protocol in PROTOCOLS:
        rows = published_rows(set(LAYOUTS), protocol)
        told = "\n".join(footnotes(notes(rows, protocol)))
        assert told.isascii()
        assert not re.search(r"(?<!\\)[&%#_~^]", told)
    assert escape(r"a\b~c^d_{e}") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\_\{e\}"


def test_published_rows_that_are_in_doubt_say_so():
    rows = {row.method: row.note for row in published_rows({"Rain200H"}, "plnlin")}
    assert "the numbers of ReHEN" in rows["PReNet"]
    assert "ReHEN" not in rows["PLNLIN-MCDDL"]


def test_a_method_that_cannot_be_built_here_stands_in_the_table_without_cost(tested, copy, capsys, caplog):
    copy("alien", method="AlienModule", sha="alien")
    alien, known = table(capsys, copy.folder, tested, "--protocol", "matlab-y", "--cost")
    assert (alien["parameters"], alien["macs"]) == ("", "")
    assert float(known["macs"]) > 0
    assert "its cost is not counted, as AlienModule cannot be built here" in caplog.text


def test_a_terminal_gets_a_table_with_footnotes(copy, capsys):
    copy("a", hardware=None)
    changed = json.loads((copy("b", sha="other") / "summary.json").read_text())
    changed["data"]["fingerprint"] = "of other images"
    (copy.folder / "b" / "summary.json").write_text(json.dumps(changed))
    assert main(["table", str(copy.folder / "a" / "summary.json"), str(copy.folder / "b")]) == 0
    told = capsys.readouterr().out
    assert "PReNet [other000]" in told
    assert "Rain800: not all rows are of the same images" in told


def test_plots(copy, tmp_path, capsys):
    copy("a")
    copy("b", "Rain100L", ["RainTrainL"])
    run = copy.folder / "fit-1"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,train/loss,val/psnr\n0,9,0.1,\n0,10,,20.5\n1,20,,22.5\n")
    plots = tmp_path / "plots"
    assert main(["table", str(copy.folder), "--plot", str(plots)]) == 0
    assert "wrote 5 plots" in capsys.readouterr().err
    names = ["curves", "images-prenet-rain100l", "images-prenet-rain800", "seconds-rain100l", "seconds-rain800"]
    assert sorted(path.stem for path in plots.iterdir()) == names
    for path in plots.iterdir():
        picture = read_rgb(path)
        assert min(picture.shape[:2]) > 500
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_plots_whose_names_differ_only_in_marks_do_not_replace_each_other(copy, tmp_path, capsys):
    for name, method in (("a", "My_Net"), ("b", "MyNet"), ("c", "My-Net")):
        copy(name, method=method, hyper_parameters={})
    assert main(["table", str(copy.folder), "--plot", str(tmp_path / "plots")]) == 0
    assert "wrote 4 plots" in capsys.readouterr().err
    names = ["images-my-net-rain800", "images-my-net-rain800-2", "images-mynet-rain800", "seconds-rain800"]
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == names


def test_refusals_take_one_line(tested, copy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    copy("a", lpips_net="alex")
    copy("b", sha="b", lpips_net="vgg")
    for name in ("a", "b"):
        file = copy.folder / name / "summary.json"
        summary = json.loads(file.read_text())
        summary["results"][0]["lpips"] = 0.1
        file.write_text(json.dumps(summary))
    for arguments, told in (
        ([tmp_path / "absent"], "absent: no such file or folder"),
        ([tmp_path / "empty"], "empty: holds no summary.json"),
        ([tmp_path / "no.json"], "no.json: "),
        ([tmp_path / "text.json"], "text.json: "),
        ([copy.folder / "a", copy.folder / "b"], "alex, vgg"),
        ([tested, "--protocol", "mine"], "no results by mine"),
    ):
        assert main(["table", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith("derain: error:")
        assert told in error[0]
