import csv
import io
import json
import re
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from rich.text import Text

from derain.cli import main
from derain.commands import score
from derain.data.pairs import find_pairs
from derain.metrics import PROTOCOLS, perceptual, psnr_ssim, resolve
from derain.metrics.perceptual import Lpips, PyiqaMetric
from derain.metrics.protocols import DOWNSAMPLE_SUFFIX, PROTOCOL_GROUPS
from derain.metrics.temporal import temporal_scores
from derain.tables import Format
from tests.factories import add_rain, clean_image, make_set, save


def run(*arguments):
    return main(["score", *map(str, arguments)])


def error_of(capsys, *arguments):
    """Return the error line of a command that is refused."""
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def results(capsys, *arguments):
    assert run(*arguments, "--format", "json", "--lpips", "none") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))


@pytest.fixture
def folders(tmp_path):
    """Three results with the names of rainy images, and their clean images."""
    for index in range(3):
        clean = clean_image(index)
        save(tmp_path / "derained" / f"rain-{index:03d}.png", add_rain(clean, index))
        save(tmp_path / "clean" / f"norain-{index}.png", clean)
    return tmp_path / "derained", tmp_path / "clean"


def expected(protocol, indices=range(3)):
    pairs = [(add_rain(clean_image(index), index), clean_image(index)) for index in indices]
    return np.array([psnr_ssim(*pair, resolve([protocol])[0]) for pair in pairs])


def test_json_has_one_object_a_protocol(folders, capsys):
    scores = results(capsys, *folders, "--protocol", "matlab-y", "ir-sde", "--protocol", "rgb+down")
    assert [result["protocol"] for result in scores] == ["matlab-y", "ir-sde-rgb", "ir-sde-y", "rgb+down"]
    for result in scores:
        values = expected(result["protocol"])
        assert (result["psnr"], result["ssim"]) == pytest.approx(tuple(values.mean(axis=0)))
        assert result["count"] == 3
        assert result["lpips"] is None
        assert result["definition"]
        low, high = result["psnr_interval"]
        assert values[:, 0].min() - 1e-9 <= low <= result["psnr"] <= high <= values[:, 0].max() + 1e-9
        assert [image["name"] for image in result["images"]] == ["rain-000", "rain-001", "rain-002"]
        pairs = [(image["psnr"], image["ssim"]) for image in result["images"]]
        np.testing.assert_allclose(pairs, values, atol=1e-12)


def test_table_defines_the_protocol_in_a_note(folders, capsys):
    assert run(*folders, "--protocol", "matlab-y", "restormer") == 0
    out = Text.from_ansi(capsys.readouterr().out).plain
    for name in ("matlab-y", "restormer"):
        psnr, ssim = expected(name).mean(axis=0)
        assert re.search(rf"{name}.* 3 .*{psnr:.3f} \[.*\].*{ssim:.4f} \[.*\]", out)
        assert f"\n{name}: {resolve([name])[0].definition}" in out


def test_csv_has_one_row_an_image_and_protocol(folders, capsys):
    assert run(*folders, "--protocol", "rgb", "plnlin", "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["protocol"], row["name"]) for row in rows[2:4]] == [
        ("rgb", "rain-002"),
        ("plnlin", "rain-000"),
    ]
    assert float(rows[0]["psnr"]) == expected("rgb")[0, 0]
    assert list(rows[0]) == ["protocol", "name", "psnr", "ssim"]


def test_markdown_and_latex(folders, capsys):
    psnr, ssim = expected("matlab-y").mean(axis=0)
    assert run(*folders, "--format", "markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "| protocol | images | PSNR (dB) | SSIM |",
        "| --- | ---: | ---: | ---: |",
        f"| matlab-y | 3 | {psnr:.3f} | {ssim:.4f} |",
    ]
    assert lines[4].startswith("matlab-y: BT.601")
    assert run(*folders, "--format", "latex") == 0
    out = capsys.readouterr().out
    assert rf"matlab-y & 3 & {psnr:.3f} & {ssim:.4f} \\" in out
    assert out.count(r"\begin{tabular}{lrrr}") == out.count(r"\end{tabular}") == 1
    assert "matlab-y: BT.601" in out.partition(r"\end{tabular}")[2]


def test_out_writes_a_file_and_prints_nothing(folders, tmp_path, capsys):
    for form in get_args(Format):
        assert run(*folders, "--format", form, "--out", tmp_path / "scores" / form) == 0
        assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "scores" / "json").read_text())[0]["count"] == 3
    assert "matlab-y: BT.601" in (tmp_path / "scores" / "table").read_text()


def test_the_function_is_the_command(folders, tmp_path):
    derained, clean = folders
    out = tmp_path / "scores.json"
    assert score.score(derained, str(clean), protocol=["rgb"], lpips="none", format="json", out=out) == 0
    (result,) = json.loads(out.read_text())
    assert result["psnr"] == pytest.approx(expected("rgb")[:, 0].mean())


