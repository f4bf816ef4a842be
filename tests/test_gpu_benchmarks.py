"""The benchmarks for a GPU count work correctly, and run on a CPU at tiny sizes."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.items import ITEMS
from benchmarks.gpu.measure import FLOAT32, TF32, Work
from benchmarks.gpu.report import page, table
from tests.forks import ForkedCommand

PEAKS = {"copy": 10.0, "float32": 4.0, "TF32": 8.0, "bf16": 16.0}


def run(*arguments):
    """Run the benchmarks in a process; return exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = ForkedCommand(("-m", "benchmarks.gpu"), arguments, environment)
    output, _ = process.communicate(timeout=1200)
    return process.returncode, output


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_work_of_operators(context):
    a, b = torch.rand(2, 3), torch.rand(3, 5)
    image, kernel = torch.rand(1, 2, 4, 4), torch.rand(6, 2, 3, 3)
    with context(), Work() as work:
        product = a @ b
        product.t().reshape(10)[1:]  # views, but for the copy of reshape
        product.add_(1.0)
        torch.nn.functional.conv2d(image, kernel, padding=1)
    sizes = [(flops, size) for _, flops, size in work.operators if flops]
    assert sizes == [(60, 4 * (6 + 15 + 10)), (2 * 6 * 16 * 18, 4 * (32 + 108 + 96))]
    assert [size for _, flops, size in work.operators if not flops] == [80, 40]


def test_backward_is_counted():
    a, b = torch.rand(2, 3, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    with Work() as work:
        (a @ b).sum().backward()
    assert sum(flops for _, flops, _ in work.operators) == 3 * 60


def test_the_roofline():
    work = Work()
    work.operators = [(torch.float32, 80, 10), (torch.bfloat16, 160, 10), (torch.float32, 0, 50)]
    assert work.least_seconds(PEAKS, FLOAT32) == 20 + 10 + 5
    assert work.least_seconds(PEAKS, TF32) == 10 + 10 + 5


def test_the_page_lists_what_is_missing():
    rows = [{"method": "a", "seconds": 0.5}, {"method": "b", "peak GiB": None}]
    assert table(rows)[:4] == [
        "| method | seconds | peak GiB |",
        "| --- | --- | --- |",
        "| a | 0.5 | – |",
        "| b | – | – |",
    ]
    text = page({"batches": {"environment": {"device": "X"}, "rows": rows, "notes": ["not measured: c: no time left"]}})
    assert "device X" in text
    assert "c: no time left" in text
    assert all(item.name in text for item in ITEMS if item.name != "batches")


def test_every_item_has_its_own_name():
    assert len({item.name for item in ITEMS}) == len(ITEMS)


@pytest.mark.slow
def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, output = run("device")
    assert code == 2
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_every_item_runs_once(tmp_path):
    code, output = run("--device", "cpu", "--quick", "--out", tmp_path, "--total", 100_000)
    assert code == 0, output
    (folder,) = tmp_path.iterdir()
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(results) == {item.name for item in ITEMS}
    assert all(result["rows"] or result["notes"] for result in results.values())
    (folder / "video.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    code, output = run("--device", "cpu", "--quick", "--out", tmp_path, "--total", 100_000)
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (folder / "video.json").is_file()
