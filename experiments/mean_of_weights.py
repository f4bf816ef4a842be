"""Mixes two files of weights of one network, as the model in the box was made (`derain models info default`)."""

import argparse
import sys
from pathlib import Path

from derain.errors import DerainError
from derain.methods import catalog


def main(new: Path, old: Path, out: Path, share: float) -> None:
    """Writes the weighted mean.

    Args:
        new: Weights that what comes out describes itself by.
        old: Weights of the same network.
        out: The file to write.
        share: Of ``new``, in [0, 1]; the rest is ``old``'s.

    Raises:
        DerainError: If a file is no weights, or they are of different networks.
    """
    (module, _), (other, _) = catalog.load(new), catalog.load(old)
    mine, theirs = module.network.state_dict(), other.network.state_dict()
    if not 0 <= share <= 1:
        raise DerainError(f"--share {share}: must be in [0, 1]")
    if {name: one.shape for name, one in mine.items()} != {name: one.shape for name, one in theirs.items()}:
        raise DerainError(f"{old}: its network is not that of {new}; give weights of the same method and size")
    module.network.load_state_dict({name: share * one + (1 - share) * theirs[name] for name, one in mine.items()})
    module.save_weights(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("new", "old", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of NEW (default: %(default)s)")
    options = vars(parser.parse_args())
    try:
        main(**options)
    except DerainError as error:
        sys.exit(f"mean_of_weights: error: {error}")
