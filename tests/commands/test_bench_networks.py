"""The cost of networks of other systems is what papers print, or what thop counts of the authors' code."""

import pytest

from derain.commands.bench import count_cost
from derain.methods.regression.module import RegressionModule
from derain.networks import NETWORKS
from derain.networks.mprnet import ChannelAttentionBlock
from tests.networks.test_networks import arguments

NAMES = [path.rpartition(".")[2] for path in NETWORKS]

FIGURES = {
    # Multiplications at 256×256 in billions: by thop 0.1.1 of the authors' code, then with what thop does not see.
    "DRSformer": ("220.38", "229.44"),
    "PromptIR": ("158.14", "172.71"),
    "NLEDN": ("22.11", "23.87"),
    "HCTFFN": ("80.25", "312.18"),
    "TransWeather": ("6.13", "6.59"),
    "AirNet": ("301.27", "422.07"),
    "RCDNet": ("194.50", "211.89"),
    "SPANet": ("36.24", "36.24"),
    "DCSFN": ("73.22", "73.22"),
    "RESCAN": ("32.12", "32.12"),
    "BRN": ("196.44", "196.44"),
    "AMIR": ("127.21", "139.42"),
}
QUICK = {"NLEDN", "RESCAN", "BRN"}


def marked(name):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in FIGURES])
def test_figures_are_those_of_thop(name):
    counted = count_cost(RegressionModule(name), 256)
    assert tuple(f"{counted[key] / 1e9:.2f}" for key in ("macs", "macs_with_attention")) == FIGURES[name]


def test_printed_figure_of_mprnet_counts_an_activation_3025_times(monkeypatch):
    """The authors' 55 blocks share one module: thop registers its counter 55 times, and adds the result 55 times."""
    activated = []
    forward = ChannelAttentionBlock.forward

    def recorded(self, x, slope):
        activated.append(x.numel())
        return forward(self, x, slope)

    monkeypatch.setattr(ChannelAttentionBlock, "forward", recorded)
    method = RegressionModule("MPRNet")
    macs = count_cost(method, 256)["macs"]
    blocks = sum(isinstance(module, ChannelAttentionBlock) for module in method.modules())
    assert blocks == 55
    assert f"{macs / 1e9:.2f}" == "141.59"
    assert f"{(macs + (blocks**2 - 1) * sum(activated[:blocks])) / 1e9:.2f}" == "548.65"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*FIGURES, "MPRNet"}])
def test_every_other_network_is_counted(name):
    counted = count_cost(RegressionModule(name, arguments(name)["network_options"]), 64)
    assert 0 < counted["macs"] <= counted["macs_with_attention"]


def test_amir_selects_two_of_four_experts():
    """More selected experts are more work, and experts that no pixel selects are none."""
    small = {"dim": 8, "blocks": [0, 1, 0, 0], "refinement": 0, "instruction": 8, "atoms": 4}

    def macs(**options):
        return count_cost(RegressionModule("AMIR", {**small, **options}), 32)["macs"]

    assert macs(experts=4, selected=2) == macs(experts=6, selected=2) < macs(experts=6, selected=3)
