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
from derain.commands.table import table_notes
from derain.data.layouts import LAYOUTS
from derain.data.run_summaries import merge_rows, published_rows, read_summary, row_labels, select_protocol
from derain.images import read_rgb
from derain.methods import PReNetModule
from derain.metrics import PROTOCOLS
from derain.tables import escape_latex, latex_notes
from tests.factories import make_set

CONFIG = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {"test": "Rain800", "workers": 0},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    "protocol": ["matlab-y", "plnlin"],
}


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """Run folder of a test of an untrained PReNet, with two protocols."""
    folder = tmp_path_factory.mktemp("tested")
    make_set(folder / "data", "Rain800", "test", count=5)
    torch.manual_seed(0)
    method = PReNetModule(stages=1)
    method.trained_on = ("Rain800",)
    method.save_weights(folder / "w.safetensors")
    (folder / "exp.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DERAIN_DATA", str(folder / "data"))
        assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors"]) == 0
    return folder / "runs/exp/test-1"


@pytest.fixture
def copy(tested, tmp_path):
    """Return a function that copies the run with changes, such as another set, weights or method."""

    def make(name, sets="Rain800", trained_on=("Rain800",), sha=None, protocols=("matlab-y",), **changes):
        folder = tmp_path / "results" / name
        shutil.copytree(tested, folder)
        summary = json.loads((folder / "summary.json").read_text())
        summary["data"]["sets"] = sets
        summary["method"]["trained_on"] = list(trained_on)
        summary["weights"]["sha256"] = (sha or name).ljust(64, "0")
        summary["results"] = [result for result in summary["results"] if result["protocol"] in protocols]
        for key, value in changes.items():
            target = summary["method"] if key in {"method", "class_path", "hyper_parameters"} else summary
            target[key] = value
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    make.folder = tmp_path / "results"
    return make


