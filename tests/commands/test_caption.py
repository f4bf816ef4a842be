import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from derain.cli import main
from derain.data.captions import match_captions, read_captions
from derain.data.pairs import find_pairs
from derain.images import read_rgb
from derain.methods.daclipsde.blip import FrozenBLIP
from tests.factories import clean_image, make_blip, make_set, save


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return str(make_blip(tmp_path_factory.mktemp("blip")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    make_set(tmp_path / "data", "RainTrainL", "train", 10)
    return tmp_path


def texts_of(file, folder, name):
    """Return the captions of the pairs of a set, from a table."""
    pairs = find_pairs(name, "train", data_root=folder).pairs
    return [caption.text for caption in match_captions(pairs, {Path(file): read_captions(Path(file))})]


def refused(capsys, command, *parts):
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "layout" not in line]
    assert lines[-1].startswith("derain: error: ")
    assert sum(line.startswith("derain: error: ") for line in lines) == 1
    for part in parts:
        assert str(part) in lines[-1], lines


# Without a model.


def test_the_template_needs_no_torch(folder):
    code = (
        "import sys; from derain.cli import main; "
        "code = main(['caption', 'RainTrainL', 'out.tsv', '--captioner', 'template']); "
        "print(code, {'torch', 'transformers', 'lightning', 'huggingface_hub'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "0 set()"
    lines = (folder / "out.tsv").read_text().splitlines()
    assert lines == ["filepath\ttitle", *(f"data/RainTrainL/rain-{i}.png\ta photo: rainy" for i in range(1, 11))]
    assert [path.name for path in folder.iterdir() if path.name != "data"] == ["out.tsv"]


def test_counts_and_examples_are_printed(folder, capsys):
    make_set(folder / "data", "Rain1400", "train", 4)
    template = ["caption", "Rain1400", "deep/out.tsv", "--captioner", "template"]
    assert main([*template, "--degradation", "low-light"]) == 0
    first, *examples = capsys.readouterr().out.splitlines()
    for part in ("deep/out.tsv", "12 rainy", "Rain1400", "4 clean", "1 different"):
        assert part in first
    written = (folder / "deep/out.tsv").read_text().splitlines()
    assert examples == [written[1], written[7], written[12]]
    assert all(line.endswith("\ta photo: low-light") for line in written[1:])


def test_one_pair_has_one_example(folder, capsys):
    make_set(folder / "one", "folder", "train", 1)
    assert main(["caption", "one/folder", "one/folder/out.tsv", "--captioner", "template"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["input/1.png\ta photo: rainy"]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--degradation", ""], "--degradation ''"),
        (["--degradation", "very: rainy"], "very: rainy"),
        (["--degradation", "a\tb"], "--degradation"),
        (["--split", "test"], "RainTrainL"),
        (["--device", "tpu", "--captioner", "nobody/no-blip"], "--device tpu"),
    ],
)
def test_bad_options_are_refused(folder, capsys, options, value):
    refused(capsys, ["caption", "RainTrainL", "out.tsv", "--captioner", "template", *options], value)
    assert [path.name for path in folder.iterdir()] == ["data"]


def test_an_existing_table_is_kept(folder, capsys):
    (folder / "out.tsv").write_text("mine")
    template = ["caption", "RainTrainL", "out.tsv", "--captioner", "template"]
    refused(capsys, template, "out.tsv", "--overwrite")
    assert (folder / "out.tsv").read_text() == "mine"
    assert main([*template, "--overwrite"]) == 0
    assert len(read_captions(folder / "out.tsv")) == 10
    refused(capsys, ["caption", "RainTrainL", "data", "--captioner", "template"], "data")
    refused(capsys, ["caption", "nowhere", "new.tsv", "--captioner", "template"], "nowhere")


# With BLIP.


def test_each_clean_image_is_captioned_once(folder, blip, monkeypatch):
    """Three rainy images of a clean one have its caption."""
    rain1400 = make_set(folder / "data", "Rain1400", "train", 4)
    model, sizes = FrozenBLIP(blip, 12), []
    captions = FrozenBLIP.captions
    expected = [captions(model, [read_rgb(rain1400 / f"training/ground_truth/{i}.jpg")])[0] for i in range(1, 5)]

    def counted(self, images, device=None):
        sizes.append(len(images))
        return captions(self, images, device)

    monkeypatch.setattr(FrozenBLIP, "captions", counted)
    command = ["caption", "Rain1400", "out.tsv", "--captioner", blip, "--max-tokens", "12", "--device", "cpu"]
    assert main([*command, "--batch-size", "3"]) == 0
    assert sizes == [3, 1]
    assert texts_of("out.tsv", folder / "data", "Rain1400") == [text for text in expected for _ in range(3)]
    assert len(set(expected)) == 4


def test_the_clean_half_is_captioned(folder, blip):
    rain800 = make_set(folder / "data", "Rain800", "train", 3, seed=50)
    assert main(["caption", "Rain800", "out.tsv", "--captioner", blip]) == 0
    expected = FrozenBLIP(blip).captions([read_rgb(rain800 / f"training/{i}.jpg")[:, :64] for i in range(1, 4)])
    assert texts_of("out.tsv", folder / "data", "Rain800") == expected
    assert len(set(expected)) > 1


def test_captions_do_not_depend_on_the_batch_size(folder, blip):
    for size in ("1", "4", "64"):
        assert main(["caption", "RainTrainL", f"{size}.tsv", "--captioner", blip, "--batch-size", size]) == 0
    assert (folder / "1.tsv").read_bytes() == (folder / "4.tsv").read_bytes() == (folder / "64.tsv").read_bytes()


def test_colons_and_tabs_of_captions(folder, blip, monkeypatch):
    monkeypatch.setattr(FrozenBLIP, "captions", lambda self, images, device: ["a sign:\tno: \n entry"] * len(images))
    assert main(["caption", "RainTrainL", "out.tsv", "--captioner", blip]) == 0
    assert (folder / "out.tsv").read_text().splitlines()[1] == "data/RainTrainL/rain-1.png\ta sign: no: entry: rainy"
    assert set(read_captions(folder / "out.tsv").values()) == {("a sign: no: entry", "rainy")}


def test_a_missing_model_is_refused_before_anything_is_written(folder, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "data/hub"))
    refused(capsys, ["caption", "RainTrainL", "out.tsv"], "Salesforce/blip-image-captioning-large", "hf download")
    assert [path.name for path in folder.iterdir()] == ["data"]


# Interruptions.


class Stopped(Exception):
    pass


def stop_after(monkeypatch, count):
    """Raise after a number of batches, like a crash."""
    captions, batches = FrozenBLIP.captions, []

    def counted(self, images, device=None):
        if len(batches) == count:
            raise Stopped
        batches.append(1)
        return captions(self, images, device)

    monkeypatch.setattr(FrozenBLIP, "captions", counted)


@pytest.fixture
def interrupted(folder, blip):
    """Command of a run that stopped after two of four batches."""
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", blip, "--batch-size", "3"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            main(command)
    assert (folder / "out.tsv.part").read_bytes().count(b"\n") == 7
    assert not (folder / "out.tsv").exists()
    return command


def test_captions_of_an_interrupted_run_are_kept(folder, blip, interrupted, monkeypatch, capsys):
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    stop_after(monkeypatch, 2)
    assert main(interrupted) == 0
    assert "6 of 10" in capsys.readouterr().err
    assert (folder / "out.tsv").read_bytes() == (folder / "whole.tsv").read_bytes()
    assert not (folder / "out.tsv.part").exists()


@pytest.mark.parametrize("size", ["1", "4", "10"])
def test_a_run_resumes_with_another_batch_size(folder, interrupted, size):
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    assert main([*interrupted[:-1], size]) == 0
    assert (folder / "out.tsv").read_bytes() == (folder / "whole.tsv").read_bytes()


def test_an_incomplete_entry_is_written_again(folder, interrupted):
    part = folder / "out.tsv.part"
    part.write_bytes(part.read_bytes()[:-9])
    assert main([*interrupted, "--overwrite"]) == 0
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    assert (folder / "out.tsv").read_bytes() == (folder / "whole.tsv").read_bytes()


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--captioner", "template"], "captioner"),
        (["--captioner", "other"], "captioner"),
        (["--max-tokens", "5"], "max_tokens 32"),
        (["--degradation", "hazy"], "hazy"),
    ],
)
def test_other_settings_do_not_resume(folder, capsys, interrupted, options, value):
    make_blip(folder / "other", seed=3)
    before = (folder / "out.tsv.part").read_bytes()
    refused(capsys, [*interrupted, *options], "out.tsv.part: ", value, "--overwrite")
    assert (folder / "out.tsv.part").read_bytes() == before
    assert main([*interrupted, *options, "--overwrite"]) == 0
    assert len(read_captions(folder / "out.tsv")) == 10


