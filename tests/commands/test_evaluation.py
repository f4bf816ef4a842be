"""What the training commands evaluate, and which weights a training ends with."""

import functools
import json
import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from derain.batching import Scheduler
from derain.cli import main
from derain.data.datamodule import RainDataModule
from derain.files.weights import read
from derain.methods import DerainModule, PReNetModule
from tests.factories import add_rain, clean_image, make_set, save
from tests.runs import EXPERIMENT, error_line, fit, rows, with_callbacks


def summary(workdir, name="exp/test-1"):
    return json.loads((workdir / f"runs/{name}/summary.json").read_text())


def test_evaluation_is_in_float32_by_default(workdir, caplog):
    caplog.set_level(logging.INFO, "derain")
    line = ["test", "--config", "bf16.yaml", "--weights", "w.safetensors"]
    assert main(line) == 0
    assert "bf16-mixed" in caplog.text
    assert main([*line, "--trainer.precision", "bf16-mixed"]) == 0
    assert main([*line[:2], "exp.yaml", *line[3:]]) == 0
    summaries = [summary(workdir, name) for name in ("bf16/test-1", "bf16/test-2", "exp/test-1")]
    precisions = [content["hardware"]["precision"] for content in summaries]
    assert precisions == ["32-true", "bf16-mixed", "32-true"]
    float32, bfloat16, default = (content["results"] for content in summaries)
    assert float32 == default != bfloat16


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_weights_and_checkpoints_name_their_method(trained, command):
    data = {"validate": "--data.train", "test": "--data.test", "predict": "--data.predict"}[command]
    for file in (["--weights", "w.safetensors"], ["--ckpt_path", "runs/exp/fit-1/checkpoints/best.ckpt"]):
        assert main([command, *file, data, "Rain800", "--trainer.accelerator", "cpu"]) == 0
    if command == "test":
        methods = [summary(trained, f"derain/test-{number}")["method"] for number in (1, 2)]
        assert [method["hyper_parameters"]["variant"] for method in methods] == ["PReNet", "PRN_r"]


def test_only_the_method_of_the_weights_is_built(workdir, monkeypatch):
    config = {**EXPERIMENT, "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 4}}}
    (workdir / "other.yaml").write_text(yaml.safe_dump(config))
    stages, original = [], PReNetModule.__init__

    @functools.wraps(original)
    def build(self, **options):
        stages.append(options["stages"])
        original(self, **options)

    monkeypatch.setattr(PReNetModule, "__init__", build)
    assert main(["test", "--config", "other.yaml", "--weights", "w.safetensors"]) == 0
    assert stages == [1]


@pytest.mark.parametrize(
    ("limit", "images"),
    [
        (["--trainer.limit_test_batches", "3"], 3),
        (["--trainer.limit_test_batches", "0.4"], 2),
        (["--trainer.fast_dev_run", "true"], 1),
        ([], 5),
    ],
)
def test_results_count_the_images_that_were_evaluated(workdir, capsys, limit, images):
    assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors", *limit]) == 0
    title = capsys.readouterr().out
    assert f"{images} of 5 images (partial)" in title or (images == 5 and "5 images" in title)
    assert ("partial" in title) == (images < 5)
    data = summary(workdir)["data"]
    assert (data["images"], data["images_in_sets"]) == (images, 5)
    assert summary(workdir)["results"][0]["count"] == images
    assert len(rows(workdir / "runs/exp/test-1/images.csv")) == images
    make_set(workdir / "part", "Rain800", "test", count=images, seed=50)
    part = RainDataModule(root=str(workdir / "part"), test="Rain800")
    part.setup("test")
    assert data["fingerprint"] == part.fingerprint("test")


def add_portraits(folder):
    """Rotate the second and fourth test image, so that sizes alternate."""
    for name in ("1", "3"):
        for file in (folder / "data/Rain800").rglob(f"*{name}*"):
            if "test" in file.as_posix().lower():
                with Image.open(file) as image:
                    image.rotate(90, expand=True).save(file)


@pytest.mark.parametrize(
    "options", [["--data.eval_batch_size", "3"], ["--data.eval_batch_size", "2", "--tile", "auto"]]
)
def test_batches_of_equal_size_give_the_scores_of_single_images(workdir, options):
    add_portraits(workdir)
    line = ["test", "--config", "exp.yaml", "--weights", "w.safetensors"]
    assert main([*line, *options]) == 0
    assert main([*line, "--data.eval_batch_size", "1"]) == 0
    batched, single = (rows(workdir / f"runs/exp/test-{number}/images.csv") for number in (1, 2))
    assert [row["name"] for row in batched] == [row["name"] for row in single]
    for row, expected in zip(batched, single, strict=True):
        for column in ("psnr", "ssim", "rainy_psnr", "rainy_ssim"):
            assert float(row[column]) == pytest.approx(float(expected[column]), abs=1e-4)
    first, second = (summary(workdir, f"exp/test-{number}") for number in (1, 2))
    assert (first["batch_size"], second["batch_size"]) == (int(options[1]), 1)
    assert (first["tile"], second["tile"]) == ("auto" if "--tile" in options else None, None)
    assert first["data"] == second["data"]


def test_images_of_a_batch_are_saved_by_their_names(workdir):
    line = ["predict", "--config", "exp.yaml", "--weights", "w.safetensors"]
    assert main([*line, "--data.eval_batch_size", "4"]) == 0
    assert main(line) == 0
    folders = [workdir / f"runs/exp/predict-{number}/images" for number in (1, 2)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) == 5
    for name in names[0]:
        batched, single = (np.asarray(Image.open(folder / name), np.int16) for folder in folders)
        assert np.abs(batched - single).max() <= 1


def test_a_test_on_too_little_memory_continues_with_smaller_batches(workdir, monkeypatch, caplog):
    sizes, forward = [], PReNetModule.forward

    def limited(self, rainy):
        sizes.append(len(rainy))
        if len(rainy) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, rainy)

    monkeypatch.setattr(PReNetModule, "forward", limited)
    start = Scheduler.__init__

    def stacking(self, *arguments, **options):
        start(self, *arguments, **options)
        self.stacks = True

    monkeypatch.setattr(Scheduler, "__init__", stacking)
    line = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--data.eval_batch_size", "5"]
    assert main(line) == 0
    assert sizes == [5, 2, 2, 1]
    assert summary(workdir)["results"][0]["count"] == 5