def table(capsys, *arguments):
    """Return the rows of the CSV."""
    assert main(["table", *map(str, arguments), "--format", "csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def rows_of(folder):
    return merge_rows(
        select_protocol([(file, read_summary(file)) for file in sorted(folder.rglob("summary.json"))], None)[0]
    )


def test_means_over_sequences_have_their_own_columns(copy, capsys):
    copy("image", "Rain800", sha="a")
    folder = copy("video", "NTURain", sha="a")
    summary = json.loads((folder / "summary.json").read_text())
    means = {"psnr": 31.5, "ssim": 0.75, "flicker": 2.5, "warping_error": 0.0125}
    summary["results"][0] |= {"flicker": 3.5, "warping_error": 0.25, "sequences": {"count": 2, **means}}
    (folder / "summary.json").write_text(json.dumps(summary))
    image, video = table(capsys, copy.folder)
    assert (video["dataset"], video["sequences"]) == ("NTURain", "2")
    assert {name: float(video[f"sequence_{name}"]) for name in means} == means
    assert (float(video["flicker"]), float(video["warping_error"])) == (3.5, 0.25)
    assert float(video["psnr"]) == summary["results"][0]["psnr"] != 31.5
    assert image["sequences"] == image["sequence_psnr"] == image["flicker"] == ""
    assert main(["table", str(copy.folder), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "NTURain, sequences" in text
    assert "Rain800, sequences" not in text
    assert "31.50" in text
    del summary["results"][0]["sequences"]["psnr"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["table", str(copy.folder)]) == 2


def test_scores_of_a_run(tested, capsys):
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


def test_results_of_a_part_of_a_set_are_marked(tested, copy, capsys):
    copy("whole")
    folder = copy("part", hyper_parameters={"variant": "PReNet", "stages": 1})
    summary = json.loads((folder / "summary.json").read_text())
    summary["results"][0]["count"] = 3  # as every version has written it
    (folder / "summary.json").write_text(json.dumps(summary))
    for form in ("table", "markdown", "latex"):
        assert main(["table", str(copy.folder), "--format", form]) == 0
        shown = capsys.readouterr().out
        number = f"{summary['results'][0]['psnr']:.2f}"
        assert shown.count(f"{number}*") == 1
        assert shown.count(number) == 2
        assert "3 of 5 images" in shown
    assert [(row["images"], row["partial_of"]) for row in table(capsys, copy.folder)] == [("3", "5"), ("5", "")]
    assert main(["table", str(copy.folder), "--plot", str(copy.folder / "plots")]) == 0
    assert [file for file in (copy.folder / "plots").iterdir() if "3-of-5" in file.name]


def test_seconds_are_the_mean_over_sets(copy, capsys):
    copy("a", seconds=0.25)
    copy("b", "Rain100L", ["RainTrainL"], seconds=0.75)
    seconds = {row["dataset"]: float(row["seconds"]) for row in table(capsys, copy.folder)}
    assert seconds == {"Rain800": 0.25, "Rain100L": 0.75}
    (row,) = rows_of(copy.folder)
    assert row.seconds == 0.5


def test_protocols_are_not_mixed(tested, copy, capsys):
    assert main(["table", str(tested)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    for part in ("matlab-y (1)", "plnlin (1)", "--protocol"):
        assert part in error
    copy("a", protocols=["matlab-y"])
    copy("b", protocols=["plnlin"])
    assert main(["table", str(copy.folder)]) == 2
    assert "--protocol" in capsys.readouterr().err
    assert main(["table", str(copy.folder), "--protocol", "plnlin"]) == 2
    error = capsys.readouterr().err
    for part in ("a/summary.json", "plnlin", "matlab-y"):
        assert part in error
    assert main(["table", str(tested), "--protocol", "plnlin", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "Protocol plnlin: RGB in floating point" in text
    assert "| PReNet | Rain800 |" in text


def test_weights_trained_for_one_set_each_share_a_row(copy):
    copy("one", "Rain100L", ["RainTrainL"])
    copy("two", "Rain100H", ["RainTrainH-full"])
    copy("three", ["Rain100H", "Rain100L", "Rain800"], ["RainTrainL", "RainTrainH-full", "Rain800"])
    (row,) = rows_of(copy.folder)
    assert {score.dataset for score in row.scores} == {"Rain100L", "Rain100H", "Mixed"}
    assert set(row.trained_on) == {"RainTrainL", "RainTrainH-full", "Rain800"}


def test_weights_tested_on_several_sets_have_one_row(copy):
    copy("one", "Rain800", sha="abc")
    copy("two", "Rain100L", sha="abc")
    copy("three", "Rain100H", ["RainTrainH"], sha="def")
    rows = rows_of(copy.folder)
    assert [{score.dataset for score in row.scores} for row in rows] == [{"Rain100H"}, {"Rain800", "Rain100L"}]
    assert len(set(row_labels(rows))) == 1  # the training sets differ


def test_a_method_tested_twice_has_two_rows(copy):
    copy("a", sha="11111111")
    copy("b", sha="22222222")
    copy("c", sha="22222222")
    rows = rows_of(copy.folder)
    assert row_labels(rows) == [
        "PReNet [11111111]",
        "PReNet [22222222] [b/summary.json]",
        "PReNet [22222222] [c/summary.json]",
    ]


def test_differing_hyper_parameters_are_part_of_the_name(copy):
    copy("a", hyper_parameters={"variant": "PReNet", "stages": 1, "channels": 32})
    copy("b", hyper_parameters={"variant": "PReNet", "stages": 6, "channels": 32})
    sampling = {"solver": "posterior", "steps": 10, "seed": 0}
    copy("c", method="DACLIPSDEModule", hyper_parameters={"contexts": "none"}, sampling=sampling)
    copy("d", method="DACLIPSDEModule", hyper_parameters={"contexts": "none"}, sampling=sampling | {"steps": None})
    copy("e", method="CLIPRPNModule", hyper_parameters={"dim": 48})
    assert row_labels(rows_of(copy.folder)) == [
        "PReNet, stages 1",
        "PReNet, stages 6",
        "IR-SDE, posterior, steps 10",
        "IR-SDE, posterior, steps all",
        "CLIP-RPN",
    ]


def test_published_rows_have_notes(tested, copy, capsys):
    copy("a", "Rain200H", ["Rain200H"], protocols=["plnlin"])
    copy("b", "Rain100H", ["RainTrainH"], protocols=["plnlin"])
    assert main(["table", str(copy.folder), "--published", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    notes = {line.partition("]")[0][1:]: line for line in text.splitlines() if line.startswith("[")}
    expected = {
        "| PLNLIN-MCDDL": ("30.16 / 0.9227 | 2.25", "MM '24, Table 2", False),
        "| RESCAN": ("26.66 / 0.8419 | 0.15", "MM '24, Table 2", False),
        "| CLIP-RPN": ("29.66 / 0.8423", "perception, Table 3", True),
        "| DA-CLIP + IR-SDE": ("29.98 / 0.8867 / 0.0505", "Table I:", True),
    }
    for method, (numbers, source, other_protocol) in expected.items():
        (row,) = (line for line in rows if line.startswith(f"{method} [") and numbers in line)
        note = notes[row.partition("[")[2].partition("]")[0]]
        assert source in note
        assert ("differs from plnlin" in note) == other_protocol


AVERAGES = {  # CLIP-RPN, the last two columns of Tables 3, 6 and 11
    "cliprpn:3": {
        "PReNet": (27.49, 0.8085),
        "MPRNet": (29.61, 0.8390),
        "AirNet": (31.31, 0.8578),
        "Restormer": (31.55, 0.8603),
        "TransWeather": (26.18, 0.8325),
        "DRSformer": (31.45, 0.8582),
        "PromptIR": (31.47, 0.8592),
        "AMIR": (31.31, 0.8580),
        "CLIP-RPN": (31.67, 0.8607),
    },
    "cliprpn:6": {
        "CLIP-RPN, prompts 1": (31.30, 0.8541),
        "CLIP-RPN, prompts 2": (31.4575, 0.8589),  # printed as 31.45
        "CLIP-RPN, prompts 3": (31.67, 0.8607),
    },
    "cliprpn:11": {
        "CLIP-RPN, l1 loss": (31.52, 0.8584),
        "CLIP-RPN, l2 loss": (31.45, 0.8573),
        "CLIP-RPN, Huber loss": (31.43, 0.8569),
        "CLIP-RPN": (31.67, 0.8607),
    },
}


@pytest.mark.parametrize("paper", AVERAGES)
def test_published_numbers_have_the_averages_that_the_paper_prints(paper):
    rows = published_rows({"Rain100L", "Rain100H", "Rain800", "Mixed"}, "matlab-y", paper)
    assert [row.method for row in rows] == list(AVERAGES[paper])
    for row in rows:
        means = np.mean([(score.psnr, score.ssim) for score in row.scores], axis=0)
        assert abs(means[0] - AVERAGES[paper][row.method][0]) < 0.0051
        assert abs(means[1] - AVERAGES[paper][row.method][1]) < 0.000051


def test_a_table_of_a_paper_is_rebuilt_with_our_rows(tested, copy, capsys, caplog):
    copy("a", "Rain200H", ["Rain200H"], protocols=["plnlin"])
    copy("b", "Rain100H", ["RainTrainH"], protocols=["plnlin"])
    assert main(["table", str(copy.folder), "--paper", "plnlin:2", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["dataset"] for row in rows} == {"Rain200H", "Rain200L", "Rain1200", "Rain1400", "Rain12"}
    assert len({row["method"] for row in rows}) == 17  # ours is PReNet, as one of theirs
    assert len(rows) == 1 + 15 * 5 + 2 + 3
    assert caplog.records == []
    assert main(["table", str(copy.folder / "b"), "--paper", "plnlin:2", "--format", "csv"]) == 0
    assert any("skipped" in record.getMessage() for record in caplog.records)


def test_a_table_of_a_paper_needs_no_results(tmp_path, capsys):
    assert main(["table", "--paper", "cliprpn:10"]) == 0
    assert "32.11" in capsys.readouterr().out
    assert main(["table", "--paper", "cliprpn:99"]) == 2
    assert "cliprpn:3" in capsys.readouterr().err
    assert main(["table"]) == 2
    assert main(["table", "--paper", "cliprpn:10", "--plot", str(tmp_path)]) == 2
    assert "--plot" in capsys.readouterr().err


def test_latex_has_the_same_number_of_cells_in_every_row(copy, tmp_path, capsys):
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
    tabular, below = out.read_text().split(r"\end{tabular}")
    assert "CLIP-RPN\\textsuperscript{1}" in tabular
    printed = [line for line in below.splitlines() if not line.startswith("%")]
    assert any(line.startswith("Protocol matlab-y: BT.601") for line in printed)
    assert any(line.startswith("\\textsuperscript{1} published: Guan") and "trained on" in line for line in printed)


def test_latex_notes_are_escaped():
    """Definitions of protocols and notes of published rows have Greek letters and signs."""
    for protocol in PROTOCOLS:
        rows = published_rows(set(LAYOUTS), protocol)
        text = "\n".join(latex_notes(table_notes(rows, protocol)))
        assert text.isascii()
        assert not re.search(r"(?<!\\)[&%#_~^]", text)
    assert escape_latex(r"a\b~c^d_{e}") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\_\{e\}"


def test_doubtful_published_rows_have_a_note():
    rows = {row.method: row.note for row in published_rows({"Rain200H"}, "plnlin")}
    assert "ReHEN" in rows["PReNet"]
    assert "ReHEN" not in rows["PLNLIN-MCDDL"]


def test_an_unknown_method_has_a_row_without_cost(tested, copy, capsys, caplog):
    copy("alien", method="AlienModule", class_path="alien.AlienModule", sha="alien")
    alien, known = table(capsys, copy.folder, tested, "--protocol", "matlab-y", "--cost")
    assert (alien["parameters"], alien["macs"]) == ("", "")
    assert float(known["macs"]) > 0
    assert "AlienModule" in caplog.text


def test_cost_of_a_method_that_cannot_be_built_is_reported(tested, copy, capsys, caplog):
    copy("broken", hyper_parameters={"variant": "PReNet", "absent": 1})
    (row,) = table(capsys, copy.folder, "--cost")
    assert row["macs"] == ""
    assert "absent" in caplog.text


def test_cost_of_a_method_that_cannot_be_counted_is_reported(tested, capsys, caplog, monkeypatch):
    def fail(method, rainy):
        raise RuntimeError("depends on values")

    monkeypatch.setattr(PReNetModule, "pass_once", fail)
    (row,) = table(capsys, tested, "--protocol", "plnlin", "--cost")
    assert row["macs"] == ""
    assert "depends on values" in caplog.text


def test_best_values_and_what_is_not_compared(copy, tmp_path, capsys, caplog):
    for name, psnr in (("a", 20.0), ("b", 21.0), ("c", 29.0)):
        folder = copy(name)
        summary = json.loads((folder / "summary.json").read_text())
        summary["results"][0]["psnr"] = psnr
        summary["results"][0]["count"] = 3 if name == "c" else 5
        (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["table", str(copy.folder), "--best", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "**21.00**" in text
    assert "29.00*" in text
    assert text.rstrip().splitlines()[-1].startswith("Bold:")
    assert "--best" not in caplog.text
    for form, out in (("csv", None), ("json", None), ("table", None), ("table", tmp_path / "t.txt")):
        caplog.clear()
        options = [] if out is None else ["--out", str(out)]
        assert main(["table", str(copy.folder), "--best", "--format", form, *options]) == 0
        assert "--best" in caplog.text


def test_table_has_notes(copy, capsys):
    copy("a", hardware=None)
    changed = json.loads((copy("b", sha="other") / "summary.json").read_text())
    changed["data"]["fingerprint"] = "of other images"
    (copy.folder / "b" / "summary.json").write_text(json.dumps(changed))
    assert main(["table", str(copy.folder / "a" / "summary.json"), str(copy.folder / "b")]) == 0
    text = capsys.readouterr().out
    assert "PReNet [other000]" in text
    assert "of other images" in text


@pytest.mark.slow
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


def test_plots_of_similar_names_do_not_overwrite_each_other(copy, tmp_path, capsys):
    for name, method in (("a", "My_Net"), ("b", "MyNet"), ("c", "My-Net")):
        copy(name, method=method, hyper_parameters={})
    assert main(["table", str(copy.folder), "--plot", str(tmp_path / "plots")]) == 0
    assert "wrote 4 plots" in capsys.readouterr().err
    names = ["images-my-net-rain800", "images-my-net-rain800-2", "images-mynet-rain800", "seconds-rain800"]
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == names


def test_bad_input_gives_one_line(tested, copy, tmp_path, capsys):
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
    for arguments, values in (
        ([tmp_path / "absent"], ["absent"]),
        ([tmp_path / "empty"], ["empty", "summary.json"]),
        ([tmp_path / "no.json"], ["no.json"]),
        ([tmp_path / "text.json"], ["text.json"]),
        ([copy.folder / "a", copy.folder / "b"], ["alex, vgg"]),
        ([tested, "--protocol", "mine"], ["mine"]),
    ):
        assert main(["table", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith("derain: error:")
        for value in values:
            assert value in error[0]
