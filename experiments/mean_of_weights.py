"""Write the weighted mean of two weights files, as for the bundled model (`derain models info default`)."""

import argparse
import sys
from pathlib import Path

from derain.errors import DerainError
from derain.methods import catalog


def main(new: Path, old: Path, out: Path, share: float) -> None:
    """Write the weighted mean.

    Args:
        new: Weights file, whose metadata the mean receives.
        old: Weights file of the same network.
        out: The file to write.
        share: Weight of ``new``, in [0, 1]; that of ``old`` is ``1 - share``.

    Raises:
        DerainError: If a file is not a weights file, the networks differ, or ``share`` is out of range.
    """
    if not 0 <= share <= 1:
        raise DerainError(f"--share {share}: must be in [0, 1]")
    module = catalog.load(new).module
    new_state = module.network.state_dict()
    old_state = catalog.load(old).module.network.state_dict()
    if shapes(new_state) != shapes(old_state):
        raise DerainError(f"{old}: its network differs from that of {new}; name weights of the same method and size")
    mean = {name: share * value + (1 - share) * old_state[name] for name, value in new_state.items()}
    module.network.load_state_dict(mean)
    module.save_weights(out)


def shapes(state: dict) -> dict:
    """Return the shape of every tensor of a state dict."""
    return {name: value.shape for name, value in state.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("new", "old", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="weight of NEW (default: %(default)s)")
    options = vars(parser.parse_args())
    try:
        main(**options)
    except DerainError as error:
        sys.exit(f"mean_of_weights: error: {error}")