def test_the_batch_size_may_exceed_the_default(workdir, monkeypatch):
    monkeypatch.setattr("derain.batching.LARGEST_BATCH", 2)
    monkeypatch.setattr("derain.callbacks.batched_restoration.LARGEST_BATCH", 2)
    largest, run_batch = [], Scheduler.run_batch

    def record(self, images, *arguments):
        largest.append((len(images), self._count(*images.shape[2:])))
        return run_batch(self, images, *arguments)

    monkeypatch.setattr(Scheduler, "run_batch", record)
    line = ["test", "--config", "exp.yaml", "--weights", "w.safetensors"]
    assert main([*line, "--data.eval_batch_size", "5"]) == 0
    assert main([*line, "--data.eval_batch_size", "1"]) == 0
    assert largest == [(5, 5)] + 5 * [(1, 2)]


def test_a_tile_that_is_too_small_is_refused(workdir, capsys):
    assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--tile", "50"]) == 2
    assert "--tile 50" in error_line(capsys)


def test_a_test_of_no_image_is_an_error(workdir, capsys):
    line = ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--trainer.limit_test_batches", "0"]
    assert main(line) == 2
    assert "limit_test_batches 0" in error_line(capsys)


@pytest.mark.parametrize(
    ("command", "options", "partial"),
    [
        ("validate", ["--data.val", "Rain800", "--trainer.limit_val_batches", "3"], "3 of 5 images (partial)"),
        ("validate", ["--data.val", "Rain800", "--data.val_limit", "2"], "2 of 5 images (partial)"),
        ("validate", ["--data.val", "Rain800"], None),
        ("predict", ["--trainer.limit_predict_batches", "2"], "2 of 5 images (partial)"),
        ("predict", ["--trainer.limit_predict_batches", "9"], None),
        ("predict", ["--data.eval_batch_size", "3"], None),
        ("fit", ["--data.val", "Rain800", "--data.val_limit", "2"], "2 of 5 images (partial)"),
    ],
)
def test_a_part_of_the_images_is_reported_as_one(workdir, caplog, command, options, partial):
    caplog.set_level(logging.INFO, "derain")
    weighted = [] if command == "fit" else ["--weights", "w.safetensors"]
    assert main([command, "--config", "exp.yaml", *weighted, *options]) == 0
    assert partial in caplog.text if partial else "partial" not in caplog.text


@pytest.fixture
def scores(monkeypatch):
    """Validation scores of three epochs; the second one is the best."""
    values = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(DerainModule, "on_validation_epoch_end", lambda self: self.log("val/psnr", next(values)))


@pytest.mark.parametrize(
    "second", [None, {"monitor": "train/loss", "mode": "max"}, {"monitor": "val/psnr", "mode": "min"}]
)
def test_the_weights_are_those_of_the_best_epoch(workdir, scores, second):
    callbacks = [("ModelCheckpoint", {**second, "filename": "other"})] if second else []
    config = with_callbacks(workdir, *callbacks)
    assert fit("--trainer.max_epochs", "3", "--trainer.num_sanity_val_steps", "0", config=config) == 0
    run = workdir / "runs/callbacks/fit-1"
    best, last = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (1, 2)
    final = read(run / "weights.safetensors").state
    for name, value in final.items():
        assert torch.equal(value, best["state_dict"][f"network.{name}"])
    assert any(not torch.equal(value, last["state_dict"][f"network.{name}"]) for name, value in final.items())


