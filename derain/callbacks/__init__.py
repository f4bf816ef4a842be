"""Callbacks: checkpoints, weights, pictures, results, averages, seeds and throughput.

Files are saved below ``trainer.default_root_dir``, which the command line sets to the folder of the run;
``trainer.log_dir`` is a collective call: a single rank would wait in it for ever.
"""

from derain.callbacks.checkpoints import BestCheckpoint, Checkpoint
from derain.callbacks.ema import EMA
from derain.callbacks.final_weights import FinalWeights
from derain.callbacks.last import LastCheckpoint
from derain.callbacks.panels import ImagePanels
from derain.callbacks.parts import PartialEvaluationWarning
from derain.callbacks.predictions import SaveImages
from derain.callbacks.results import TestResults
from derain.callbacks.seeds import BatchSeeds
from derain.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "BatchSeeds",
    "BestCheckpoint",
    "Checkpoint",
    "FinalWeights",
    "ImagePanels",
    "LastCheckpoint",
    "PartialEvaluationWarning",
    "SaveImages",
    "TestResults",
    "Throughput",
]
