"""Training on several data sets with weights."""

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from derain.data.pairs import Pair
from derain.data.samplers import Sample
from derain.data.splitting import by_data_set
from derain.errors import DerainError

log = logging.getLogger("derain")


class Mixture:
    """Chooses the pair of each training sample, so that every data set has its share of each epoch.

    Each set has a fixed random order of its pairs, which starts again after the last pair. An epoch continues in this
    order where the first ``count`` samples of the epoch before ended. If each epoch has ``count`` samples, all pairs of
    a set are used equally often, give or take one.

    An epoch may have fewer or more samples, for example in later stages of ``--data.schedule``. Additional samples are
    those of the next epochs, which use them again.

    Args:
        sizes: Number of pairs of each data set, in the order of the pairs.
        weights: Weight of each data set, above 0; only their ratios matter.
        count: Samples per epoch.
        seed: Seed of the run, which determines the order of the pairs within each set.

    Attributes:
        counts: Samples of each data set per epoch.

    Raises:
        DerainError: If a data set would get no sample in an epoch.

    Example:
        >>> mixture = Mixture([2, 100], weights=[1.0, 1.0], count=8, seed=0)
        >>> mixture.counts
        [4, 4]
        >>> sorted(mixture.pair(Sample(epoch=0, number=number, crop=64)) for number in range(4))
        [0, 0, 1, 1]
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], count: int, seed: int) -> None:
        self.sizes, self.count = list(sizes), count
        self.counts = _shares(weights, count)
        if min(self.counts) == 0:
            raise DerainError(
                f"--data.train_weights: data set {self.counts.index(0) + 1} would get none of the {count} samples of "
                "an epoch; increase its weight, or --data.repeat"
            )
        self._starts = list(itertools.accumulate(self.counts[:-1], initial=0))  # first sample of each set
        self._first_pairs = list(itertools.accumulate(self.sizes[:-1], initial=0))
        self._orders = [np.random.default_rng((seed, index)).permutation(size) for index, size in enumerate(self.sizes)]

    def pair(self, sample: Sample) -> int:
        """Return the index of the pair of a sample."""
        # An epoch with more samples than ``count`` draws several permutations of the sample numbers.
        permutation_index, number = divmod(sample.number, self.count)
        data_set = bisect_right(self._starts, number) - 1
        earlier_samples = (sample.epoch + permutation_index) * self.counts[data_set]
        position = (earlier_samples + number - self._starts[data_set]) % self.sizes[data_set]
        return self._first_pairs[data_set] + int(self._orders[data_set][position])


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Check that every data set occurs once and has a weight.

    Args:
        weights: Value of ``--data.train_weights``.
        names: Data sets of ``--data.train``.

    Raises:
        DerainError: If there are fewer than two data sets, or not as many as weights; if a data set is repeated; or if
            a weight is not finite and above 0.
    """
    if len(weights) != len(names) or len(names) < 2:
        raise DerainError(
            f"--data.train_weights {weights}: needs one number for each of several data sets, but --data.train has "
            f"{len(names)}"
        )
    if len(set(names)) < len(names):
        raise DerainError(f"--data.train_weights: each set of --data.train must occur once, not {', '.join(names)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise DerainError(f"--data.train_weights {weights}: all must be finite and above 0")


def mix(pairs: Sequence[Pair], weights: Sequence[float], count: int, seed: int) -> Mixture:
    """Return the mixture of the data sets of training pairs, and log the samples per data set.

    Args:
        pairs: Training pairs of several data sets, all pairs of one set after another.
        weights: Weight of each data set, in the order of the pairs.
        count: Samples per epoch.
        seed: Seed of the run.

    Raises:
        DerainError: If a data set has no pairs, since all were held out for validation, or gets no sample.
    """
    sizes = {name: len(indices) for name, indices in by_data_set(pairs).items()}
    if len(sizes) < len(weights):
        raise DerainError(
            f"--data.train_weights {list(weights)}: only {', '.join(sizes)} have training pairs; reduce "
            "--data.val_share, or set --data.val"
        )
    mixture = Mixture(list(sizes.values()), weights, count, seed)
    shares = zip(sizes.items(), mixture.counts, strict=True)
    text = ", ".join(f"{name} {share} (of {size} pairs)" for (name, size), share in shares)
    log.info("--data.train_weights: samples per epoch: %s", text)
    return mixture


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """Divide a number of samples in proportion to weights; the largest remainders are rounded up."""
    exact = np.asarray(weights, np.float64) * (count / sum(weights))
    shares = np.floor(exact).astype(int)
    largest = np.argsort(shares - exact, kind="stable")[: count - int(shares.sum())]
    shares[largest] += 1
    return [int(share) for share in shares]
