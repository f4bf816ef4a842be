import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from derain.errors import DerainError
from derain.video import VideoOptions, check, rewrite
from derain.video.formats import rotation_of
from derain.video.reading import FrameReader, warn_of_skipped_streams
from tests.factories import clean_image, make_video

SIZE = (36, 64)


def scene(count=16, size=SIZE):
    """Return frames of increasing brightness, without edges that half the resolution of colour would blur."""
    picture = cv2.GaussianBlur(clean_image(3, size), None, 4).astype(np.float32)
    return [np.clip(picture * (0.5 + index / (2 * count)), 0, 255).astype(np.uint8) for index in range(count)]


def same(frames):
    return (frame.pixels for frame in frames)


def invert(frames):
    return (255 - frame.pixels for frame in frames)


def recorder(seen):
    """Return a change that records frames and does not change them."""

    def record(frames):
        for frame in frames:
            seen.append(frame.pixels)
            yield frame.pixels

    return record


def decode(path):
    """Return upright RGB frames, their times in seconds and PyAV's frames, decoded without derain."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    rgb = [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in frames]
    return rgb, [frame.pts * frame.time_base for frame in frames], frames


def packets(path, kind):
    """Return stream, content and time of all packets of a kind of stream."""
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        return [
            (packet.stream.index - streams[0].index, bytes(packet), packet.pts * packet.time_base)
            for packet in container.demux(streams)
            if packet.size
        ]


def test_frames_are_changed_and_everything_else_is_copied(tmp_path):
    frames = scene()
    source = make_video(tmp_path / "in.mp4", frames, sound=["aac", "aac"], metadata={"title": "rain"})
    seen = []

    def darker(frames):
        for frame in frames:
            seen.append(frame.pixels)
            yield frame.pixels // 2

    rewrite(source, tmp_path / "out.mp4", darker, options=VideoOptions(crf=1))
    source_rgb, source_times, _ = decode(source)
    written_rgb, written_times, written = decode(tmp_path / "out.mp4")
    assert len(written_rgb) == len(seen) == 16
    assert written_times == source_times == [Fraction(i, 10) for i in range(16)]
    assert written[0].time_base == Fraction(1, 12800)
    assert written[0].format.name == "yuv420p"
    for frame, before, after in zip(seen, source_rgb, written_rgb, strict=True):
        assert np.abs(frame - before.astype(float)).mean() < 1.5
        assert np.abs(after - frame / 2).mean() < 3  # colour has half the resolution
    assert packets(source, "audio") == packets(tmp_path / "out.mp4", "audio")
    assert {stream for stream, *_ in packets(source, "audio")} == {0, 1}
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.metadata["title"] == "rain"
        assert container.duration == 1_600_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_keep_their_uneven_times(tmp_path, suffix):
    times = [0, 40, 80, 200, 210, 360, 1000, 1033, 1400, 1500, 1501, 1777]
    source = make_video(tmp_path / "in.mp4", scene(12), times=times, base=Fraction(1, 1000))
    rewrite(source, tmp_path / f"out{suffix}", same)
    assert decode(tmp_path / f"out{suffix}")[1] == [Fraction(time, 1000) for time in times]


@pytest.mark.parametrize(("degrees", "mirrored"), [(90, False), (-90, False), (180, False), (0, True), (90, True)])
def test_rotated_videos_are_written_upright(tmp_path, degrees, mirrored):
    source = make_video(tmp_path / "in.mp4", scene(3), degrees=degrees, mirrored=mirrored)
    seen = []
    rewrite(source, tmp_path / "out.mp4", recorder(seen))
    upright = np.rot90(scene(3)[2], degrees // 90)
    upright = upright[:, ::-1] if mirrored else upright
    rgb, _, frames = decode(tmp_path / "out.mp4")
    assert frames[0].rotation == 0
    assert rgb[2].shape == seen[2].shape == upright.shape
    assert np.abs(seen[2] - upright.astype(float)).mean() < 3
    assert np.abs(rgb[2] - upright.astype(float)).mean() < 3


def test_rotations_are_multiples_of_90_degrees_at_any_scale():
    assert rotation_of([46341, -46341, 0, 46341, 46341, 0, 0, 0, 1 << 30]) is None
    assert rotation_of([0, 2 * 65536, 0, -2 * 65536, 0, 0, 0, 0, 1 << 30]) == (False, 3)


@pytest.mark.parametrize("size", [(37, 31), (35, 64), (1, 1)])
def test_odd_sides_stay_odd(tmp_path, size):
    source = make_video(tmp_path / "in.mp4", scene(3, size))
    rewrite(source, tmp_path / "out.mp4", invert)
    rgb, _, frames = decode(tmp_path / "out.mp4")
    assert [frame.shape for frame in rgb] == [(*size, 3)] * 3
    assert frames[0].format.name == "yuv444p"
    assert np.abs(rgb[1] - (255 - scene(3, size)[1].astype(float))).mean() < 4


@pytest.mark.parametrize(
    ("tags", "pixels", "kr", "kb"),
    [
        ((1, 1, 1, 1), "yuv444p", 0.2126, 0.0722),
        ((6, 1, 6, 6), "yuv444p", 0.299, 0.114),
        ((6, 2, 6, 6), "yuv444p", 0.299, 0.114),
        ((9, 1, 18, 9), "yuv444p", 0.2627, 0.0593),
        ((2, 0, 2, 2), "yuv444p", 0.299, 0.114),  # without tags: BT.601, as for all small videos
    ],
)
def test_colours_follow_their_tags(tmp_path, tags, pixels, kr, kb):
    """A uniform colour by the formulas of ITU-R BT.601, BT.709 and BT.2020; tags are copied."""
    rgb = np.array([200, 60, 30]) / 255
    source = make_video(tmp_path / "in.mp4", [np.full((*SIZE, 3), rgb * 255, np.uint8)] * 2, tags=tags, pixels=pixels)
    seen = []
    rewrite(source, tmp_path / "out.mp4", recorder(seen), options=VideoOptions(crf=1))
    luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    blue, red = (rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)
    luma_steps, colour_steps, black = (255, 255, 0) if tags[1] == 2 else (219, 224, 16)
    expected = [luma * luma_steps + black, blue * colour_steps + 128, red * colour_steps + 128]
    for path in (source, tmp_path / "out.mp4"):
        frame = decode(path)[2][0]
        planes = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
        np.testing.assert_allclose(planes, expected, atol=2)
    written = decode(tmp_path / "out.mp4")[2][0]
    assert (written.colorspace, written.color_trc, written.color_primaries) == (tags[0], tags[2], tags[3])
    assert written.color_range == tags[1]
    np.testing.assert_allclose(seen[0].mean((0, 1)) / 255, rgb, atol=2 / 255)


def test_a_comparison_can_be_written(tmp_path):
    source = make_video(tmp_path / "in.mp4", scene(4, (37, 31)), sound=["aac"])
    rewrite(source, tmp_path / "out.mp4", invert, beside=tmp_path / "beside.mp4")
    rgb, times, frames = decode(tmp_path / "beside.mp4")
    assert times == decode(source)[1]
    assert rgb[0].shape[1] > 2 * 31
    assert frames[0].format.name == "yuv420p"
    assert packets(source, "audio") == packets(tmp_path / "beside.mp4", "audio")


def test_webm_is_written_by_vp9_and_supports_opus_only(tmp_path):
    source = make_video(tmp_path / "in.mkv", scene(3, (37, 31)), sound=["libopus"])
    rewrite(source, tmp_path / "out.webm", same)
    rgb, _, frames = decode(tmp_path / "out.webm")
    assert [frame.shape for frame in rgb] == [(37, 31, 3)] * 3
    assert frames[0].format.name == "yuv420p"
    assert np.abs(rgb[0] - scene(3, (37, 31))[0].astype(float)).mean() < 8
    written_audio = [content for _, content, _ in packets(tmp_path / "out.webm", "audio")]
    assert [content for _, content, _ in packets(source, "audio")] == written_audio
    with pytest.raises(DerainError, match=r"out\.webm.*in\.mp4 \(aac\)"):
        check(make_video(tmp_path / "in.mp4", scene(3), sound=["aac"]), tmp_path / "out.webm")


def test_times_start_at_zero(tmp_path):
    source = make_video(tmp_path / "in.mts", scene(4), times=[64000, 65280, 66560, 67840])
    assert decode(source)[1][0] >= 5
    rewrite(source, tmp_path / "out.mp4", same)
    times = decode(tmp_path / "out.mp4")[1]
    assert float(times[0]) < 0.2
    assert np.allclose(np.diff(np.array(times, float)), 0.1)


def test_the_readable_part_of_a_truncated_video_is_restored(tmp_path, caplog):
    noise = [np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for i in range(20)]
    for suffix in (".mp4", ".mkv"):
        source = make_video(tmp_path / f"in{suffix}", noise)
        source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        caplog.clear()
        rewrite(source, tmp_path / f"out{suffix}", same)
        assert 5 <= len(decode(tmp_path / f"out{suffix}")[0]) < 15
        assert f"in{suffix}" in caplog.text
        assert "of 2.0 s" in caplog.text


def test_damaged_frames_are_skipped_including_the_first(tmp_path, caplog):
    source = make_video(tmp_path / "in.mkv", scene(5), codec="mjpeg", pixels="yuvj444p", tags=(5, 2, 1, 1))
    with av.open(str(source)) as container:
        frames = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = source.read_bytes()
    for index in (0, 3):
        content = content.replace(frames[index], bytes(len(frames[index])))
    source.write_bytes(content)
    check(source, tmp_path / "out.mp4")
    rewrite(source, tmp_path / "out.mp4", same)
    assert [float(time) for time in decode(tmp_path / "out.mp4")[1]] == pytest.approx([0.1, 0.2, 0.4])
    assert "2 damaged frames" in caplog.text


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_chapters_are_copied_and_a_warning_names_skipped_streams(tmp_path, suffix, caplog):
    plain = make_video(tmp_path / "plain.mkv", scene(5))
    source = tmp_path / f"in{suffix}"
    chapters = [
        {"id": i, "start": i, "end": i + 1, "time_base": Fraction(1, 5), "metadata": {"title": str(i)}} for i in (0, 1)
    ]
    with av.open(str(plain)) as container, av.open(str(source), "w") as out:
        out.set_chapters(chapters)
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    rewrite(source, tmp_path / f"out{suffix}", same)
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        copies = [
            (chapter["start"] * chapter["time_base"], chapter["metadata"]["title"]) for chapter in container.chapters()
        ]
    assert copies == [(Fraction(0), "0"), (Fraction(1, 5), "1")]
    assert not caplog.text
    two = tmp_path / "two.mkv"
    with av.open(str(plain)) as container, av.open(str(two), "w") as out:
        streams = [out.add_stream_from_template(container.streams.video[0]) for _ in range(2)]
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = streams[0]
                out.mux(packet)
    rewrite(two, tmp_path / f"one{suffix}", same)
    (warning,) = caplog.messages
    assert "two.mkv" in warning
    assert warning.endswith("video")


def test_a_warning_names_interlaced_videos(tmp_path, caplog):
    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = (*SIZE, "yuv420p")
        for rgb in scene(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    rewrite(source, tmp_path / "out.mp4", same)
    assert "in.mp4: interlaced" in caplog.text


def test_a_warning_names_an_alpha_channel(tmp_path, caplog):
    rewrite(make_video(tmp_path / "in.mov", scene(2), codec="png", pixels="rgba"), tmp_path / "out.mp4", same)
    (warning,) = caplog.messages
    assert "in.mov" in warning
    assert "alpha" in warning


def test_an_unsupported_colour_matrix_is_refused(tmp_path):
    source = make_video(tmp_path / "in.mkv", scene(2), tags=(8, 2, 1, 1))  # YCgCo
    with pytest.raises(DerainError, match=r"in\.mkv.*matrix 8"):
        check(source, tmp_path / "out.mkv")


def test_chapters_hide_no_other_stream_of_data(caplog):
    container = SimpleNamespace(streams=[SimpleNamespace(type="data")] * 2, chapters=lambda: [{"id": 0}])
    warn_of_skipped_streams(container, [], Path("in.mp4"))
    (warning,) = caplog.messages
    assert warning.endswith("data")


def test_the_time_of_a_truncation_counts_from_the_start_of_the_video(caplog):
    reader = FrameReader(SimpleNamespace(start_time=5_000_000), None, [], Path("in.mts"))
    reader.frames, reader.error, reader.end = 1, "damaged", Fraction(8)
    reader.report_damage()
    assert "3.0 s" in caplog.text


def test_an_undamaged_video_causes_no_warning(tmp_path, caplog):
    for suffix in (".mp4", ".mkv"):
        rewrite(make_video(tmp_path / f"in{suffix}", scene(3), sound=["aac"]), tmp_path / f"out{suffix}", same)
    assert not caplog.text


def test_videos_that_cannot_be_read_or_written(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 50)
    sound_only = tmp_path / "sound.mp4"
    with av.open(str(sound_only), "w") as container:
        track = container.add_stream("aac", rate=48000, layout="mono")
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
        wave.rate = 48000
        container.mux(track.encode(wave))
        container.mux(track.encode())
    good = make_video(tmp_path / "good.mp4", scene(3))
    headless = tmp_path / "headless.mov"
    headless.write_bytes(good.read_bytes()[:40])
    for source, target, name in (
        (text, "out.mp4", "text.mp4"),
        (headless, "out.mp4", "headless.mov"),
        (sound_only, "out.mp4", "sound.mp4"),
        (tmp_path / "missing.mp4", "out.mp4", "missing.mp4"),
        (good, "out.gif", "out.gif"),
        (good, "out.avi", "out.avi"),
    ):
        for function in (check, lambda source, target: rewrite(source, target, same)):
            with pytest.raises(DerainError, match=re.escape(f"{tmp_path / name}: ")) as caught:
                function(source, tmp_path / target)
            assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_a_failed_write_keeps_the_old_video_and_leaves_no_temporary_file(tmp_path):
    source = make_video(tmp_path / "in.mp4", scene(5))
    (tmp_path / "out.mp4").write_bytes(b"old")
    seen = []

    def fail(frames):
        for frame in frames:
            seen.append(frame)
            if len(seen) == 3:
                raise DerainError(frame.name)
            yield frame.pixels

    with pytest.raises(DerainError, match=r"^frame 3 at 0\.\d\d s$"):
        rewrite(source, tmp_path / "out.mp4", fail, beside=tmp_path / "beside.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_frames_that_the_decoder_keeps_to_the_end_have_times(tmp_path):
    """Decoders with several threads release the frames of a short video only at its end."""
    make_video(tmp_path / "v.mp4", scene(5))
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 8
        frames = list(FrameReader(container, stream, [], tmp_path / "v.mp4"))
    assert [frame.time for frame in frames] == [float(frame.pts * stream.time_base) for frame in frames]
    assert len(frames) == 5
