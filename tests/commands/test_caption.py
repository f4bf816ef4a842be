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
def place(tmp_path, monkeypatch):
    """A working directory with sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    make_set(tmp_path / "data", "RainTrainL", "train", 10)
    return tmp_path


def texts_of(file, folder, name):
    """Captions of a set's pairs, from a table."""
    pairs = find_pairs(name, "train", data_root=folder).pairs
    return [caption.text for caption in match_captions(pairs, {Path(file): read_captions(Path(file))})]


def refused(capsys, command, *parts):
    capsys.readouterr()
    assert main(command) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "layout" not in line]
    assert told[-1].startswith("derain: error: ")
    assert sum(line.startswith("derain: error: ") for line in told) == 1
    for part in parts:
        assert str(part) in told[-1], told


# Without a model.


def test_the_template_needs_no_torch(place):
    code = (
        "import sys; from derain.cli import main; "
        "code = main(['caption', 'RainTrainL', 'out.tsv', '--captioner', 'template']); "
        "print(code, {'torch', 'transformers', 'lightning', 'huggingface_hub'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "0 set()"
    lines = (place / "out.tsv").read_text().splitlines()
    assert lines == ["filepath\ttitle", *(f"data/RainTrainL/rain-{i}.png\ta photo: rainy" for i in range(1, 11))]
    assert [path.name for path in place.iterdir() if path.name != "data"] == ["out.tsv"]


def test_counts_and_examples_are_told(place, capsys):
    make_set(place / "data", "Rain1400", "train", 4)
    template = ["caption", "Rain1400", "deep/out.tsv", "--captioner", "template"]
    assert main([*template, "--degradation", "low-light"]) == 0
    first, *examples = capsys.readouterr().out.splitlines()
    assert first.startswith("deep/out.tsv: 12 rainy images of Rain1400, 4 clean ones, 1 different captions")
    written = (place / "deep/out.tsv").read_text().splitlines()
    assert examples == [written[1], written[7], written[12]]
    assert all(line.endswith("\ta photo: low-light") for line in written[1:])


def test_one_pair_has_one_example(place, capsys):
    make_set(place / "one", "folder", "train", 1)
    assert main(["caption", "one/folder", "one/folder/out.tsv", "--captioner", "template"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["input/1.png\ta photo: rainy"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch_size", "0"], "--batch_size 0"),
        (["--max_tokens", "0"], "--max_tokens 0"),
        (["--degradation", ""], "--degradation ''"),
        (["--degradation", "very: rainy"], "without ': '"),
        (["--degradation", "a\tb"], "--degradation"),
        (["--split", "test"], "RainTrainL has no test split"),
        (["--device", "tpu", "--captioner", "nobody/no-blip"], "--device tpu"),
    ],
)
def test_options_that_cannot_be_meant(place, capsys, options, told):
    refused(capsys, ["caption", "RainTrainL", "out.tsv", "--captioner", "template", *options], told)
    assert [path.name for path in place.iterdir()] == ["data"]


def test_a_table_that_exists_is_kept(place, capsys):
    (place / "out.tsv").write_text("mine")
    template = ["caption", "RainTrainL", "out.tsv", "--captioner", "template"]
    refused(capsys, template, "out.tsv: exists", "--overwrite")
    assert (place / "out.tsv").read_text() == "mine"
    assert main([*template, "--overwrite"]) == 0
    assert len(read_captions(place / "out.tsv")) == 10
    refused(capsys, ["caption", "RainTrainL", "data", "--captioner", "template"], "data: is a folder")
    refused(capsys, ["caption", "nowhere", "new.tsv", "--captioner", "template"], "nowhere: no such folder")


# With BLIP.


def test_each_clean_image_is_captioned_once(place, blip, monkeypatch):
    """Three rains of one clean image get the caption that BLIP gives the clean one."""
    folder = make_set(place / "data", "Rain1400", "train", 4)
    model, seen = FrozenBLIP(blip, 12), []
    captions = FrozenBLIP.captions
    expected = [captions(model, [read_rgb(folder / f"training/ground_truth/{i}.jpg")])[0] for i in range(1, 5)]

    def counted(self, images, device=None):
        seen.append(len(images))
        return captions(self, images, device)

    monkeypatch.setattr(FrozenBLIP, "captions", counted)
    command = ["caption", "Rain1400", "out.tsv", "--captioner", blip, "--max_tokens", "12", "--device", "cpu"]
    assert main([*command, "--batch_size", "3"]) == 0
    assert seen == [3, 1]
    assert texts_of("out.tsv", place / "data", "Rain1400") == [text for text in expected for _ in range(3)]
    assert len(set(expected)) == 4


def test_the_clean_half_is_captioned(place, blip):
    folder = make_set(place / "data", "Rain800", "train", 3, seed=50)
    assert main(["caption", "Rain800", "out.tsv", "--captioner", blip]) == 0
    expected = FrozenBLIP(blip).captions([read_rgb(folder / f"training/{i}.jpg")[:, :64] for i in range(1, 4)])
    assert texts_of("out.tsv", place / "data", "Rain800") == expected
    assert len(set(expected)) > 1


def test_batches_change_nothing(place, blip):
    for size in ("1", "4", "64"):
        assert main(["caption", "RainTrainL", f"{size}.tsv", "--captioner", blip, "--batch_size", size]) == 0
    assert (place / "1.tsv").read_bytes() == (place / "4.tsv").read_bytes() == (place / "64.tsv").read_bytes()


def test_colons_and_tabs_of_captions(place, blip, monkeypatch):
    monkeypatch.setattr(FrozenBLIP, "captions", lambda self, images, device: ["a sign:\tno: \n entry"] * len(images))
    assert main(["caption", "RainTrainL", "out.tsv", "--captioner", blip]) == 0
    assert (place / "out.tsv").read_text().splitlines()[1] == "data/RainTrainL/rain-1.png\ta sign: no: entry: rainy"
    assert set(read_captions(place / "out.tsv").values()) == {("a sign: no: entry", "rainy")}


def test_no_model_is_told_before_anything_is_written(place, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "data/hub"))
    refused(capsys, ["caption", "RainTrainL", "out.tsv"], "Salesforce/blip-image-captioning-large", "hf download")
    assert [path.name for path in place.iterdir()] == ["data"]


# Interruptions.


class Stopped(Exception):
    pass


def stop_after(monkeypatch, count):
    """Fails like a crash when more than so many batches are captioned."""
    captions, done = FrozenBLIP.captions, []

    def counted(self, images, device=None):
        if len(done) == count:
            raise Stopped
        done.append(1)
        return captions(self, images, device)

    monkeypatch.setattr(FrozenBLIP, "captions", counted)


@pytest.fixture
def interrupted(place, blip):
    """A run of four batches that stopped after two, and its command."""
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", blip, "--batch_size", "3"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            main(command)
    assert (place / "out.tsv.part").read_bytes().count(b"\n") == 7
    assert not (place / "out.tsv").exists()
    return command


def test_what_is_captioned_is_not_captioned_again(place, blip, interrupted, monkeypatch, capsys):
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    stop_after(monkeypatch, 2)
    assert main(interrupted) == 0
    assert "goes on after 6 of 10 rows" in capsys.readouterr().err
    assert (place / "out.tsv").read_bytes() == (place / "whole.tsv").read_bytes()
    assert not (place / "out.tsv.part").exists()


@pytest.mark.parametrize("size", ["1", "4", "10"])
def test_another_batch_size_goes_on(place, interrupted, size):
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    assert main([*interrupted[:-1], size]) == 0
    assert (place / "out.tsv").read_bytes() == (place / "whole.tsv").read_bytes()


def test_a_row_that_was_half_written_is_written_again(place, interrupted):
    part = place / "out.tsv.part"
    part.write_bytes(part.read_bytes()[:-9])
    assert main([*interrupted, "--overwrite"]) == 0
    whole = [*interrupted]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    assert (place / "out.tsv").read_bytes() == (place / "whole.tsv").read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--captioner", "template"], "captioner"),
        (["--captioner", "other"], "captioner"),
        (["--max_tokens", "5"], "max_tokens 32, not 5"),
        (["--degradation", "hazy"], "degradation rainy, not hazy"),
    ],
)
def test_another_run_does_not_go_on(place, capsys, interrupted, options, told):
    make_blip(place / "other", seed=3)
    before = (place / "out.tsv.part").read_bytes()
    refused(capsys, [*interrupted, *options], "out.tsv.part: ", told, "delete it or give --overwrite")
    assert (place / "out.tsv.part").read_bytes() == before
    assert main([*interrupted, *options, "--overwrite"]) == 0
    assert len(read_captions(place / "out.tsv")) == 10


