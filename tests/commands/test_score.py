import argparse
import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from rich.text import Text

from derain.commands import score
from derain.data.pairs import find_pairs
from derain.errors import DerainError
from derain.metrics import perceptual, psnr_ssim, resolve
from derain.metrics.perceptual import Lpips, NoReference
from tests.factories import add_rain, clean_image, make_set, save


def run(*arguments):
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    return score.run(parser.parse_args([str(argument) for argument in arguments]))


def results(capsys, *arguments):
    assert run(*arguments, "--format", "json", "--lpips", "none") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))


@pytest.fixture
def folders(tmp_path):
    """Three results named as restored rainy images are, and their clean images."""
    for index in range(3):
        clean = clean_image(index)
        save(tmp_path / "derained" / f"rain-{index:03d}.png", add_rain(clean, index))
        save(tmp_path / "clean" / f"norain-{index}.png", clean)
    return tmp_path / "derained", tmp_path / "clean"


def expected(protocol, indices=range(3)):
    pairs = [(add_rain(clean_image(index), index), clean_image(index)) for index in indices]
    return np.array([psnr_ssim(*pair, resolve([protocol])[0]) for pair in pairs])


def test_json_holds_one_object_a_protocol(folders, capsys):
    told = results(capsys, *folders, "--protocol", "matlab-y", "ir-sde", "--protocol", "rgb+down")
    assert [result["protocol"] for result in told] == ["matlab-y", "ir-sde-rgb", "ir-sde-y", "rgb+down"]
    for result in told:
        values = expected(result["protocol"])
        assert (result["psnr"], result["ssim"]) == pytest.approx(tuple(values.mean(axis=0)))
        assert result["count"] == 3
        assert result["lpips"] is None
        assert result["definition"]
        low, high = result["psnr_interval"]
        assert values[:, 0].min() - 1e-9 <= low <= result["psnr"] <= high <= values[:, 0].max() + 1e-9
        assert [image["name"] for image in result["images"]] == ["rain-000", "rain-001", "rain-002"]
        got = [(image["psnr"], image["ssim"]) for image in result["images"]]
        np.testing.assert_allclose(got, values, atol=1e-12)


def test_table_names_the_protocol_and_defines_it_beneath(folders, capsys):
    assert run(*folders, "--protocol", "matlab-y", "restormer") == 0
    out = Text.from_ansi(capsys.readouterr().out).plain
    for name in ("matlab-y", "restormer"):
        psnr, ssim = expected(name).mean(axis=0)
        assert re.search(rf"{name}.* 3 .*{psnr:.3f} \[.*\].*{ssim:.4f} \[.*\]", out)
        assert f"\n{name}: {resolve([name])[0].definition}" in out


def test_csv_holds_one_row_an_image_and_protocol(folders, capsys):
    assert run(*folders, "--protocol", "rgb", "plnlin", "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["protocol"], row["name"]) for row in rows[2:4]] == [
        ("rgb", "rain-002"),
        ("plnlin", "rain-000"),
    ]
    assert float(rows[0]["psnr"]) == expected("rgb")[0, 0]
    assert list(rows[0]) == ["protocol", "name", "psnr", "ssim"]


def test_markdown_and_latex_are_ready_for_a_paper(folders, capsys):
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


def test_output_is_written_to_a_file_and_standard_output_stays_empty(folders, tmp_path, capsys):
    for kind in score.FORMATS:
        assert run(*folders, "--format", kind, "--output", tmp_path / "told" / kind) == 0
        assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "told" / "json").read_text())[0]["count"] == 3
    assert "matlab-y: BT.601" in (tmp_path / "told" / "table").read_text()


def test_scores_two_files_and_one_file_against_a_folder(folders, capsys):
    derained, clean = folders
    (alone,) = results(capsys, derained / "rain-001.png", clean / "norain-2.png")
    direct = psnr_ssim(add_rain(clean_image(1), 1), clean_image(2), resolve(["matlab-y"])[0])
    assert (alone["psnr"], alone["ssim"]) == pytest.approx(direct)
    assert alone["psnr_interval"] is None
    (found,) = results(capsys, derained / "rain-001.png", clean)
    assert found["psnr"] == pytest.approx(expected("matlab-y")[1, 0])


@pytest.mark.parametrize("name", ["Rain100L", "Rain100H", "Rain800", "Rain1400"])
def test_clean_may_be_a_data_set(tmp_path, name, capsys):
    """Results bear the rainy files' names; Rain800's files hold both, Rain1400's clean ones serve several."""
    folder = make_set(tmp_path, name, "test", count=3)
    pairs = find_pairs(folder, "test").pairs
    for offset, pair in enumerate(pairs, start=1):
        brighter = np.clip(pair.read()[1].astype(int) + offset, 0, 255).astype(np.uint8)
        save(tmp_path / "derained" / f"{pair.name}.png", brighter)
    (told,) = results(capsys, tmp_path / "derained", folder, "--protocol", "rgb")
    assert told["count"] == len(pairs)
    for offset, image in enumerate(told["images"], start=1):
        assert image["psnr"] == pytest.approx(20 * np.log10(255 / offset), abs=1e-9)


