import re
from fractions import Fraction

import av
import numpy as np
import pytest

from derain.errors import DerainError
from derain.video import VideoOptions, check, rewrite
from derain.video.encoders import ENCODERS
from tests.factories import make_video


def same(frames):
    return (frame.pixels for frame in frames)


def is_available(encoder):
    try:
        context = av.CodecContext.create(encoder, "w")
        context.width, context.height, context.pix_fmt, context.time_base = 256, 256, "yuv420p", Fraction(1, 25)
        context.open()
    except (ValueError, av.FFmpegError):
        return False
    return True


@pytest.fixture
def video(tmp_path):
    frames = [np.full((128, 192, 3), 40 * index, np.uint8) for index in range(4)]
    return make_video(tmp_path / "in.mp4", frames)


@pytest.mark.parametrize(("encoder", "codec"), [("libx265", "hevc"), ("libx264", "h264"), ("mpeg4", "mpeg4")])
def test_videos_are_written_by_the_chosen_encoder(video, tmp_path, encoder, codec):
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {encoder}")
    options = VideoOptions(encoder=encoder)
    check(video, tmp_path / "out.mkv", options)
    rewrite(video, tmp_path / "out.mkv", same, options=options)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == codec
        rgb = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.mean() for frame in rgb] == pytest.approx([0, 40, 80, 120], abs=3)


@pytest.mark.parametrize(
    ("encoder", "target"), [("h264_unknown", "out.mp4"), ("libx264", "out.webm"), ("aac", "out.mp4")]
)
def test_the_message_for_an_absent_encoder_lists_those_that_exist(video, tmp_path, encoder, target):
    with pytest.raises(DerainError, match=re.escape(f"--encoder {encoder}")) as caught:
        check(video, tmp_path / target, VideoOptions(encoder=encoder))
    listed = set(ENCODERS) & set(re.findall(r"[\w-]+", str(caught.value).split("; use ")[1]))
    assert "libvpx-vp9" in listed
    assert ("libx264" in listed) == (target == "out.mp4")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ["h264_nvenc", "hevc_nvenc", "h264_qsv", "h264_amf", "hevc_videotoolbox"])
def test_an_encoder_without_its_hardware_is_refused_before_anything_is_written(video, tmp_path, encoder):
    options = VideoOptions(encoder=encoder)
    if is_available(encoder):
        pytest.skip(f"{encoder} is available")
    for function in (check, lambda *arguments: rewrite(*arguments, same, options=options)):
        with pytest.raises(DerainError, match=f"--encoder {encoder}") as caught:
            function(video, tmp_path / "out.mp4", *([options] if function is check else []))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("crf", [-1, 52])
def test_crf_is_from_0_to_51(crf):
    with pytest.raises(DerainError, match=f"--crf {crf}"):
        VideoOptions(crf=crf)


def test_a_container_without_a_default_encoder_is_refused(video, tmp_path, monkeypatch):
    monkeypatch.setattr("derain.video.encoders._exists", lambda encoder: encoder == "libx265")
    with pytest.raises(DerainError, match=r"out\.mp4.*available: libx265"):
        check(video, tmp_path / "out.mp4")


def test_the_best_quality_of_svt_av1_is_not_its_default():
    """A ``crf`` of 0 means the default of 35 to FFmpeg's wrapper of SVT-AV1."""
    assert [ENCODERS["libsvtav1"](crf)["crf"] for crf in (0, 1, 51)] == ["1", "1", "51"]
