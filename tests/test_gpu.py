"""A GPU restores as the CPU does."""

import numpy as np
import pytest
import torch

from derain import Restorer
from tests.factories import clean_image


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [None, 64])
def test_a_gpu_restores_as_the_cpu_does(tile):
    rainy = clean_image(0, (70, 90))
    on_cpu = Restorer(device="cpu", tile=tile)(rainy).astype(int)
    on_gpu = Restorer(device="cuda", tile=tile)(rainy).astype(int)
    assert np.abs(on_cpu - on_gpu).max() <= 1
