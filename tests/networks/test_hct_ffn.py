"""HCT-FFN compared with recorded outputs of the authors' code, and with their weights on a real image."""

import pytest
import torch

from derain.errors import DerainError
from derain.networks import hct_ffn
from derain.networks.hct_ffn import HCTFFN, BackgroundTransformer
from tests.networks.goldens import (
    Golden,
    authors_network,
    check_gradients,
    check_outputs,
    check_parameters,
    check_real_image,
    check_recognition,
    check_sizes,
    load,
    published_state,
)

TINY = {"channels": 16, "blocks": 1, "steps": 1, "hidden": 8}
SCORES = {"matlab-y": (42.0352, 0.99537), "prenet": (41.5364, 0.99555)}
PART, PART_SCORES = (96, 160), {"matlab-y": (50.3753, 0.99585), "prenet": (47.8044, 0.99645)}
"""Size of the upper left part of the image, and its scores by this network, which has those of the whole image."""


@pytest.fixture(scope="module")
def golden():
    return Golden("hct_ffn")


@pytest.fixture(scope="module")
def network(golden):
    network = HCTFFN(**HCTFFN.options_of(golden.shapes()))
    load(network, golden)
    return network


def as_8_bit(output):
    return 255 * output


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden, to_authors=as_8_bit)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"stage1": "stage1", "stage2": "stage2"}, to_authors=as_8_bit)


def test_parameters(network, golden):
    check_parameters(network, golden)


@pytest.fixture
def trained_network():
    return authors_network(HCTFFN, "hct_ffn/Rain100L/model_best_Rain100L.pt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_authors_weights_restore_as_their_code(trained_network):
    """Attention within runs of 9,650 pixels takes a CPU most of a minute."""
    check_real_image(trained_network, "Rain100L", 3, SCORES, device="cuda")


@pytest.mark.slow
def test_authors_weights_restore_a_part_as_before(trained_network):
    check_real_image(trained_network, "Rain100L", 3, PART_SCORES, size=PART)


def test_recognition(golden):
    check_recognition(HCTFFN, "hct_ffn")
    state = published_state(HCTFFN(**TINY), golden)
    assert HCTFFN.options_of(state) == TINY
    HCTFFN(**TINY).load_state_dict(HCTFFN.translate(state), strict=True)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(HCTFFN(**TINY))


def test_outputs_are_three_stages():
    torch.manual_seed(0)
    rainy = torch.rand(1, 3, 20, 17)
    outputs = HCTFFN(**TINY).outputs(rainy)
    assert list(outputs) == ["derained", "stage2", "stage1"]
    assert all(output.shape == rainy.shape for output in outputs.values())


def test_prior_is_the_same_for_any_added_grey():
    """The residue channel of an image does not change with light that is equal in R, G and B."""
    torch.manual_seed(0)
    encoder = hct_ffn.PriorEncoder(16, 1).double()
    image = torch.rand(1, 3, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(encoder(image), encoder(image + torch.rand(1, 1, 8, 9)))


@pytest.mark.parametrize("size", [(16, 16), (19, 17), (32, 24)])
def test_runs_are_independent(size):
    """Training computes runs of equal length at once, inference one by one, an exported graph with a mask."""
    torch.manual_seed(0)
    transformer = BackgroundTransformer(16, hidden=8, repeats=2).double()
    tokens = torch.rand(2, size[0] * size[1], 144, dtype=torch.float64)
    in_training = transformer.transform(tokens)
    with torch.no_grad():
        at_inference = transformer.transform(tokens)
        in_graph = transformer.transform_padded(tokens)
        torch.testing.assert_close(at_inference, in_training)
        torch.testing.assert_close(in_graph, in_training)
        length = tokens.shape[1] // 16
        changed = tokens.clone()
        changed[:, length : 2 * length] = 0
        same = torch.isclose(transformer.transform(changed), at_inference).all(-1).all(0)
    assert (~same).nonzero().flatten().tolist() == list(range(length, 2 * length))


def test_graph_equals_the_network(monkeypatch):
    torch.manual_seed(0)
    network = HCTFFN(**TINY).eval()
    rainy = torch.rand(1, 3, 21, 14)
    with torch.no_grad():
        expected = network(rainy)
        monkeypatch.setattr(hct_ffn, "exporting", lambda: True)
        torch.testing.assert_close(network(rainy), expected)


@pytest.mark.parametrize("option", [{"channels": 24}, {"channels": 0}, {"repeats": 0}])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(DerainError, match=" ".join(f"{name} {value}" for name, value in option.items())):
        HCTFFN(**option)
