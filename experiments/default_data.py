"""Make the training data of the bundled model: Rain800 without leaks, and synthetic rain on its clean photos.

    python experiments/default_data.py DATA OUT

``DATA`` contains Rain800 and the test sets. ``OUT/train`` and ``OUT/val`` each receive

- ``rain800``: the original pairs;
- ``light`` and ``medium``: synthetic rain (two images of light rain for each training photo, else one);
- ``dark`` (training only): a copy of the pairs whose rainy image is darker than the clean one. They are rare, and a
  network that rarely sees them learns that removing rain always darkens the image.

Training images whose background `derain data verify` also finds in a test set or another set are skipped. The
validation set has 24 backgrounds that occur only once.
"""

import argparse
import sys
from pathlib import Path

from derain.data.pairs import find_pairs
from derain.data.rain import PRESETS, synthesize
from derain.data.verify import verify
from derain.errors import DerainError
from derain.images import write_image
from derain.progress import track

VALIDATE = 24
RAINS = {"train": {"light": 2, "medium": 1}, "val": {"light": 1, "medium": 1}}


def main(data: Path, out: Path) -> None:
    """Write the folders and print the number of pairs.

    Raises:
        DerainError: If ``out`` exists, or the data is not found.
    """
    if out.exists():
        raise DerainError(f"{out}: exists already; name a new folder")
    pairs = find_pairs("Rain800", "train", data_root=data).pairs
    findings = {kind: set() for kind in ("leak", "shared", "duplicate")}
    for finding in verify(data)[1]:
        if finding.kind in findings:
            findings[finding.kind] |= {Path(file).resolve() for file in finding.files}
    kept = [pair for pair in pairs if pair.rainy.resolve() not in findings["leak"] | findings["shared"]]
    single = [pair for pair in kept if pair.rainy.resolve() not in findings["duplicate"]]
    held_out = set(single[:: max(1, len(single) // VALIDATE)][:VALIDATE])
    for pair in track(kept, "Writing pairs", len(kept)):
        part = "val" if pair in held_out else "train"
        rainy, clean = pair.read()
        names = ["rain800"]
        if part == "train" and rainy.mean() < clean.mean():
            names.append("dark")
        for name in names:
            write_image(out / part / name / "input" / f"{pair.name}.png", rainy, compress_level=1)
            write_image(out / part / name / "target" / f"{pair.name}.png", clean, compress_level=1)
    for part, rains in RAINS.items():
        for seed, (preset, count) in enumerate(rains.items(), 1):
            clean = out / part / "rain800" / "target"
            synthesize(clean, out / part / preset, PRESETS[preset], per_image=count, seed=seed)
    print(f"{len(kept)} of {len(pairs)} pairs, {len(held_out)} of them for validation: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        main(options.data, options.out)
    except DerainError as error:
        sys.exit(f"default_data: error: {error}")
