from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from derain.errors import DerainError
from derain.videos import check, rewrite, turn
from tests.factories import clean_image, make_video

SIZE = (36, 64)


def scene(count=16, size=SIZE):
    """Frames that differ in brightness, without edges, whose colours would suffer from half the resolution."""
    picture = cv2.GaussianBlur(clean_image(3, size), None, 4).astype(np.float32)
    return [np.clip(picture * (0.5 + place / (2 * count)), 0, 255).astype(np.uint8) for place in range(count)]


def same(frame):
    return frame


def shown(path):
    """What another reader shows: frames as RGB, turned as their tag says, and the times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rgb = [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in frames]
        return rgb, [f.pts * f.time_base for f in frames], frames


def packets(path, kind):
    """Content and time of all packets of the streams of a kind."""
    with av.open(str(path)) as container:
        streams = [one for one in container.streams if one.type == kind]
        return [
            (p.stream.index - streams[0].index, bytes(p), p.pts * p.time_base)
            for p in container.demux(streams)
            if p.size
        ]


def test_frames_are_changed_and_the_rest_is_kept(tmp_path):
    frames = scene()
    source = make_video(tmp_path / "in.mp4", frames, sound=["aac", "aac"], metadata={"title": "rain"})
    seen = []

    def darker(frame):
        seen.append(frame)
        return frame / 2

    rewrite(source, tmp_path / "out.mp4", darker, crf=1)
    given, times, _ = shown(source)
    got, kept, decoded = shown(tmp_path / "out.mp4")
    assert len(got) == len(seen) == 16
    assert kept == times == [Fraction(i, 10) for i in range(16)]
    assert decoded[0].time_base == Fraction(1, 12800)
    assert decoded[0].format.name == "yuv420p"
    for frame, rgb, out in zip(seen, given, got, strict=True):
        assert np.abs(frame * 255 - rgb).mean() < 1.5
        assert np.abs(out - frame * 127.5).mean() < 3  # colour at half the size
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
    assert shown(tmp_path / f"out{suffix}")[1] == [Fraction(time, 1000) for time in times]


@pytest.mark.parametrize(("degrees", "mirrored"), [(90, False), (-90, False), (180, False), (0, True), (90, True)])
def test_what_is_to_be_turned_is_written_upright(tmp_path, degrees, mirrored):
    source = make_video(tmp_path / "in.mp4", scene(3), degrees=degrees, mirrored=mirrored)
    seen = []
    rewrite(source, tmp_path / "out.mp4", lambda frame: seen.append(frame) or frame)
    upright = np.rot90(scene(3)[2], degrees // 90)
    upright = upright[:, ::-1] if mirrored else upright
    got, _, decoded = shown(tmp_path / "out.mp4")
    assert decoded[0].rotation == 0
    assert got[2].shape == seen[2].shape == upright.shape
    assert np.abs(seen[2] * 255 - upright).mean() < 3
    assert np.abs(got[2] - upright.astype(float)).mean() < 3


def test_other_turns_are_refused_and_scales_are_none():
    assert turn([46341, -46341, 0, 46341, 46341, 0, 0, 0, 1 << 30]) is None
    assert turn([0, 2 * 65536, 0, -2 * 65536, 0, 0, 0, 0, 1 << 30]) == (False, 3)


@pytest.mark.parametrize("size", [(37, 31), (35, 64), (1, 1)])
def test_odd_sides_stay_odd(tmp_path, size):
    source = make_video(tmp_path / "in.mp4", scene(3, size))
    rewrite(source, tmp_path / "out.mp4", lambda frame: 1 - frame)
    got, _, decoded = shown(tmp_path / "out.mp4")
    assert [one.shape for one in got] == [(*size, 3)] * 3
    assert decoded[0].format.name == "yuv444p"
    assert np.abs(got[1] - (255 - scene(3, size)[1].astype(float))).mean() < 4


@pytest.mark.parametrize(
    ("tags", "pixels", "kr", "kb"),
    [
        ((1, 1, 1, 1), "yuv444p", 0.2126, 0.0722),
        ((6, 1, 6, 6), "yuv444p", 0.299, 0.114),
        ((6, 2, 6, 6), "yuv444p", 0.299, 0.114),
        ((9, 1, 18, 9), "yuv444p", 0.2627, 0.0593),
        ((2, 0, 2, 2), "yuv444p", 0.299, 0.114),  # untold: BT.601, for it is small
    ],
)
def test_colours_follow_their_tags(tmp_path, tags, pixels, kr, kb):
    """A plain colour by the formulas of ITU-R BT.601, BT.709 and BT.2020; tags are passed on."""
    rgb = np.array([200, 60, 30]) / 255
    source = make_video(tmp_path / "in.mp4", [np.full((*SIZE, 3), rgb * 255, np.uint8)] * 2, tags=tags, pixels=pixels)
    seen = []
    rewrite(source, tmp_path / "out.mp4", lambda frame: seen.append(frame) or frame, crf=1)
    luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    blue, red = (rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)
    steps = (255, 255, 0) if tags[1] == 2 else (219, 224, 16)
    expected = [luma * steps[0] + steps[2], blue * steps[1] + 128, red * steps[1] + 128]
    for path in (source, tmp_path / "out.mp4"):
        frame = shown(path)[2][0]
        planes = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
        np.testing.assert_allclose(planes, expected, atol=2)
    told = shown(tmp_path / "out.mp4")[2][0]
    assert (told.colorspace, told.color_trc, told.color_primaries) == (tags[0], tags[2], tags[3])
    assert told.color_range == tags[1]
    np.testing.assert_allclose(seen[0].mean((0, 1)), rgb, atol=2 / 255)


def test_a_comparison_stands_beside_it(tmp_path):
    source = make_video(tmp_path / "in.mp4", scene(4, (37, 31)), sound=["aac"])
    rewrite(source, tmp_path / "out.mp4", lambda frame: 1 - frame, beside=tmp_path / "both.mp4", crf=10)
    both, times, decoded = shown(tmp_path / "both.mp4")
    assert times == shown(source)[1]
    assert both[0].shape[1] > 2 * 31
    assert decoded[0].format.name == "yuv420p"
    assert packets(source, "audio") == packets(tmp_path / "both.mp4", "audio")


def test_webm_is_written_by_vp9_and_takes_opus_alone(tmp_path):
    source = make_video(tmp_path / "in.mkv", scene(3, (37, 31)), sound=["libopus"])
    rewrite(source, tmp_path / "out.webm", same)
    got, _, decoded = shown(tmp_path / "out.webm")
    assert [one.shape for one in got] == [(37, 31, 3)] * 3
    assert decoded[0].format.name == "yuv420p"
    assert np.abs(got[0] - scene(3, (37, 31))[0].astype(float)).mean() < 8
    assert [p[1] for p in packets(source, "audio")] == [p[1] for p in packets(tmp_path / "out.webm", "audio")]
    with pytest.raises(DerainError, match=r"out\.webm: '\.webm' cannot hold the sound of .*in\.mp4 \(aac\)"):
        check(make_video(tmp_path / "in.mp4", scene(3), sound=["aac"]), tmp_path / "out.webm")


def test_a_clock_that_starts_anywhere_starts_anew(tmp_path):
    source = make_video(tmp_path / "in.mts", scene(4), times=[64000, 65280, 66560, 67840])
    assert shown(source)[1][0] >= 5
    rewrite(source, tmp_path / "out.mp4", same)
    times = shown(tmp_path / "out.mp4")[1]
    assert float(times[0]) < 0.2
    assert np.allclose(np.diff(np.array(times, float)), 0.1)


def test_of_a_truncated_video_what_is_there_is_restored(tmp_path, caplog):
    noise = [np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for i in range(20)]
    for suffix in (".mp4", ".mkv"):
        source = make_video(tmp_path / f"in{suffix}", noise)
        source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        caplog.clear()
        rewrite(source, tmp_path / f"out{suffix}", same)
        assert 5 <= len(shown(tmp_path / f"out{suffix}")[0]) < 15
        assert "breaks off at" in caplog.text
        assert "of 2.0 s" in caplog.text


def test_damaged_frames_are_left_out_the_first_one_too(tmp_path, caplog):
    source = make_video(tmp_path / "in.mkv", scene(5), codec="mjpeg", pixels="yuvj444p", tags=(5, 2, 1, 1))
    with av.open(str(source)) as container:
        found = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = source.read_bytes()
    for place in (0, 3):
        content = content.replace(found[place], bytes(len(found[place])))
    source.write_bytes(content)
    check(source, tmp_path / "out.mp4")
    rewrite(source, tmp_path / "out.mp4", same)
    assert [float(time) for time in shown(tmp_path / "out.mp4")[1]] == pytest.approx([0.1, 0.2, 0.4])
    assert "2 frames are damaged and were left out" in caplog.text


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_chapters_stay_and_what_goes_is_told(tmp_path, suffix, caplog):
    plain = make_video(tmp_path / "plain.mkv", scene(5))
    source = tmp_path / f"in{suffix}"
    told = [
        {"id": i, "start": i, "end": i + 1, "time_base": Fraction(1, 5), "metadata": {"title": str(i)}} for i in (0, 1)
    ]
    with av.open(str(plain)) as container, av.open(str(source), "w") as out:
        out.set_chapters(told)
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    rewrite(source, tmp_path / f"out{suffix}", same)
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        kept = [(one["start"] * one["time_base"], one["metadata"]["title"]) for one in container.chapters()]
    assert kept == [(Fraction(0), "0"), (Fraction(1, 5), "1")]
    assert not caplog.text
    two = tmp_path / "two.mkv"
    with av.open(str(plain)) as container, av.open(str(two), "w") as out:
        streams = [out.add_stream_from_template(container.streams.video[0]) for _ in range(2)]
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = streams[0]
                out.mux(packet)
    rewrite(two, tmp_path / f"both{suffix}", same)
    assert "two.mkv: left out: streams of video" in caplog.text


def test_interlaced_frames_are_told(tmp_path, caplog):
    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = (*SIZE, "yuv420p")
        for rgb in scene(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    rewrite(source, tmp_path / "out.mp4", same)
    assert "in.mp4: is interlaced" in caplog.text


def test_a_whole_video_gives_no_warning(tmp_path, caplog):
    for suffix in (".mp4", ".mkv"):
        rewrite(make_video(tmp_path / f"in{suffix}", scene(3), sound=["aac"]), tmp_path / f"out{suffix}", same)
    assert not caplog.text


def test_refusals(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 50)
    mute = tmp_path / "mute.mp4"
    with av.open(str(mute), "w") as container:
        track = container.add_stream("aac", rate=48000, layout="mono")
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
        wave.rate = 48000
        container.mux(track.encode(wave))
        container.mux(track.encode())
    good = make_video(tmp_path / "good.mp4", scene(3))
    headless = tmp_path / "headless.mov"
    headless.write_bytes(good.read_bytes()[:40])
    for source, target, told in (
        (text, "out.mp4", r"text\.mp4: not a video that can be read"),
        (headless, "out.mp4", r"headless\.mov: "),
        (mute, "out.mp4", r"mute\.mp4: holds no pictures that move"),
        (tmp_path / "absent.mp4", "out.mp4", r"absent\.mp4: no such file"),
        (good, "out.gif", r"out\.gif: cannot write '\.gif' videos; end it in \.mp4"),
        (good, "out.avi", r"out\.avi: cannot write"),
    ):
        for refuse in (check, lambda one, other: rewrite(one, other, same)):
            with pytest.raises(DerainError, match=told) as caught:
                refuse(source, tmp_path / target)
            assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_nothing_half_written_stays(tmp_path):
    source = make_video(tmp_path / "in.mp4", scene(5))
    (tmp_path / "out.mp4").write_bytes(b"kept")

    seen = []

    def fail(frame):
        seen.append(frame)
        if len(seen) == 3:  # both videos are begun
            raise DerainError("not enough memory")
        return frame

    with pytest.raises(DerainError, match="not enough memory"):
        rewrite(source, tmp_path / "out.mp4", fail, beside=tmp_path / "both.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"kept"