def test_help_names_every_protocol(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out.replace("ir-\n", "ir-").replace(" ", "").replace("\n", "")
    for name in (*PROTOCOLS, *PROTOCOL_GROUPS, DOWNSAMPLE_SUFFIX):
        assert name in text


def test_scores_two_files_and_one_file_against_a_folder(folders, capsys):
    derained, clean = folders
    (pair,) = results(capsys, derained / "rain-001.png", clean / "norain-2.png")
    direct = psnr_ssim(add_rain(clean_image(1), 1), clean_image(2), resolve(["matlab-y"])[0])
    assert (pair["psnr"], pair["ssim"]) == pytest.approx(direct)
    assert pair["psnr_interval"] is None
    (matched,) = results(capsys, derained / "rain-001.png", clean)
    assert matched["psnr"] == pytest.approx(expected("matlab-y")[1, 0])


@pytest.mark.parametrize("name", ["Rain100L", "Rain100H", "Rain800", "Rain1400"])
def test_clean_may_be_a_data_set(tmp_path, name, capsys):
    """Rain800 has pairs in one file, Rain1400 several rainy images of a clean one."""
    folder = make_set(tmp_path, name, "test", count=3)
    pairs = find_pairs(folder, "test").pairs
    for offset, pair in enumerate(pairs, start=1):
        brighter = np.clip(pair.read()[1].astype(int) + offset, 0, 255).astype(np.uint8)
        save(tmp_path / "derained" / f"{pair.name}.png", brighter)
    (result,) = results(capsys, tmp_path / "derained", folder, "--protocol", "rgb")
    assert result["count"] == len(pairs)
    for offset, image in enumerate(result["images"], start=1):
        assert image["psnr"] == pytest.approx(20 * np.log10(255 / offset), abs=1e-9)


def test_clean_may_be_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    make_set(tmp_path, "Rain100L", "test", count=2)
    for index in range(2):
        save(tmp_path / "out" / f"rain-{index + 1:03d}.png", clean_image(index))
    assert run(tmp_path / "out", "Rain100L", "--format", "json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["psnr"] == 100
    assert "Rain100L, test" in printed.err


def test_equal_images_count_as_100_db(folders, capsys):
    _, clean = folders
    assert run(clean, clean, "--lpips", "none") == 0
    out = capsys.readouterr().out
    assert "100.000" in out
    assert any(line.endswith(": 3") and "100 dB" in line for line in out.splitlines())


def test_missing_and_wrong_inputs_are_refused(folders, tmp_path, capsys):
    derained, clean = folders
    (tmp_path / "empty").mkdir()
    for arguments, value in (
        ((tmp_path / "nowhere", clean), "nowhere"),
        ((tmp_path / "empty", clean), "empty"),
        ((derained, tmp_path / "empty"), "empty"),
        ((derained, tmp_path / "nowhere"), "nowhere"),
        ((derained, clean / "norain-1.png"), "norain-1.png"),
        ((derained,), "CLEAN"),
        ((derained, clean, "--protocol", "matlab"), "'matlab'"),
    ):
        assert value in error_of(capsys, *arguments)


def test_broken_and_tiny_files_are_named(folders, capsys):
    derained, clean = folders
    for file in (derained / "rain-000.png", clean / "norain-0.png"):
        save(file, clean_image(0, (12, 12)))
    error = error_of(capsys, derained, clean, "--protocol", "ir-sde")
    for part in ("rain-000.png", "ir-sde-rgb", "19x19"):
        assert part in error
    (derained / "rain-000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "rain-000.png" in error_of(capsys, derained, clean)


def test_without_weights_lpips_is_skipped(folders, capsys):
    assert run(*folders, "--format", "json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["lpips"] is None
    (line,) = [line for line in printed.err.splitlines() if "LPIPS" in line]
    assert "--lpips alex" in line


class MeanLpips(Lpips):
    """Replaces LPIPS by the mean of the derained image."""

    def __init__(self, net="alex", *, fetch=False):
        assert fetch
        self.net = net

    def __call__(self, derained, clean):
        return float(derained.mean())


class Brightness(PyiqaMetric):
    """Replaces pyiqa's metrics: the mean of the derained image, or its difference from the clean one."""

    def __init__(self, name, *, full_reference=False):
        self.name, self.full_reference = name, full_reference

    def __call__(self, derained, clean=None):
        return float(derained.mean() - (clean.mean() if self.full_reference else 0))


def test_lpips_and_no_reference_metrics_are_in_every_format(folders, monkeypatch, capsys):
    monkeypatch.setattr(perceptual, "Lpips", MeanLpips)
    monkeypatch.setattr(score, "PyiqaMetric", Brightness)
    arguments = (*folders, "--lpips", "alex", "--no-reference", "brightness")
    means = [add_rain(clean_image(index), index).mean() for index in range(3)]
    assert run(*arguments, "--format", "json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["lpips"] == result["no_reference"]["brightness"] == pytest.approx(np.mean(means))
    assert result["lpips_net"] == "alex"
    assert [image["lpips"] for image in result["images"]] == pytest.approx(means)
    for form in ("table", "markdown", "latex"):
        assert run(*arguments, "--format", form) == 0
        out = capsys.readouterr().out
        assert "LPIPS (alex)" in out
        assert f"{np.mean(means):.4f}" in out
    assert run(*arguments, "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("protocol,name,psnr,ssim,lpips,brightness\n")


def test_real_photos_are_scored_without_clean_images(folders, monkeypatch, capsys):
    monkeypatch.setattr(score, "PyiqaMetric", Brightness)
    assert run(folders[0], "--no-reference", "brightness", "--format", "json") == 0
    printed = capsys.readouterr()
    (result,) = json.loads(printed.out)
    assert (result["protocol"], result["psnr"], result["lpips"]) == (None, None, None)
    assert result["no_reference"]["brightness"] > 0
    assert "LPIPS" not in printed.err
    for form in ("table", "markdown", "latex", "csv"):
        assert run(folders[0], "--no-reference", "brightness", "--format", form) == 0
        assert "brightness" in capsys.readouterr().out


def test_metrics_with_reference_and_distances_of_folders(folders, monkeypatch, capsys):
    monkeypatch.setattr(score, "PyiqaMetric", Brightness)
    monkeypatch.setattr(perceptual, "_create", lambda name, mode: lambda derained, clean, **options: 12.5)
    arguments = (*folders, "--lpips", "none", "--full-reference", "difference,fid", "--no-reference", "brightness")
    assert run(*arguments, "--format", "json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    differences = [add_rain(clean_image(index), index).mean() - clean_image(index).mean() for index in range(3)]
    assert result["full_reference"] == {"difference": pytest.approx(np.mean(differences)), "fid": 12.5}
    assert list(result["no_reference"]) == ["brightness"]
    assert [image["difference"] for image in result["images"]] == pytest.approx(differences)
    assert run(*arguments, "--format", "table") == 0
    assert "12.5000" in capsys.readouterr().out
    assert "dists" in error_of(capsys, folders[0], "--no-reference", "brightness", "--full-reference", "dists")


def test_a_missing_metric_is_skipped(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(*folders, "--no-reference", "niqe", "--format", "json", "--lpips", "none") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["no_reference"] == {}
    assert "skipped niqe" in printed.err
    assert "derain[iqa]" in printed.err
    assert "derain[iqa]" in error_of(capsys, folders[0], "--no-reference", "niqe")


def test_an_unknown_metric_is_refused(folders, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(list_models=lambda metric_mode: ["niqe"]))
    assert "nieq" in error_of(capsys, *folders, "--no-reference", "nieq")


@pytest.fixture
def video(tmp_path):
    """Results for two sequences of three frames, and the data set."""
    make_set(tmp_path, "video", "test", count=3, size=(32, 40))
    for pair in find_pairs(f"video:{tmp_path / 'video'}", "test").pairs:
        rainy, _ = pair.read()
        save(tmp_path / "derained" / f"{pair.name}.png", rainy)
    return tmp_path / "derained", f"video:{tmp_path / 'video'}"


def test_videos_are_scored_by_frame_and_by_sequence(video, capsys):
    (result,) = results(capsys, *video, "--protocol", "rgb", "temporal")
    assert [image["name"] for image in result["images"][:2]] == ["street/00000000", "street/00000001"]
    assert [image["flicker"] is None for image in result["images"]] == [True, False, False] * 2
    assert [sequence["sequence"] for sequence in result["sequences"]] == ["street", "yard"]
    for start, sequence in zip((0, 3), result["sequences"], strict=True):
        frames = result["images"][start : start + 3]
        for key in ("psnr", "ssim", "flicker", "warping_error", "clean_flicker", "clean_warping_error"):
            known = [frame[key] for frame in frames if frame[key] is not None]
            assert sequence[key] == pytest.approx(np.mean(known))
            assert result["sequence_means"][key] == pytest.approx(np.mean([s[key] for s in result["sequences"]]))
    pairs = find_pairs(video[1], "test").pairs
    (before, clean_before), (after, clean_after) = pairs[0].read(), pairs[1].read()
    reference = temporal_scores((clean_before, clean_after), {"": (before, after)})
    assert {key: result["images"][1][key] for key in reference} == reference
    assert result["temporal"]["flicker"] == pytest.approx(
        np.mean([image["flicker"] for image in result["images"] if image["flicker"] is not None])
    )


def test_tables_of_videos_name_what_means_are_over(video, capsys):
    assert run(*video, "--protocol", "rgb", "temporal", "--lpips", "none") == 0
    table = capsys.readouterr().out
    assert "2 sequences" in table
    assert "warping error" in table
    assert run(*video, "--protocol", "rgb", "--lpips", "none", "--format", "csv") == 0
    records = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(record["name"], record["sequence"]) for record in records[-2:]] == [
        ("mean of 3 frames", "street"),
        ("mean of 3 frames", "yard"),
    ]


def test_temporal_scores_need_videos(folders, capsys):
    assert "temporal" in error_of(capsys, *folders, "--protocol", "rgb", "temporal")
