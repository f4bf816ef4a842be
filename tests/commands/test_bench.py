import csv
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.restormer import Published
from derain.callbacks.results import cpu_name, device_name
from derain.cli import main
from derain.commands import bench
from derain.commands.bench import count_cost, find_variants
from derain.errors import DerainError
from derain.methods import CLIPRPNModule, DerainModule, PReNetModule, RestormerModule
from derain.networks import NETWORKS
from tests.methods.test_contract import Plain

VARIANTS = find_variants()
SMALL = {name: VARIANTS[name] for name in ("PRN_r", "CLIP-RPN, tiny")}
TINY = CLIPRPNModule.variants["CLIP-RPN, tiny"]


@pytest.fixture
def small(monkeypatch):
    """Only the two smallest methods."""
    monkeypatch.setattr(bench, "find_variants", lambda: dict(SMALL))


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "with_attention"),
    [
        ("PReNet", 168_963, "66.249", "66.249"),  # as the package thop prints it
        pytest.param("Restormer", 26_126_644, "140.990", "154.88", marks=pytest.mark.slow),
        pytest.param("CLIP-RPN, 2 routes", 32_720_308, "150.73", "165.4", marks=pytest.mark.slow),
        # thop prints 379.34 and 129.02: it adds 0.03 G for nearest upsampling and group and layer normalisation.
        ("IR-SDE, one step", 137_147_523, "379.31", "380.7"),
        ("DA-CLIP + IR-SDE, one step", 48_975_747, "128.99", "133.1"),
        pytest.param(
            "PLNLIN", 2_251_423, "68.18", "73.3", marks=pytest.mark.slow
        ),  # 256 is padded to 280: thop's 57.5 of 256 are 68.8 of 280
    ],
)
def test_numbers_are_those_of_the_literature(name, parameters, macs, with_attention):
    counted = count_cost(VARIANTS[name](), 256)
    assert counted["parameters"] == parameters
    for key, text in {"macs": macs, "macs_with_attention": with_attention}.items():
        digits = len(text.partition(".")[2])
        assert f"{counted[key] / 1e9:.{digits}f}" == text


@pytest.mark.slow
def test_other_routes_have_parameters_but_no_multiplications():
    one, three = (count_cost(CLIPRPNModule(**TINY, prompts=list(texts)), 64) for texts in ("ab", "abc"))
    assert one["parameters"] < three["parameters"]
    assert one["macs"] == three["macs"]


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        pytest.param({}, 256, marks=pytest.mark.slow),
        ({"dim": 24, "blocks": (1, 2, 1, 1), "refinement": 1}, 61),  # 24 and 61 are padded
    ],
)
def test_restormer_agrees_with_torch_on_the_published_network(parts, size):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        Published(**parts)(torch.empty(1, 3, size, size))
    assert 2 * count_cost(RestormerModule(**parts), size)["macs_with_attention"] == counter.get_total_flops()


@pytest.mark.parametrize("variant", ["PReNet", "PReNet_r", "PRN", "PRN_r"])
def test_prenet_counts_every_convolution_of_every_stage(variant):
    """In the authors' code the first stage has a hidden state and a cell of zeros."""
    gates = 4 * 9 * 64 * 32 if variant.startswith("PReNet") else 0
    products = 9 * 6 * 32 + gates + 10 * 9 * 32 * 32 + 9 * 32 * 3
    counted = count_cost(PReNetModule(variant, stages=3), 40)
    assert counted["macs"] == counted["macs_with_attention"] == 3 * 40 * 40 * products


class Twice(Plain):
    """Runs its network twice."""

    def forward(self, rainy):
        return super().forward(super().forward(rainy))


class Modes(Plain):
    """Runs its network twice in training."""

    def forward(self, rainy):
        return super().forward(super().forward(rainy) if self.training else rainy)


class Branches(Plain):
    """Computes differently for dark images."""

    def forward(self, rainy):
        return rainy if rainy.mean() < 0.5 else super().forward(rainy)


def test_what_forward_computes_is_counted():
    assert count_cost(Plain(), 8)["macs"] == 64 * 81
    assert count_cost(Twice(), 8)["macs"] == 2 * 64 * 81


def test_methods_are_counted_in_eval_mode():
    assert count_cost(Modes().train(), 8)["macs"] == 64 * 81


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(DerainError, match="Branches"):
        count_cost(Branches(), 8)


def test_counting_does_not_change_the_network():
    method = PReNetModule("PRN_r", stages=1)
    network = method.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert count_cost(method, 16) == count_cost(method, 16)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network(torch.rand(1, 3, 8, 8)).isfinite().all()


@pytest.mark.slow
def test_a_counted_method_still_restores():
    method = VARIANTS["PLNLIN, tiny"]()
    count_cost(method, 64)
    assert type(method(torch.rand(1, 3, 64, 64))) is torch.Tensor


def test_every_method_and_variant_is_counted():
    own = {
        *("PReNet", "PReNet_r", "PRN", "PRN_r", "PReNet_LSTM", "Restormer", "CLIP-RPN, 1 route", "CLIP-RPN, 2 routes"),
        *("CLIP-RPN, 3 routes", "CLIP-RPN without MGCA", "CLIP-RPN, tiny", "IR-SDE, one step"),
        *("DA-CLIP + IR-SDE, one step", "IR-SDE, tiny, one step", "PLNLIN", "PLNLIN, tiny"),
    }
    networks = {path.rpartition(".")[2] for path in NETWORKS}
    repeated = {f"{name} (RegressionModule)" for name in networks & own}
    assert set(VARIANTS) == own | networks | repeated