@pytest.mark.parametrize("options", [["--trainer.limit_val_batches", "0"], ["--trainer.check_val_every_n_epoch", "5"]])
def test_without_validation_the_weights_are_those_of_the_last_epoch(workdir, options, caplog):
    assert fit("--trainer.max_epochs", "2", *options) == 0
    assert "no validation" in caplog.text
    run = workdir / "runs/exp/fit-1"
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for name, value in read(run / "weights.safetensors").state.items():
        assert torch.equal(value, last["state_dict"][f"network.{name}"])


@pytest.mark.parametrize(("option", "value"), [("max_epochs", 0), ("limit_train_batches", 0), ("fast_dev_run", 1)])
def test_a_training_without_steps_or_files_warns(workdir, option, value, caplog):
    caplog.set_level(logging.INFO, "derain")
    assert fit(f"--trainer.{option}", str(value)) == 0
    assert "no weights" in caplog.text
    assert not (workdir / "runs/exp/fit-1/weights.safetensors").exists()


@pytest.fixture
def video(workdir):
    """A data set with two sequences of four frames of 40 x 32 pixels, by a camera that moves to the right."""
    folder = workdir / "data/NTURain/Dataset_Testing_Synthetic"
    for seed, sequence in enumerate(("a1", "b1")):
        scene = clean_image(seed, (32, 60))
        for frame in range(4):
            clean = scene[:, 2 * frame : 2 * frame + 40]
            save(folder / f"{sequence}_GT/{frame:05d}.png", clean)
            save(folder / f"{sequence}_Rain/{frame:05d}.png", add_rain(clean, 10 * seed + frame))
    return ["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--data.test", "NTURain"]


def test_videos_are_scored_by_frame_and_by_sequence(workdir, video, capsys):
    assert main([*video, "--protocol", "[matlab-y, rgb, temporal]", "--data.eval_batch_size", "3"]) == 0
    run = workdir / "runs/exp/test-1"
    images, sequences = rows(run / "images.csv"), rows(run / "sequences.csv")
    assert len(images) == 16
    assert [(row["sequence"], row["protocol"], row["frames"]) for row in sequences] == [
        (name, protocol, "4") for protocol in ("matlab-y", "rgb") for name in ("a1_Rain", "b1_Rain")
    ]
    counts = {"psnr": 4, "ssim": 4, "rainy_psnr": 4, "flicker": 3, "warping_error": 3, "clean_flicker": 3}
    for row in sequences:
        group = (row["sequence"], row["protocol"])
        frames = [image for image in images if (image["sequence"], image["protocol"]) == group]
        for key, count in counts.items():
            values = [float(frame[key]) for frame in frames if frame[key]]
            assert len(values) == count
            assert float(row[key]) == pytest.approx(np.mean(values))
        assert float(row["clean_warping_error"]) < float(row["rainy_warping_error"])
    first, second = summary(workdir)["results"]
    assert [first["protocol"], second["protocol"]] == ["matlab-y", "rgb"]
    assert first["sequences"]["count"] == 2
    assert first["sequences"]["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in sequences[:2]]))
    assert first["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in images[:8]]))
    assert first["sequences"]["warping_error"] == second["sequences"]["warping_error"] > 0
    table = capsys.readouterr().out
    assert "2 sequences" in table
    assert "warping error" in table


def test_a_video_without_temporal_metrics_has_means_of_sequences(workdir, video):
    assert main(video) == 0
    (result,) = summary(workdir)["results"]
    assert result["sequences"]["count"] == 2
    assert "flicker" not in result


def test_temporal_scores_of_a_limited_test_are_those_of_its_frames(workdir, video):
    assert main([*video, "--protocol", "[matlab-y, temporal]", "--trainer.limit_test_batches", "6"]) == 0
    images = rows(workdir / "runs/exp/test-1/images.csv")
    assert [bool(row["flicker"]) for row in images] == [False, True, True, True, False, True]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_temporal_is_refused_where_it_is_not_computed(workdir, capsys, command):
    line = [command, "--config", "exp.yaml", "--protocol", "[matlab-y, temporal]"]
    assert main([*line, *(["--weights", "w.safetensors"] if command == "validate" else [])]) == 2
    assert "temporal" in error_line(capsys)


def test_temporal_is_refused_without_videos(workdir, capsys):
    assert main(["test", "--config", "exp.yaml", "--weights", "w.safetensors", "--protocol", "[rgb, temporal]"]) == 2
    assert "temporal" in error_line(capsys)
