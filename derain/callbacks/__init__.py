"""Lightning callbacks of the commands ``fit``, ``validate``, ``test`` and ``predict``.

Files are saved below ``trainer.default_root_dir``, which the command line sets to the folder of the run. The property
``trainer.log_dir`` is not used, since it communicates between ranks: if only one rank read it, that rank would wait
forever.
"""

from derain.callbacks.batched_restoration import BatchedRestoration
from derain.callbacks.checkpoints import BestCheckpoint, Checkpoint
from derain.callbacks.ema import EMA
from derain.callbacks.final_weights import FinalWeights
from derain.callbacks.image_counts import PartialEvaluationWarning
from derain.callbacks.last import LastCheckpoint
from derain.callbacks.panels import ImagePanels
from derain.callbacks.predictions import SaveImages
from derain.callbacks.results import TestResults
from derain.callbacks.seeds import BatchSeeds
from derain.callbacks.throughput import Throughput
from derain.callbacks.training_speed import CompileBlocks, GradientCheckpointing, TensorFloat32

__all__ = [
    "EMA",
    "BatchSeeds",
    "BatchedRestoration",
    "BestCheckpoint",
    "Checkpoint",
    "CompileBlocks",
    "FinalWeights",
    "GradientCheckpointing",
    "ImagePanels",
    "LastCheckpoint",
    "PartialEvaluationWarning",
    "SaveImages",
    "TensorFloat32",
    "TestResults",
    "Throughput",
]