@pytest.mark.parametrize(
    ("experiment", "variant"),
    [
        ("cliprpn-tiny", "CLIP-RPN, tiny"),
        ("daclipsde-tiny", "IR-SDE, tiny, one step"),
        ("plnlingan-tiny", "PLNLIN, tiny"),
    ],
)
def test_tiny_networks_are_those_of_the_experiments(experiment, variant):
    file = Path(__file__).parents[2] / "experiments" / "methods" / f"{experiment}.yaml"
    arguments = yaml.safe_load(file.read_text())["model"]["init_args"]
    listed = {
        name: list(value) if isinstance(value, tuple) else value for name, value in VARIANTS[variant].keywords.items()
    }
    for name in ("perception", "contexts"):
        listed.pop(name, None)
    assert {name: arguments[name] for name in listed} == listed
    assert set(arguments) - set(listed) <= {
        *("learning_rate", "contexts", "max_sigma", "residual"),
        *("discriminator_channels", "discriminator_stages", "milestones", "beta"),
    }


@pytest.mark.slow
def test_all_formats_have_the_same_numbers(capsys, small):
    def printed(form):
        assert main(["bench", "--size", "64", "--format", form]) == 0
        return capsys.readouterr().out

    result = json.loads(printed("json"))
    assert [row["method"] for row in result["methods"]] == list(SMALL)
    rows = list(csv.DictReader(io.StringIO(printed("csv"))))
    assert rows == [{key: str(value) for key, value in row.items()} for row in result["methods"]]
    assert f"PRN\\_r & {result['methods'][0]['parameters']:,}" in printed("latex")
    for form in ("table", "markdown"):
        text = printed(form)
        for row in result["methods"]:
            line = next(line for line in text.splitlines() if row["method"] in line)
            assert f"{row['parameters']:,}" in line
            assert f"{row['macs'] / 1e9:.2f}" in line
        assert "thop" in text
        assert "64×64" in text
        assert "seconds" not in text


def test_weights_are_counted_and_timed_on_named_hardware(capsys, small, tmp_path):
    file = tmp_path / "mine.safetensors"
    PReNetModule("PRN_r", stages=2).save_weights(file)
    options = ["--size", "16", "--weights", str(file), "--time", "--device", "cpu", "--format", "json"]
    assert main(["bench", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    six, _, two = result["methods"]
    assert two["method"] == str(file)
    assert six["macs"] == 3 * two["macs"]
    assert all(row["seconds"] > 0 for row in result["methods"])
    assert f"torch {torch.__version__}" in result["hardware"]


class Inheriting(PReNetModule):
    """Method whose base class has variants."""


class Unbuildable(DerainModule):
    """Method that needs an argument."""

    def __init__(self, needed):
        super().__init__()

    def forward(self, rainy):
        return rainy


class Uncountable(DerainModule):
    """Method that branches by the values of pixels."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Conv2d(3, 3, 1)

    def forward(self, rainy):
        return self.network(rainy) if rainy.max() > 0 else rainy

    def pass_once(self, rainy):
        return self(rainy)


def test_variants_are_those_of_the_class_itself(monkeypatch):
    repeated = {"variants": {"PRN": {"variant": "PRN"}}}
    first, second = (type("Inheriting", (PReNetModule,), {"__module__": name, **repeated}) for name in ("one", "two"))
    monkeypatch.setattr(bench, "methods", lambda: [PReNetModule, Inheriting, first, second])
    variants = find_variants()
    unique = ["PRN (Inheriting)", "PRN (two.Inheriting)"]
    assert list(variants) == [*PReNetModule.variants, "Inheriting", *unique]
    assert type(variants["Inheriting"]()) is Inheriting
    assert type(variants["PRN"]()) is PReNetModule


def test_a_method_without_a_network_of_its_own_is_not_counted(monkeypatch):
    empty = type("Trainer", (PReNetModule,), {"__module__": "other", "variants": {}})
    monkeypatch.setattr(bench, "methods", lambda: [empty])
    assert find_variants() == {}


def test_methods_that_cannot_be_counted_are_reported(monkeypatch, capsys, caplog):
    monkeypatch.setattr(bench, "methods", lambda: [Unbuildable, Uncountable])
    assert main(["bench", "--format", "json", "--size", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == []
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == 2
    for message, name in zip(reported, ("Unbuildable", "Uncountable"), strict=True):
        assert name in message
        assert "\n" not in message


def test_weights_are_loaded_before_methods_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(bench, "count_cost", lambda *arguments: pytest.fail("counted"))
    assert main(["bench", "--weights", "absent.pth"]) == 2
    assert "absent.pth" in capsys.readouterr().err


def test_devices_have_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert device_name(torch.device("cuda", 0)) == "a GPU"
    assert device_name(torch.device("cpu")) == cpu_name()
    assert device_name(torch.device("mps")) == f"{cpu_name()}, mps"


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--size", "0"], "--size 0"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_input_gives_one_line(capsys, options, value):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert value in error
    assert error.count("\n") == 1