def test_other_weights_under_the_same_name_do_not_go_on(place, capsys, blip, monkeypatch):
    make_blip(place / "mine")
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", "mine", "--batch_size", "3"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            main(command)
    make_blip(place / "mine", seed=3)
    refused(capsys, command, "out.tsv.part: ", "sha256")


def test_other_images_do_not_go_on(place, capsys, interrupted):
    save(place / "data/RainTrainL/norain-2.png", clean_image(99))
    refused(capsys, interrupted, "out.tsv.part: ", "norain-2.png, which has changed", "--overwrite")
    make_set(place / "data", "Rain12", "test", 12)
    command = [*interrupted, "--split", "test"]
    command[1] = "Rain12"
    refused(capsys, command, "out.tsv.part: ", "Rain12/rainy/1.png", "--overwrite")


@pytest.mark.parametrize("then", ["replaced", "removed"])
def test_a_damaged_image_is_named_and_nothing_is_lost(place, blip, capsys, monkeypatch, then):
    folder = place / "data/RainTrainL"
    broken = folder / "norain-8.png"
    sound = broken.read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    command = ["caption", "RainTrainL", "out.tsv", "--captioner", blip, "--batch_size", "3"]
    refused(capsys, command, broken)
    if then == "replaced":
        broken.write_bytes(sound)
    else:
        broken.unlink()
        (folder / "rain-8.png").unlink()
    stop_after(monkeypatch, 2)  # of four
    assert main(command) == 0
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("DERAIN_DATA", str(place / "data"))
    assert main(["caption", "RainTrainL", "whole.tsv", "--captioner", blip, "--batch_size", "3"]) == 0
    assert (place / "out.tsv").read_bytes() == (place / "whole.tsv").read_bytes()


SLOWLY = """
import sys, time
from derain.cli import main
from derain.methods.daclipsde.blip import FrozenBLIP

captions = FrozenBLIP.captions
FrozenBLIP.captions = lambda *given: (time.sleep(0.2), captions(*given))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_table_of_an_uninterrupted_one(place, blip):
    """So slow that many images are left when the first rows are seen."""
    make_set(place / "data", "RainTrainH-full", "train", 40, seed=20)
    command = ["caption", "RainTrainH-full", "out.tsv", "--captioner", blip, "--batch_size", "1", "--device", "cpu"]
    whole = [*command]
    whole[2] = "whole.tsv"
    assert main(whole) == 0
    part = place / "out.tsv.part"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command], stderr=subprocess.PIPE, text=True)
    while not (part.exists() and part.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    left = part.read_bytes()
    assert 5 < left.count(b"\n") < 40
    assert not (place / "out.tsv").exists()
    assert main(command) == 0
    assert (place / "out.tsv").read_bytes() == (place / "whole.tsv").read_bytes()
    assert len(set(texts_of("out.tsv", place / "data", "RainTrainH-full"))) > 20
    assert not part.exists()
