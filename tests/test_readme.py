"""The first commands of the README run as written, offline; `tests/test_docs.py` checks the rest of the README."""

import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from derain.images import image_size, write_image
from tests.factories import clean_image
from tests.runs import start, wait_for_line

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
FIRST = next(block for block in BLOCKS if "derain restore" in block)
"""The first commands that a new user runs."""

OFFLINE = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1",
}
"""Environment variables that find ``derain`` and no network."""


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """Make a folder with a photo, a folder of photos and a video."""
    folder = tmp_path_factory.mktemp("reader")
    write_image(folder / "rainy.jpg", clean_image(0, (70, 90)))
    for number in (1, 2):
        write_image(folder / "photos" / f"{number}.png", clean_image(number, (40, 50)))
    av = pytest.importorskip("av")
    with av.open(str(folder / "rainy.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(4):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(clean_image(number, (48, 64)), format="rgb24")))
        video.mux(stream.encode())
    return folder


def run_in_shell(command, folder):
    """Run a line in a shell."""
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def start_forked(command, *options):
    """Start a line of the README, which needs no shell, in the current folder and in a process without network."""
    program, *arguments = shlex.split(command)
    assert program == "derain"
    return start(*arguments, *options, **OFFLINE)


@pytest.mark.slow
def test_first_commands_run_as_written(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    commands = [line.partition("  #")[0].strip() for line in FIRST.splitlines()]
    run_in_shell(commands[0], user_folder)
    for command in commands[1:]:
        if not command.startswith("derain app"):
            process = start_forked(command)
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, f"{command}\n{output}"
    for name in ("clean.jpg", "again.jpg"):
        assert image_size(user_folder / name) == (70, 90)
    assert {file.name for file in (user_folder / "restored").iterdir()} >= {"1.png", "2.png"}
    assert (user_folder / "clean.mp4").stat().st_size > 0
    assert any(command.startswith("derain app") for command in commands)


@pytest.mark.slow
def test_app_serves_the_page_until_it_is_stopped(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    command = next(line.partition("  #")[0].strip() for line in FIRST.splitlines() if line.startswith("derain app"))
    process = start_forked(command, "--port", "0")
    try:
        line = wait_for_line("http://127.0.0.1:", process)
        page = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        with urllib.request.urlopen(page, timeout=60) as answer:
            assert b"derain" in answer.read()
    finally:
        process.send_signal(2)
        assert process.wait(60) == 0


def test_pictures_exist():
    for file in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert np.prod(image_size(Path(__file__).parents[1] / file)) > 0
