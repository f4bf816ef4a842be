"""Damaged image files are read, or raise DerainError with one line: no other exception, no crash, no stray output."""

import subprocess
import sys
from pathlib import Path

import pytest

from derain.data.verify import verify
from derain.images import write_image
from tests.factories import clean_image
from tests.mutated_images import check, mutated_files, undamaged_files

COUNT = 300
"""Enough to damage each kind of file in nine ways."""

CHECK = """
import resource, sys
from pathlib import Path
from tests.mutated_images import check

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, check(path), sep="\\t", flush=True)
"""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name, data in mutated_files(COUNT):
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(damaged):
    command = [sys.executable, "-W", "always", "-c", CHECK, str(damaged)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = process.stdout.splitlines()
    assert process.returncode == 0, f"after {lines[-1:]}: {process.stderr[-2000:]}"
    assert len(lines) == COUNT
    warnings = process.stderr.splitlines()
    assert all(line.startswith(f"{damaged}/") for line in warnings), process.stderr  # each names the file
    read = [line for line in lines if line.endswith("\tread")]
    assert 30 < len(read) < COUNT - 100  # some files stay readable, many do not


def test_undamaged_files_are_read(tmp_path, rng):
    for name, data in undamaged_files(rng).items():
        (tmp_path / name).write_bytes(data)
        assert check(tmp_path / name) == "read", name


def test_verify_reports_damaged_files(damaged, tmp_path):
    pixels = clean_image(0, (30, 40))
    for number, path in enumerate(sorted(damaged.iterdir())[::6]):
        pair = tmp_path / "set" / "input" / f"{number}{path.suffix}"
        write_image(tmp_path / "set" / "target" / f"{number}.png", pixels)
        pair.parent.mkdir(exist_ok=True)
        pair.write_bytes(path.read_bytes())
    _, findings = verify(tmp_path / "set")
    assert len([finding for finding in findings if finding.kind in {"unreadable", "size"}]) > 15
