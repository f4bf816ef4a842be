"""RegressionModule: networks by name or path, losses by output, optimizers and schedules by name or path."""

import inspect
import sys

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from derain.commands.table import add_costs
from derain.data.run_summaries import ResultRow
from derain.errors import DerainError
from derain.files.weights import save
from derain.methods import catalog, registry
from derain.methods.regression import module as regression
from derain.methods.regression.module import RegressionModule
from derain.nn.losses import LOSSES, laplacian
from derain.testing import check_method, make_batch

PATH = "my_network.TwoStages"
SOURCE = '''
import torch
from torch import nn

from derain.networks.base import Network


class TwoStages(Network):
    """Two convolutions, one after the other."""

    signature = "body.first.weight"
    published_names = ((r"^body\\.", ""), (r"unused.*", None))
    size_multiple = 4

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def restore(self, image):
        first = image + self.first(image)
        return {"derained": first + self.second(first), "first": first}


class Plain(nn.Conv2d):
    """Any module of PyTorch."""

    def __init__(self) -> None:
        super().__init__(3, 3, 3, padding=1)
'''


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """The current folder has the file ``my_network.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "my_network.py").write_text(SOURCE)
    sys.modules.pop("my_network", None)
    yield
    sys.modules.pop("my_network", None)
    for name in [name for name in registry._named if name.startswith(("my_network", "my_package"))]:
        registry._named.pop(name)
    sys.modules.pop("my_package", None)


def fit(module, steps=3):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([make_batch()] * steps, batch_size=None))
    return trainer


@pytest.mark.parametrize("network", [PATH, "my_network.Plain"])
def test_contract(networks, network):
    registry.use_method(network)
    check_method(RegressionModule, network=network)


def test_loss_is_the_weighted_sum_over_outputs(networks):
    weights = {"derained": {"l1": 1.0, "ssim": 0.2}, "first": {"charbonnier": 0.5}}
    module = RegressionModule(PATH, loss=weights)
    module.log = module.log_dict = lambda *args, **options: None
    batch = make_batch()
    loss = module.training_step(batch, 0)
    outputs = module.network.outputs(batch["rainy"])
    derained, first, clean = (x.detach().double() for x in (outputs["derained"], outputs["first"], batch["clean"]))
    assert float(loss.detach()) == pytest.approx(
        float((derained - clean).abs().mean())
        + 0.2 * float(LOSSES["ssim"](derained, clean))
        + 0.5 * float(((first - clean) ** 2 + 1e-6).sqrt().mean()),
        abs=1e-6,
    )


def test_laplacian_equals_its_definition():
    images = np.random.default_rng(0).random((9, 8))
    window = np.outer([0.05, 0.25, 0.4, 0.25, 0.05], [0.05, 0.25, 0.4, 0.25, 0.05])

    def blur(image):
        padded = np.pad(image, 2, mode="edge")
        rows, columns = image.shape
        return sum(window[i, j] * padded[i : i + rows, j : j + columns] for i in range(5) for j in range(5))

    sampled = np.zeros_like(images)
    sampled[::2, ::2] = 4 * blur(images)[::2, ::2]
    expected = images - blur(sampled)
    np.testing.assert_allclose(laplacian(torch.from_numpy(images)[None, None])[0, 0], expected, atol=1e-12)


def test_fft_loss_equals_its_definition():
    a, b = np.random.default_rng(0).random((2, 1, 3, 6, 5))
    difference = np.fft.fft2(a) - np.fft.fft2(b)
    expected = np.hypot(difference.real, difference.imag).mean()
    assert float(LOSSES["fft"](torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "kind", "rates"),
    [
        ({"schedule": "constant"}, torch.optim.Adam, [0.1, 0.1]),
        ({"schedule": "cosine", "schedule_options": {"minimum": 0.05}}, torch.optim.Adam, [0.1, 0.075]),
        (
            {
                "optimizer": "torch.optim.SGD",
                "optimizer_options": {"momentum": 0.9},
                "schedule": "torch.optim.lr_scheduler.StepLR",
                "schedule_options": {"step_size": 1, "gamma": 0.5, "interval": "step"},
            },
            torch.optim.SGD,
            [0.1, 0.05],
        ),
        (
            {
                "schedule": "torch.optim.lr_scheduler.CosineAnnealingLR",
                "schedule_options": {"interval": "step"},
            },
            torch.optim.Adam,
            [0.1, 0.05],
        ),
    ],
)
def test_optimizers_and_schedules(networks, options, kind, rates):
    module = RegressionModule(PATH, learning_rate=0.1, **options)
    seen = []
    module.on_before_zero_grad = lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])
    trainer = fit(module, 2)
    assert type(trainer.optimizers[0]) is kind
    assert seen == pytest.approx(rates)


def test_milestones(networks):
    module = RegressionModule(
        PATH, learning_rate=0.1, schedule="milestones", schedule_options={"milestones": [1], "decay": 0.2}
    )
    trainer = fit(module, 1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"network": "NoNetwork"},
        {"network": "my_network.Absent"},
        {"network": "json.JSONDecoder"},
        {"network_options": {"depth": 3}},
        {"loss": "l3"},
        {"loss": {}},
        {"loss": {"derained": {"l1": float("inf")}}},
        {"optimizer_options": {"lr": 1.0}},
        {"schedule": "ReduceLROnPlateau"},
        {"schedule": "StepLR", "schedule_options": {"interval": "steps"}},
        {"schedule": "cosine", "schedule_options": {"minimum": 1.0}},
        {"schedule": "cosine", "schedule_options": {"warm_up": "much"}},
        {"schedule": "milestones", "schedule_options": {"milestones": 5, "decay": 0.1}},
        {"schedule": "stairs"},
        {"schedule": "cosine", "schedule_options": {"warmup": 0.1}},
        {"schedule": "cosine", "schedule_options": {"warm_up": 0.6, "hold": 0.5}},
        {"schedule": "milestones"},
    ],
)
def test_wrong_options_are_refused(networks, options):
    with pytest.raises(DerainError, match=next(iter(options))):
        RegressionModule(**{"network": PATH, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"loss": {"mask": {"l1": 1.0}}},
        {"optimizer": "torch.optim.Absent"},
        {"optimizer": "json.JSONDecoder"},
        {"optimizer_options": {"momentum": 0.9}},
        {"schedule": "torch.optim.lr_scheduler.StepLR", "schedule_options": {"steps": 1}},
    ],
)
def test_options_that_only_training_uses_are_refused_there(networks, options):
    with pytest.raises(DerainError, match=next(iter(options)) if len(options) == 1 else "schedule_options"):
        fit(RegressionModule(PATH, **options))


def test_weights_do_not_import_networks_that_nobody_named(networks, tmp_path):
    RegressionModule(PATH).save_weights(tmp_path / "w.safetensors")
    sys.modules.pop("my_network")
    with pytest.raises(DerainError, match=r"--method my_network\.TwoStages"):
        catalog.load(tmp_path / "w.safetensors")
    assert "my_network" not in sys.modules
    module, note = catalog.load(tmp_path / "w.safetensors", PATH)
    assert type(module.network).__name__ == "TwoStages"
    assert "TwoStages" in note


def test_a_network_has_several_names(networks, tmp_path):
    """A package may offer a class under another path than that of its file."""
    (tmp_path / "my_package.py").write_text("from my_network import TwoStages\n")
    registry.use_method("my_package.TwoStages")
    RegressionModule("my_package.TwoStages").save_weights(tmp_path / "w.safetensors")
    assert catalog.load(tmp_path / "w.safetensors").module.title == "TwoStages"
    module = RegressionModule("derain.networks.rescan.RESCAN", {"channels": 8, "layers": 2, "squeeze": 2})
    module.save_weights(tmp_path / "r.safetensors")
    assert catalog.load(tmp_path / "r.safetensors").module.title == "RESCAN"


def test_a_finished_training_names_the_network_from_outside(networks):
    assert RegressionModule(PATH).required_class() == PATH
    assert RegressionModule("RESCAN").required_class() is None


def test_tables_do_not_import_networks_that_nobody_named(networks, tmp_path, caplog):
    metadata = RegressionModule(PATH).metadata()
    sys.modules.pop("my_network")
    row = ResultRow("TwoStages", {}, (), None, (), None, "summary.json", metadata)
    assert add_costs([row]) == [row]
    assert f"--method {PATH}" in caplog.text
    assert "my_network" not in sys.modules


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("SwinIR", {"window": 256}),
        ("RCDNet", {"kernel": 4095}),
        ("NLEDN", {"grids": [1 << 20, 1, 1]}),
        ("HCTFFN", {"repeats": 1 << 30}),
        ("TransWeather", {"depths": [1 << 40, 1, 1, 1]}),
        ("PromptIR", {"dim": 1 << 24}),
    ],
)
def test_hostile_options_are_refused_before_memory_is_used(tmp_path, network, options):
    path = tmp_path / "w.safetensors"
    metadata = RegressionModule("RESCAN", {"channels": 8, "layers": 2, "squeeze": 2}).metadata()
    metadata["hyper_parameters"] |= {"network": network, "network_options": options}
    save({"weight": torch.zeros(1)}, metadata, path)
    with pytest.raises(DerainError, match=r"w\.safetensors"):
        catalog.load(path)


def test_outputs_and_targets_of_other_shapes_are_refused():
    class Grey(nn.Module):
        def forward(self, rainy):
            return rainy.mean(1, keepdim=True).requires_grad_()

    module = RegressionModule("RESCAN", {"channels": 8, "layers": 2, "squeeze": 2})
    module.network = Grey()
    with pytest.raises(DerainError, match=r"derained\.l1.*\(2, 1, 16, 16\)"):
        module.training_step(make_batch(), 0)


def test_parameters_that_the_loss_does_not_reach_are_reported(networks, caplog):
    fit(RegressionModule(PATH, loss={"first": {"l1": 1.0}}), 1)
    assert "2 parameters" in caplog.text
    assert "second.weight" in caplog.text


def test_weights_do_not_import_their_optimizer(networks, tmp_path):
    registry.use_method(PATH)
    RegressionModule(PATH, optimizer="absent.Optimizer").save_weights(tmp_path / "w.safetensors")
    assert catalog.load(tmp_path / "w.safetensors").module.title == "TwoStages"


def test_published_weights_are_recognised(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "NETWORKS", (PATH,))
    torch.manual_seed(0)
    network = regression.find_network(PATH)()
    state = {f"module.body.{name}": value for name, value in network.state_dict().items()}
    torch.save({"net": state | {"module.unused.weight": torch.ones(1)}}, tmp_path / "theirs.pth")
    module, _ = catalog.load(tmp_path / "theirs.pth")
    rainy = torch.rand(1, 3, 9, 10)
    torch.testing.assert_close(module(rainy), network(rainy))


def test_options_of_authors_files_are_those_of_all_networks():
    networks = [regression.find_network(name) for name in regression.network_paths()]
    assert RegressionModule.published_options == set().union(*(network.published_options for network in networks))
    for network in networks:
        assert network.published_options <= set(inspect.signature(network).parameters), network.__name__


def test_images_of_networks_are_rgb():
    class Swapped(regression.Network):
        bgr, size_multiple = True, 8

        def restore(self, image):
            assert image.shape[2:] == (8, 16)
            return {"derained": image * torch.tensor([1.0, 1, 0])[:, None, None], "mask": image[:, :1]}

    rainy = torch.rand(1, 3, 5, 9)
    outputs = Swapped().outputs(rainy)
    torch.testing.assert_close(outputs["derained"], rainy * torch.tensor([0.0, 1, 1])[:, None, None])
    torch.testing.assert_close(outputs["mask"], rainy[:, 2:])
    assert isinstance(Swapped(), nn.Module)
