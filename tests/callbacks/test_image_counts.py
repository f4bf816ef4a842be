"""How many of the images were evaluated, over all processes."""

import logging
from unittest.mock import Mock

import pytest
from lightning import Trainer

from derain.callbacks.image_counts import PartialEvaluationWarning, validation_counts
from derain.methods import PReNetModule


class Data:
    """Of ten images, those that are evaluated unless the trainer limits them."""

    def __init__(self, kept):
        self.pairs = {"val": list(range(kept))}

    def count(self, stage):
        return 10


def trainer(batches, world, kept=10):
    limits = {"limit_val_batches": batches, "limit_predict_batches": batches, "num_predict_batches": [batches]}
    made = Mock(spec=Trainer, world_size=world, **limits)
    made.datamodule = Data(kept)
    return made


@pytest.mark.parametrize(
    ("batches", "world", "kept", "evaluated"),
    [
        (3, 1, 10, 3),
        (3, 2, 10, 6),
        (5, 2, 10, 10),
        (4, 3, 10, 10),  # two of twelve are images again
        (2, 2, 3, 3),
        (10, 1, 3, 3),
    ],
)
def test_images_that_were_evaluated(caplog, batches, world, kept, evaluated):
    assert validation_counts(trainer(batches, world, kept)) == (evaluated, 10)
    if kept == 10:
        PartialEvaluationWarning().on_predict_end(trainer(batches, world), PReNetModule(stages=1))
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * (evaluated < 10)
        assert evaluated == 10 or f"{evaluated} of 10 images" in caplog.text