def test_other_weights_do_not_resume(folder, capsys, blip, monkeypatch):
    make_blip(folder / "mine")
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", "mine", "--batch-size", "3"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            main(command)
    make_blip(folder / "mine", seed=3)
    refused(capsys, command, "out.tsv.part: ", "sha256")


def test_other_images_do_not_resume(folder, capsys, interrupted):
    save(folder / "data/RainTrainL/norain-2.png", clean_image(99))
    refused(capsys, interrupted, "out.tsv.part: ", "norain-2.png", "--overwrite")
    make_set(folder / "data", "Rain12", "test", 12)
    command = [*interrupted, "--split", "test"]
    command[1] = "Rain12"
    refused(capsys, command, "out.tsv.part: ", "Rain12/rainy/1.png", "--overwrite")


@pytest.mark.parametrize("then", ["replaced", "removed"])
def test_a_damaged_image_is_named_and_captions_are_kept(folder, blip, capsys, monkeypatch, then):
    data_set = folder / "data/RainTrainL"
    broken = data_set / "norain-8.png"
    sound = broken.read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", blip, "--batch-size", "3"]
    refused(capsys, command, broken)
    if then == "replaced":
        broken.write_bytes(sound)
    else:
        broken.unlink()
        (data_set / "rain-8.png").unlink()
    stop_after(monkeypatch, 2)  # of four
    assert main(command) == 0
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DERAIN_DATA", str(folder / "data"))
    assert main(["caption", "RainTrainL", "whole.tsv", "--captioner", blip, "--batch-size", "3"]) == 0
    assert (folder / "out.tsv").read_bytes() == (folder / "whole.tsv").read_bytes()


SLOWLY = """
import sys, time
from derain.cli import main
from derain.methods.daclipsde.blip import FrozenBLIP

captions = FrozenBLIP.captions
FrozenBLIP.captions = lambda *arguments: (time.sleep(0.2), captions(*arguments))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_writes_the_same_table(folder, blip):
    """Captioning is slowed down, so that images remain when the first entries are written."""
    make_set(folder / "data", "RainTrainH-full", "train", 40, seed=20)
    command = ["caption", "RainTrainH-full", "out.tsv", "--captioner", blip, "--batch-size", "1", "--device", "cpu"]
    whole = [*command]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    part = folder / "out.tsv.part"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command], stderr=subprocess.PIPE, text=True)
    while not (part.exists() and part.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    content = part.read_bytes()
    assert 5 < content.count(b"\n") < 40
    assert not (folder / "out.tsv").exists()
    assert main(command) == 0
    assert (folder / "out.tsv").read_bytes() == (folder / "whole.tsv").read_bytes()
    assert len(set(texts_of("out.tsv", folder / "data", "RainTrainH-full"))) > 20
    assert not part.exists()