def test_clean_may_be_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    make_set(tmp_path, "Rain100L", "test", count=2)
    for index in range(2):
        save(tmp_path / "out" / f"rain-{index + 1:03d}.png", clean_image(index))
    assert run(tmp_path / "out", "Rain100L", "--format", "json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["psnr"] == 100
    assert "Rain100L, test" in told.err


def test_equal_images_are_counted_as_100_db_and_said_so(folders, capsys):
    _, clean = folders
    assert run(clean, clean, "--lpips", "none") == 0
    out = capsys.readouterr().out
    assert "100.000" in out
    assert "3 of the images equal the clean ones and count as 100 dB" in out


def test_refuses_what_is_absent_empty_or_of_the_wrong_kind(folders, tmp_path):
    derained, clean = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(DerainError, match=r"nowhere: no such file or folder; give the folder of derained"):
        run(tmp_path / "nowhere", clean)
    with pytest.raises(DerainError, match=r"empty: contains no images"):
        run(tmp_path / "empty", clean)
    with pytest.raises(DerainError, match=r"empty: contains no images"):
        run(derained, tmp_path / "empty")
    with pytest.raises(DerainError, match="nowhere"):
        run(derained, tmp_path / "nowhere")
    with pytest.raises(DerainError, match=r"norain-1\.png: .*derained"):
        run(derained, clean / "norain-1.png")
    with pytest.raises(DerainError, match="CLEAN: not given"):
        run(derained)
    with pytest.raises(DerainError, match="no protocol 'matlab'; choose from matlab-y"):
        run(derained, clean, "--protocol", "matlab")


def test_a_broken_or_tiny_file_is_named(folders):
    derained, clean = folders
    for file in (derained / "rain-000.png", clean / "norain-0.png"):
        save(file, clean_image(0, (12, 12)))
    with pytest.raises(DerainError, match=r"rain-000\.png: protocol ir-sde-rgb needs images of at least 19x19"):
        run(derained, clean, "--protocol", "ir-sde")
    (derained / "rain-000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DerainError, match=r"rain-000\.png"):
        run(derained, clean)


def test_without_weights_lpips_is_one_line_and_the_rest_is_told(folders, capsys):
    assert run(*folders, "--format", "json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["lpips"] is None
    (message,) = [line for line in told.err.splitlines() if "LPIPS" in line]
    assert "--lpips alex" in message
    assert "233 MB" in message


class MeanLpips(Lpips):
    """In place of LPIPS: the mean of the derained image."""

    def __init__(self, net="alex", *, fetch=False):
        assert fetch
        self.net = net

    def __call__(self, derained, clean):
        return float(derained.mean())


class Brightness(NoReference):
    """In place of pyiqa's metrics: the mean of the image."""

    def __init__(self, name):
        self.name = name

    def __call__(self, image):
        return float(image.mean())


def test_lpips_and_no_reference_quality_join_every_form(folders, monkeypatch, capsys):
    monkeypatch.setattr(perceptual, "Lpips", MeanLpips)
    monkeypatch.setattr(score, "NoReference", Brightness)
    arguments = (*folders, "--lpips", "alex", "--no-reference", "brightness")
    means = [add_rain(clean_image(index), index).mean() for index in range(3)]
    assert run(*arguments, "--format", "json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["lpips"] == told["no_reference"]["brightness"] == pytest.approx(np.mean(means))
    assert told["lpips_net"] == "alex"
    assert [image["lpips"] for image in told["images"]] == pytest.approx(means)
    for kind in ("table", "markdown", "latex"):
        assert run(*arguments, "--format", kind) == 0
        out = capsys.readouterr().out
        assert "LPIPS (alex)" in out
        assert f"{np.mean(means):.4f}" in out
    assert run(*arguments, "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("protocol,name,psnr,ssim,lpips,brightness\n")


def test_real_photos_are_judged_without_clean_images(folders, monkeypatch, capsys):
    monkeypatch.setattr(score, "NoReference", Brightness)
    assert run(folders[0], "--no-reference", "brightness", "--format", "json") == 0
    told = capsys.readouterr()
    (result,) = json.loads(told.out)
    assert (result["protocol"], result["psnr"], result["lpips"]) == (None, None, None)
    assert result["no_reference"]["brightness"] > 0
    assert "LPIPS" not in told.err
    for kind in ("table", "markdown", "latex", "csv"):
        assert run(folders[0], "--no-reference", "brightness", "--format", kind) == 0
        assert "brightness" in capsys.readouterr().out


def test_a_missing_metric_is_one_line_and_the_rest_is_told(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(*folders, "--no-reference", "niqe", "--format", "json", "--lpips", "none") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["no_reference"] == {}
    assert "niqe left out: niqe needs pyiqa; install it with: pip install 'derain[iqa]'" in told.err
    with pytest.raises(DerainError, match="nothing to judge by"):
        run(folders[0], "--no-reference", "niqe")
