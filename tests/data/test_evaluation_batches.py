from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from derain.data.evaluation_batches import EqualSizeBatches
from derain.evaluation import evaluation_batch_size

SIZES = [(8, 6), (6, 8), (8, 6), (8, 6), (6, 8), (9, 9), (8, 6)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_each_image_is_in_one_batch_of_its_size_and_in_order(batch_size):
    indices = [0, 1, 3, 4, 5, 6]  # those of one rank
    batches = list(EqualSizeBatches(indices, SIZES, batch_size))
    assert sorted(index for batch in batches for index in batch) == indices
    assert all(len({SIZES[index] for index in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == min(batch_size, 3)
    assert all(batch == sorted(batch) for batch in batches)
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)


def test_batches_are_limited_by_their_pixels():
    assert list(EqualSizeBatches([0, 2, 3, 5], SIZES, 10, pixels=2 * 48)) == [[0, 2], [3], [5]]
    assert list(EqualSizeBatches([0, 2], SIZES, 10, pixels=1)) == [[0], [2]]


class GpuTrainer(Trainer):
    """Trainer with a GPU, on any machine."""

    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    limit_test_batches = 1.0

    def __init__(self):
        pass


def test_the_default_is_one_image_on_a_cpu_and_more_on_a_gpu():
    on_cpu = Trainer(accelerator="cpu", logger=False)
    assert evaluation_batch_size("auto", "test", on_cpu) == 1
    assert evaluation_batch_size("auto", "test", GpuTrainer()) > 1
    assert evaluation_batch_size(3, "test", on_cpu) == 3
    assert evaluation_batch_size(3, "val", GpuTrainer()) == 1


@pytest.mark.parametrize("limit", [1, 7, 0.5])
def test_a_limit_counts_images(limit, caplog):
    trainer = GpuTrainer()
    trainer.limit_test_batches = limit
    assert evaluation_batch_size("auto", "test", trainer) == 1
    assert "eval_batch_size" not in caplog.text
    caplog.set_level("INFO", "derain")
    assert evaluation_batch_size(4, "test", trainer) == 1
    assert "eval_batch_size 4" in caplog.text
