import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from derain import scaling
from derain.batching import Scheduler
from derain.cli import main
from derain.commands.output_paths import plan
from derain.errors import DerainError
from derain.images import read_photo, read_rgb, to_bytes, write_image
from derain.methods import CLIPRPNModule, DACLIPSDEModule, PReNetModule, catalog
from derain.methods.cliprpn.network import CLIPRPN
from derain.methods.interfaces import Sampling
from derain.restoration import Restorer
from derain.video import rewrite
from tests.factories import clean_image, located, make_video
from tests.runs import start, wait_for


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    PReNetModule(stages=1).save_weights(path)
    return str(path)


@pytest.fixture
def photo(tmp_path, rng):
    path = tmp_path / "rainy.png"
    write_image(path, rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    return path


def restored_directly(path, file):
    rgb = torch.from_numpy(read_photo(path).rgb).permute(2, 0, 1)[None]
    with torch.no_grad():
        derained = catalog.load(Path(file)).module(rgb).clamp(0, 1)
    return derained[0].permute(1, 2, 0).mul(255).round().numpy()


def test_photo(photo, file, tmp_path):
    assert main(["restore", str(photo), str(tmp_path / "out.png"), "--weights", file, "--device", "cpu"]) == 0
    assert np.abs(read_rgb(tmp_path / "out.png") - restored_directly(photo, file)).max() <= 1


def test_photo_into_a_folder(photo, file, tmp_path):
    assert main(["restore", str(photo), str(tmp_path / "out"), "--weights", file]) == 0
    assert (tmp_path / "out" / "rainy.png").is_file()


def test_folder_keeps_names_and_existing_outputs(photo, file, tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "deep/b.jpg"):
        write_image(source / name, read_rgb(photo))
    arguments = ["restore", str(source), str(target), "--weights", file]
    assert main(arguments) == 0
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*")) == ["a.png", "deep/b.jpg"]
    (target / "a.png").write_bytes(b"kept")
    assert main(arguments) == 0
    assert "kept 2 " in capsys.readouterr().err
    assert (target / "a.png").read_bytes() == b"kept"
    assert main([*arguments, "--overwrite"]) == 0
    assert (target / "a.png").read_bytes() != b"kept"


def test_glob(photo, file, tmp_path):
    write_image(tmp_path / "other.jpg", read_rgb(photo))
    assert main(["restore", str(tmp_path / "*.png"), str(tmp_path / "out"), "--weights", file]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["rainy.png"]


def test_broken_files_are_reported_at_the_end(photo, file, tmp_path, capsys):
    source = tmp_path / "in"
    write_image(source / "good.png", read_rgb(photo))
    (source / "bad.png").write_bytes(photo.read_bytes()[:200])
    (source / "worse.jpg").write_text("no image")
    assert main(["restore", str(source), str(tmp_path / "out"), "--weights", file]) == 2
    error = capsys.readouterr().err
    assert "bad.png" in error
    assert "worse.jpg" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_any_mode(photo, file, tmp_path, mode):
    with Image.open(photo) as image:
        converted = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("L").convert("LA")
    suffix = ".tif" if mode == "CMYK" else ".png"
    converted.save(tmp_path / f"in{suffix}")
    target = tmp_path / "out.png"
    assert main(["restore", str(tmp_path / f"in{suffix}"), str(target), "--weights", file]) == 0
    with Image.open(target) as image:
        assert image.size == (30, 20)
        assert image.mode == {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)


def test_one_pixel(file, tmp_path):
    write_image(tmp_path / "a.png", np.full((1, 1, 3), 90, np.uint8))
    assert main(["restore", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--weights", file, "--ensemble"]) == 0
    assert read_rgb(tmp_path / "b.png").shape == (1, 1, 3)


def test_comparison_has_both_photos(photo, file, tmp_path):
    arguments = ["restore", str(photo), str(tmp_path / "out.png"), "--weights", file, "--compare"]
    assert main(arguments) == 0
    picture = read_rgb(tmp_path / "out.png-compare.png")
    assert picture.shape[1] > 2 * 30
    assert picture.shape[0] > 20


def test_plan_refuses_outputs_that_would_overwrite(photo, tmp_path):
    with pytest.raises(DerainError, match="rainy"):
        plan(str(photo), photo)
    with pytest.raises(DerainError, match=tmp_path.name):
        plan(str(tmp_path), tmp_path)
    with pytest.raises(DerainError, match="absent"):
        plan(str(tmp_path / "absent.png"), tmp_path / "o.png")
    for folder in ("one", "two"):
        write_image(tmp_path / "in" / folder / "same.png", read_rgb(photo))
    with pytest.raises(DerainError, match="out"):
        plan(str(tmp_path / "in"), tmp_path / "out.png")
    with pytest.raises(DerainError, match=r"out/same\.png: .*one/same\.png and .*two/same\.png"):
        plan(str(tmp_path / "in" / "*" / "*.png"), tmp_path / "out")


def test_comparison_that_would_overwrite_a_photo_is_refused(photo, file, tmp_path, capsys):
    for name in ("a.png", "a.png-compare.png"):
        write_image(tmp_path / "in" / name, read_rgb(photo))
    arguments = ["restore", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", file]
    assert main([*arguments, "--compare"]) == 2
    assert "out/a.png-compare.png" in capsys.readouterr().err
    assert main(arguments) == 0


def test_output_folder_inside_the_input_is_not_an_input(photo, tmp_path):
    write_image(tmp_path / "in" / "a.png", read_rgb(photo))
    write_image(tmp_path / "in" / "out" / "a.png", read_rgb(photo))
    assert list(plan(str(tmp_path / "in"), tmp_path / "in" / "out")) == [tmp_path / "in" / "a.png"]


def test_bad_input_gives_one_line(photo, file, tmp_path, capsys):
    target = str(tmp_path / "out.png")
    for arguments, value in (
        (["restore", str(photo), target, "--weights", "absent"], "absent"),
        (["restore", str(photo), target, "--weights", str(photo)], "rainy.png"),
        (["restore", str(photo), target, "--weights", file, "--tile", "many"], "--tile many"),
        (["restore", str(photo), target, "--weights", file, "--device", "tpu"], "--device tpu"),
        (["restore", str(photo), str(tmp_path / "out.gif"), "--weights", file], "out.gif"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("derain: error:")
        assert value in error
    write_image(tmp_path / "out.png", read_rgb(photo))
    assert main(["restore", str(photo), target, "--weights", file]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.fixture
def video(tmp_path):
    return make_video(tmp_path / "rainy.mp4", [clean_image(i, (32, 48)) for i in range(3)], sound=["aac"])


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_video_is_restored_frame_by_frame(video, file, tmp_path):
    target = tmp_path / "out.mp4"
    assert main(["restore", str(video), str(target), "--weights", file, "--device", "cpu", "--crf", "4"]) == 0
    restorer = Restorer(file, device="cpu")
    for rainy, derained in zip(frames_of(video), frames_of(target), strict=True):
        assert (
            np.abs(to_bytes(restorer(rainy / np.float32(255))) - derained.astype(float)).mean() < 8
        )  # half the colour
    with av.open(str(target)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]


@pytest.mark.parametrize(
    ("has_bf16", "option", "expected"),
    [
        (True, [], {"photo": "float32", "video": "bf16"}),
        (True, ["--precision", "float32"], {"photo": "float32", "video": "float32"}),
        (True, ["--precision", "bf16"], {"photo": "bf16", "video": "bf16"}),
        (False, [], {"photo": "float32", "video": "float32"}),
    ],
)
def test_videos_are_restored_in_bf16(photo, video, file, tmp_path, monkeypatch, capsys, has_bf16, option, expected):
    seen, run = {}, Scheduler.run

    def note_precision(self, images, *arguments, **options):
        seen["photo" if images[0].shape[1:] == (20, 30) else "video"] = self.precision
        return run(self, images, *arguments, **options)

    monkeypatch.setattr(Scheduler, "run", note_precision)
    monkeypatch.setattr("derain.restoration.computes_bf16", lambda device: has_bf16)
    assert main(["restore", str(photo.parent), str(tmp_path / "out"), "--weights", file, *option]) == 0
    assert seen == expected
    assert ("--precision" in capsys.readouterr().err) == (len(set(expected.values())) == 2)


def test_methods_that_sample_are_restored_in_float32(video, tmp_path, monkeypatch):
    method = DACLIPSDEModule("none", channels=16, multipliers=(1, 2), attention="none", sde_steps=4)
    method.save_weights(tmp_path / "sde.safetensors")
    monkeypatch.setattr("derain.restoration.computes_bf16", lambda device: True)
    monkeypatch.setattr(Restorer, "in_bf16", None)  # called: TypeError
    assert main(["restore", str(video), str(tmp_path / "out.mp4"), "--weights", str(tmp_path / "sde.safetensors")]) == 0


def test_folder_of_photos_and_videos(photo, video, file, tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    write_image(source / "a.png", read_rgb(photo))
    (source / "deep").mkdir()
    (source / "deep" / "b.mp4").write_bytes(video.read_bytes())
    (source / "c.avi").write_bytes(video.read_bytes())  # recognised by its content
    (source / "text.mp4").write_text("no video")
    arguments = ["restore", str(source), str(target), "--weights", file, "--compare"]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("restored 3 of 4" in line for line in lines)
    assert lines[-1].startswith("derain: error:")
    assert "text.mp4" in lines[-1]
    names = ["a.png", "a.png-compare.png", "c.mp4", "c.mp4-compare.mp4", "deep/b.mp4", "deep/b.mp4-compare.mp4"]
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*")) == names
    (source / "text.mp4").unlink()
    assert main(arguments) == 0
    assert "kept 3 " in capsys.readouterr().err
    assert main(["restore", str(source / "*.avi"), str(tmp_path / "more"), "--weights", file]) == 0
    assert [p.name for p in (tmp_path / "more").iterdir()] == ["c.mp4"]
    capsys.readouterr()
    assert main(["restore", str(source / "c.avi"), str(tmp_path / "out.avi"), "--weights", file]) == 2
    assert "'.avi'" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_frames_in_a_folder_keep_names_and_order(photo, file, tmp_path):
    for number in (1, 2, 10):
        write_image(tmp_path / "frames" / f"{number}.png", read_rgb(photo))
    assert list(plan(str(tmp_path / "frames"), tmp_path / "out").values()) == [
        tmp_path / "out" / f"{number}.png" for number in (1, 2, 10)
    ]


def test_conditions_of_a_video_are_those_of_the_first_frame(video, tmp_path, monkeypatch):
    method = CLIPRPNModule(perception="fixed", route=1, dim=8, blocks=(1, 1, 1, 1), refinement=1)
    method.save_weights(tmp_path / "rpn.safetensors")
    frames, routes_of_frames = [], []

    def encode(self, image):
        frames.append(image)
        return {"routes": [len(frames)]}

    def forward(self, rainy, routes):
        routes_of_frames.append(routes)
        return SimpleNamespace(derained=rainy, logits=())

    monkeypatch.setattr(CLIPRPNModule, "encode", encode)
    monkeypatch.setattr(CLIPRPN, "forward", forward)
    arguments = ["restore", str(video), str(tmp_path / "out.mp4"), "--weights", str(tmp_path / "rpn.safetensors")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert routes_of_frames == [[1]] * 3
    np.testing.assert_allclose(frames[0][0].permute(1, 2, 0).numpy() * 255, frames_of(video)[0], atol=6)


def test_every_frame_has_the_same_noise(tmp_path):
    torch.manual_seed(1)
    method = DACLIPSDEModule("none", channels=16, multipliers=(1, 2), attention="none", sde_steps=4)
    method.save_weights(tmp_path / "sde.safetensors")
    still = make_video(tmp_path / "still.mp4", [np.full((16, 16, 3), 128, np.uint8)] * 3)
    restored = []
    restorer = Restorer(tmp_path / "sde.safetensors", device="cpu", sampling=Sampling(steps=2))

    def restore_frames(frames):
        restored.extend(restorer([frame.pixels for frame in frames]))
        yield from restored

    rewrite(still, tmp_path / "out.mp4", restore_frames)
    assert restored[0].std() > 2  # there is noise
    np.testing.assert_array_equal(restored[0], restored[2])


def test_bad_input_of_videos_gives_one_line(video, file, tmp_path, capsys):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    target = str(tmp_path / "out.mp4")
    for arguments, value in (
        ([str(video), target, "--explain"], "--explain"),
        ([str(video), str(tmp_path / "out.png")], "out.png"),
        ([str(video), str(tmp_path / "out.webm")], "out.webm"),
        ([str(video), target, "--crf", "80"], "--crf 80"),
        ([str(text), target], "text.mp4"),
        ([str(video), str(video)], "rainy.mp4"),
    ):
        assert main(["restore", *arguments, "--weights", file]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1  # before weights were loaded
        assert error[0].startswith("derain: error:")
        assert value in error[0]
    assert not list(tmp_path.glob("*out*"))


def test_videos_need_pyav(video, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["restore", str(video), str(tmp_path / "out.mp4"), "--weights", file]) == 2
    assert "derain[video]" in capsys.readouterr().err


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_location_is_reported_or_stripped(file, tmp_path, capsys, ending, strip):
    target = tmp_path / f"out.{ending}"
    arguments = ["restore", str(located(tmp_path / "in.jpg")), str(target), "--weights", file]
    assert main([*arguments, *(["--strip-metadata"] if strip else [])]) == 0
    note = capsys.readouterr().err
    with Image.open(target) as image:
        exif = image.getexif()
        assert (0x8825 in exif, 0x0132 in exif) == (not strip, not strip)
    assert ("--strip-metadata" in note) is not strip
    assert ("(GPS)" in note.splitlines()[-1]) is not strip


def test_note_counts_the_photos_with_a_location(file, photo, tmp_path, capsys):
    folder = tmp_path / "in"
    write_image(folder / "plain.jpg", read_rgb(photo))
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        located(folder / name)
    assert main(["restore", str(folder), str(tmp_path / "out"), "--weights", file]) == 0
    assert "a.jpg and 2 more" in capsys.readouterr().err
    assert main(["restore", str(folder), str(tmp_path / "bare"), "--weights", file, "--strip-metadata"]) == 0
    assert "location" not in capsys.readouterr().err
    assert not any(read_photo(path).has_location for path in (tmp_path / "bare").iterdir())


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(("ending", "tag"), [("mp4", "location"), ("mkv", "com.apple.quicktime.location.ISO6709")])
def test_tags_of_a_video_are_reported_or_stripped(file, tmp_path, capsys, ending, tag, strip):
    frames = [clean_image(i, (16, 24)) for i in range(3)]
    tags = {tag: "+48.8584+002.2945/", "title": "rain"}
    source = make_video(tmp_path / f"in.{ending}", frames, sound=["aac"], metadata=tags)
    target = tmp_path / f"out.{ending}"
    arguments = ["restore", str(source), str(target), "--weights", file, "--compare"]
    assert main([*arguments, *(["--strip-metadata"] if strip else [])]) == 0
    for path in (target, tmp_path / f"out.{ending}-compare.{ending}"):
        with av.open(str(path)) as container:
            tags = {key.lower() for key in container.metadata}
            assert any("location" in key for key in tags) is not strip
            assert ("title" in tags) is not strip
            assert len(container.streams.audio) == 1
    assert ("--strip-metadata" in capsys.readouterr().err) is not strip


SLOW = """
import sys, time
from pathlib import Path
from PIL import Image
from derain.cli import main

save = Image.Image.save


def slow(self, path, **options):
    save(self, path, **options)
    Path(__file__).with_name("saving").touch()
    time.sleep(60)


Image.Image.save = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_interrupt_gives_one_line_and_no_temporary_file(photo, file, tmp_path, number, code):
    folder = tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = start("restore", str(photo), str(folder), "--weights", file, "--device", "cpu", program=(str(script),))
    wait_for(tmp_path / "saving", process)
    assert len(list(folder.iterdir())) == 1
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert list(folder.iterdir()) == []
    assert "Traceback" not in text
    assert "0 of 1" in text


SLOW_VIDEO = """
import sys, time
from pathlib import Path
from derain.cli import main
from derain.video.writing import Writer

add = Writer.add


def slow(self, *arguments):
    add(self, *arguments)
    Path(__file__).with_name("adding").touch()
    time.sleep(2)


Writer.add = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_command_keeps_the_old_video(video, file, tmp_path, caplog, number, code):
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "out.mp4"
    target.write_bytes(b"old")
    arguments = ["restore", str(video), str(target), "--weights", file, "--device", "cpu", "--overwrite"]
    script = tmp_path / "slow.py"
    script.write_text(SLOW_VIDEO)
    process = start(*arguments, program=(str(script),))
    wait_for(tmp_path / "adding", process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert target.read_bytes() == b"old"
    assert "Traceback" not in text
    left = [path for path in folder.iterdir() if path != target]
    if number == signal.SIGKILL:
        assert len(left) == 1
    else:
        assert not left
        assert f"nothing is written to {target}" in text
    assert main(arguments) == 0
    assert len(frames_of(target)) == 3
    assert list(folder.iterdir()) == [target]
    assert all(str(path) in caplog.text for path in left)


@pytest.mark.parametrize(
    ("options", "old", "counts", "step"),
    [
        ([], ["1.png"], (1, 1, 2), "run the same command for"),
        (["--overwrite"], [], (1, 0, 3), "without --overwrite"),
        (["--overwrite"], ["4.png"], (1, 0, 3), "all again"),
    ],
)
def test_interrupt_says_how_to_restore_the_rest(file, tmp_path, capsys, monkeypatch, options, old, counts, step):
    for index in range(1, 6):
        write_image(tmp_path / f"in/{index}.png", clean_image(index, (16, 24)))
    (tmp_path / "in/2.png").write_bytes(b"")  # fails
    for name in old:
        write_image(tmp_path / "out" / name, clean_image(0, (16, 24)))
    restored, restore_each = [], Restorer.restore_each

    def interrupted(self, images, names, conditions=None):
        if restored:
            raise KeyboardInterrupt
        restored.extend(names)
        return restore_each(self, images, names, conditions)

    monkeypatch.setattr(Restorer, "restore_each", interrupted)
    monkeypatch.setattr(Restorer, "images_at_once", lambda self, height, width: 0)  # one photo after the other
    arguments = ["restore", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", file, "--device", "cpu", *options]
    assert main(arguments) == 130
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("restored"))
    done, kept, remaining = counts
    for part in (f"restored {done} of 5", f"kept {kept} ", "1 failed", f"{remaining} remain", step):
        assert part in line


def test_location_is_reported_only_if_it_was_written(file, tmp_path, capsys):
    source = located(tmp_path / "in.jpg")
    for name in ("out.bmp", "out.png"):
        assert main(["restore", str(source), str(tmp_path / name), "--weights", file, "--device", "cpu"]) == 0
        assert ("(GPS)" in capsys.readouterr().err) is (name == "out.png")


def test_floating_point_photos_are_divided_by_white(photo, file, tmp_path, capsys):
    values = read_rgb(photo)[..., ::-1].astype(np.float32)
    cv2.imwrite(str(tmp_path / "f.tif"), values)
    arguments = ["restore", str(tmp_path / "f.tif"), str(tmp_path / "out.tif"), "--weights", file, "--device", "cpu"]
    assert main(arguments) == 2
    assert f"{values.max():g}" in capsys.readouterr().err
    assert not (tmp_path / "out.tif").exists()
    assert main([*arguments, "--white", "255"]) == 0
    assert np.abs(read_rgb(tmp_path / "out.tif") - restored_directly(photo, file)).max() <= 1
    for white in ("0", "-1", "nan", "inf"):
        assert main([*arguments, "--overwrite", "--white", white]) == 2
        assert white in capsys.readouterr().err


@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_output_that_is_not_finite_is_not_written(photo, video, file, tmp_path, capsys, monkeypatch, compare):
    monkeypatch.setattr(PReNetModule, "forward", lambda self, rainy: rainy * float("nan"))
    for source, target in ((photo, "out.png"), (video, "out.mp4")):
        assert main(["restore", str(source), str(tmp_path / "o" / target), "--weights", file, *compare]) == 2
        error = capsys.readouterr().err
        assert f"{source}: " + "frame 1 at 0.00 s: " * (source == video) in error
        assert list((tmp_path / "o").glob("*")) == []


def test_automatic_scale_is_reported_and_strength_blends(file, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(scaling, "MIN_REDUCED_SIDE", 20)
    write_image(tmp_path / "in/large.png", clean_image(1, (48, 64)))
    write_image(tmp_path / "in/small.png", clean_image(2, (24, 39)))
    arguments = ["restore", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", file, "--device", "cpu"]
    assert main([*arguments, "--scale", "auto", "--strength", "0"]) == 0
    lines = [record.getMessage() for record in caplog.records if "scale 2" in record.getMessage()]
    assert len(lines) == 1
    assert "64×48" in lines[0]
    assert "32×24" in lines[0]
    for name in ("large.png", "small.png"):
        np.testing.assert_array_equal(read_rgb(tmp_path / "out" / name), read_rgb(tmp_path / "in" / name))


def test_scales_differ_where_photos_are_reduced(file, tmp_path):
    write_image(tmp_path / "in.png", clean_image(1, (48, 64)))
    results = {}
    for scale in ("full", "1", "auto", "2"):
        target = tmp_path / f"{scale}.png"
        arguments = ["restore", str(tmp_path / "in.png"), str(target), "--weights", file, "--device", "cpu"]
        assert main([*arguments, "--scale", scale]) == 0
        results[scale] = read_rgb(target)
    for scale in ("1", "auto"):  # the photo is small
        np.testing.assert_array_equal(results[scale], results["full"])
    assert (results["2"] != results["full"]).any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--scale", "0"),
        ("--scale", "-2"),
        ("--scale", "1.5"),
        ("--scale", "half"),
        ("--strength", "1.01"),
        ("--strength", "-0.1"),
        ("--strength", "nan"),
        ("--strength", "much"),
        ("--temporal", "-1"),
        ("--temporal", "1000"),
        ("--temporal", "two"),
    ],
)
def test_bad_values_give_one_line(photo, file, tmp_path, capsys, option, value):
    target = tmp_path / "out.png"
    arguments = ["restore", str(photo), str(target), "--weights", file, "--device", "cpu", f"{option}={value}"]
    assert main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert option in errors[0]
    assert value in errors[0]
    assert not target.exists()


def test_temporal_fuses_frames(file, tmp_path, rng):
    """Noise of a static scene becomes less."""
    scene = clean_image(0, (64, 96)).astype(np.int16)
    frames = [np.clip(scene + rng.integers(-12, 13, scene.shape), 0, 255).astype(np.uint8) for _ in range(4)]
    source = make_video(tmp_path / "rainy.mp4", frames)
    flickers = []
    for count in ("0", "1"):
        target = tmp_path / f"{count}.mkv"
        arguments = ["restore", str(source), str(target), "--weights", file, "--device", "cpu", "--strength", "0"]
        assert main([*arguments, "--crf", "4", "--temporal", count]) == 0
        restored = np.stack(frames_of(target)).astype(np.int16)
        assert len(restored) == 4
        flickers.append(np.abs(np.diff(restored, axis=0)).mean())
    assert flickers[1] < 0.9 * flickers[0]
