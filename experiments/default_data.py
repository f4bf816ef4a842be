"""Makes the training data of the model in the box: Rain800 without leaks, and synthesised rain on its clean photos.

    python experiments/default_data.py DATA OUT

``DATA`` holds Rain800 and the test sets that training must not know; ``OUT`` gets ``train`` and ``val``, each with
``rain800`` (the pairs as they are), ``light`` (synthesised rain, in ``train`` two on a photo) and ``medium`` (one), and
``train/dark``: the pairs of Rain800 once more whose rainy picture is darker than the clean one. They are few, and a
network that sees them seldom learns that taking rain away always takes light away.
Training images whose background `derain data verify` finds in a test set, or in another set, are left out. 24
backgrounds that occur once validate.
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
    """Writes the folders, and says how many pairs each has."""
    if out.exists():
        raise DerainError(f"{out}: exists already; give a new folder")
    ours = find_pairs("Rain800", "train", data_root=data).pairs
    findings = {kind: set() for kind in ("leak", "shared", "duplicate")}
    for finding in verify(data)[1]:
        if finding.kind in findings:
            findings[finding.kind] |= {Path(file).resolve() for file in finding.files}
    kept = [pair for pair in ours if pair.rainy.resolve() not in findings["leak"] | findings["shared"]]
    single = [pair for pair in kept if pair.rainy.resolve() not in findings["duplicate"]]
    held_out = set(single[:: max(1, len(single) // VALIDATE)][:VALIDATE])
    for pair in track(kept, "Writing pairs", len(kept)):
        part, (rainy, clean) = "val" if pair in held_out else "train", pair.read()
        for name in ("rain800", "dark") if part == "train" and rainy.mean() < clean.mean() else ("rain800",):
            write_image(out / part / name / "input" / f"{pair.name}.png", rainy, compress_level=1)
            write_image(out / part / name / "target" / f"{pair.name}.png", clean, compress_level=1)
    for part, rains in RAINS.items():
        for seed, (preset, count) in enumerate(rains.items(), 1):
            clean = out / part / "rain800" / "target"
            synthesize(clean, out / part / preset, PRESETS[preset], per_image=count, seed=seed)
    print(f"{len(kept)} of {len(ours)} pairs, {len(held_out)} of them to validate: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        main(options.data, options.out)
    except DerainError as error:
        sys.exit(f"default_data: error: {error}")
