"""The bundled models against an earlier one, a small Restormer: processor time per megapixel for a 640×480 image.

``bundled.py [--rounds 5]`` restores one image with each model in turn, with one thread of PyTorch. The bundled models
as ONNX files and ClearView's two small networks are also measured. Targets: ``default`` is at least 6 times, and
``fast`` 20 times as fast as the earlier model. The earlier model and ClearView's networks have random weights, which
do not change the time.

``--plot CHART.png --results default=RUN/summary.json ...`` also plots PSNR against time. ``default`` is one of the
names that are printed, and ``RUN`` the folder of a run of `derain test`; all runs must be on the same data set.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _timing import time_alternately

from derain.export import export
from derain.methods import RegressionModule, RestormerModule
from derain.models import bundled
from derain.plots import trade_off
from derain.restoration import Restorer

HEIGHT, WIDTH = 480, 640
MIN_SPEED_UP = {"default": 6.0, "fast": 20.0}

CLEARVIEW = {
    "nafnet-small": {
        "network": "NAFNet",
        "network_options": {"width": 16, "encoder_blocks": [1] * 4, "middle_blocks": 1, "decoder_blocks": [1] * 4},
    },
    "restormer-small": {
        "network": "Restormer",
        "network_options": {"dim": 24, "blocks": [1, 1, 1, 2], "refinement": 2, "bias": True, "bias_free_norm": True},
    },
}
"""Options of `RegressionModule` for ClearView's small networks."""


def build_restorers(folder: Path) -> dict[str, Restorer]:
    """Return the restorers by name; write ONNX files to the folder."""
    old = RestormerModule(dim=24, blocks=(1, 1, 1, 1), refinement=1)
    restorers = {"earlier model": Restorer(old, device="cpu")}
    for name in bundled():
        restorers[name] = Restorer(name, device="cpu")
        file = folder / f"{name}.onnx"
        export(restorers[name].method, file)
        restorers[f"{name}, ONNX"] = Restorer(file, device="cpu")
    for name, options in CLEARVIEW.items():
        restorers[f"ClearView {name}"] = Restorer(RegressionModule(**options), device="cpu")
    return restorers


def plot(seconds: Mapping[str, float], results: Mapping[str, str], path: Path) -> None:
    """Plot the PSNR by the first protocol of each summary against the seconds for an image of one megapixel."""
    points = {}
    for name, file in results.items():
        summary = json.loads(Path(file).read_text(encoding="utf-8"))
        score = summary["results"][0]
        points[name] = (seconds[name], score["psnr"])
    trade_off(path, points, f"{summary['data']['sets']}, images of one megapixel, one core", score["protocol"])


def main() -> int:
    """Print the times, and plot them if requested; return 1 if a target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after a warm-up")
    parser.add_argument("--plot", type=Path, help="PNG file of the chart")
    parser.add_argument("--results", nargs="+", default=[], metavar="NAME=FILE", help="results of derain test, to plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.rand(1, 3, HEIGHT, WIDTH)
    with TemporaryDirectory() as folder:
        restorers = build_restorers(Path(folder))
        times = time_alternately({name: lambda r=r: r(image) for name, r in restorers.items()}, options.rounds)
    megapixels = HEIGHT * WIDTH / 1e6
    before = times["earlier model"][1]
    for name, (_, processor) in times.items():
        print(f"{name:26} {processor / megapixels:6.2f} s per megapixel, {before / processor:.1f} times as fast")
    if options.plot:
        results = dict(result.split("=", 1) for result in options.results)
        plot({name: times[name][1] / megapixels for name in results}, results, options.plot)
    return int(any(before / times[name][1] < least for name, least in MIN_SPEED_UP.items()))


if __name__ == "__main__":
    sys.exit(main())
