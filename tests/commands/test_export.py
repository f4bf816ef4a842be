import numpy as np
import pytest
import torch

from derain.cli import main
from derain.commands import bench
from derain.errors import DerainError
from derain.export import SIZES
from derain.export import export as write_export
from derain.images import read_rgb, write_image
from derain.methods import CLIPRPNModule, DACLIPSDEModule, PReNetModule, catalog
from derain.methods.graph import Graph
from derain.methods.interfaces import Sampling
from derain.testing import ContractError, check_export
from tests.methods.test_contract import SMALL, Plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with weights, their ONNX file and a photo."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("export")
    PReNetModule(stages=1).save_weights(path / "w.safetensors")
    write_image(path / "rainy.png", np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    assert main(["export", "--weights", str(path / "w.safetensors"), str(path / "m.onnx")]) == 0
    return path


def restore(folder, file, target, *options):
    weights = ["--weights", str(folder / file)]
    return main(["restore", str(folder / "rainy.png"), str(target), *weights, "--device", "cpu", *options])


def test_the_file_is_compared_at_all_sizes(folder, tmp_path, capsys):
    command = ["export", "--weights", str(folder / "w.safetensors"), "--format", "torch", str(tmp_path / "m.pt2")]
    assert main(command) == 0
    output = capsys.readouterr()
    for height, width in SIZES:
        assert f"{width}×{height}" in output.out
    assert "PReNetModule" in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("options", [(), ("--tile", "64"), ("--ensemble",)])
def test_onnx_restores_photos(folder, tmp_path, options):
    assert restore(folder, "m.onnx", tmp_path / "onnx.png", *options) == 0
    assert restore(folder, "w.safetensors", tmp_path / "torch.png", *options) == 0
    difference = read_rgb(tmp_path / "onnx.png").astype(int) - read_rgb(tmp_path / "torch.png")
    assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_an_exported_diffusion_is_sampled_by_derain(folder, tmp_path, capsys):
    torch.manual_seed(0)
    DACLIPSDEModule(**SMALL["DACLIPSDEModule"]).save_weights(folder / "sde.safetensors")
    assert main(["export", "--weights", str(folder / "sde.safetensors"), str(folder / "sde.onnx")]) == 0
    assert main(["export", "--weights", str(folder / "sde.onnx"), str(tmp_path / "again.onnx")]) == 2
    for solver in ("posterior", "mrs-ode2"):
        options = ("--steps", "3", "--solver", solver, "--seed", "4", "--tile", "64")
        for file in ("sde.onnx", "sde.safetensors"):
            assert restore(folder, file, tmp_path / f"{solver}-{file}.png", *options) == 0
        by_file = read_rgb(tmp_path / f"{solver}-sde.onnx.png").astype(int)
        by_method = read_rgb(tmp_path / f"{solver}-sde.safetensors.png").astype(int)
        assert np.abs(by_file - by_method).max() <= 1
    capsys.readouterr()
    assert restore(folder, "sde.onnx", tmp_path / "o.png", "--steps", "1000") == 2
    assert "--steps 1000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_route_must_be_given(folder, tmp_path, capsys):
    torch.manual_seed(0)
    CLIPRPNModule(**SMALL["CLIPRPNModule"] | {"perception": "clip"}).save_weights(tmp_path / "w.safetensors")
    command = ["export", "--weights", str(tmp_path / "w.safetensors"), str(tmp_path / "m.onnx")]
    assert main(command) == 2
    assert "--route 0 to --route 1" in capsys.readouterr().err
    assert main([*command, "--route", "7"]) == 2
    assert "route 7" in capsys.readouterr().err
    assert main([*command, "--route", "1"]) == 0
    assert "route 1" in catalog.load(tmp_path / "m.onnx").note


def test_a_graph_that_depends_on_the_size_is_not_written(folder, tmp_path, capsys, monkeypatch):
    network_class = type(PReNetModule().network)
    forward = network_class.forward

    def forward_large_images(self, rainy):
        return forward(self, rainy) if rainy.shape[2] > 70 else rainy

    monkeypatch.setattr(network_class, "forward", forward_large_images)
    (tmp_path / "m.onnx").write_bytes(b"old")
    assert main(["export", "--weights", str(folder / "w.safetensors"), str(tmp_path / "m.onnx")]) == 2
    assert "m.onnx" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_nan_weights_are_not_exported(folder, tmp_path, capsys):
    module = PReNetModule(stages=1)
    torch.nn.init.constant_(module.network.conv[0].bias, float("nan"))
    module.save_weights(tmp_path / "w.safetensors")
    assert main(["export", "--weights", str(tmp_path / "w.safetensors"), str(tmp_path / "m.onnx")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_bad_arguments_are_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_variants", dict)
    file, onnx, photo = (str(folder / name) for name in ("w.safetensors", "m.onnx", "rainy.png"))
    out = str(tmp_path / "o.png")
    for arguments, value in (
        (["export", "--weights", file, str(tmp_path / "m.pth")], ".onnx"),
        (["export", "--weights", file, "--format", "torch", str(tmp_path / "m.onnx")], ".pt2"),
        (["export", "--weights", onnx, str(tmp_path / "m.onnx")], "m.onnx"),
        (["export", "--weights", file, str(tmp_path / "m.onnx"), "--route", "0"], "--route 0"),
        (["export", "--weights", str(tmp_path / "absent.pth"), str(tmp_path / "m.onnx")], "absent.pth"),
        (["restore", photo, out, "--weights", str(tmp_path / "m.pt2")], "m.pt2"),
        (["restore", photo, out, "--weights", onnx, "--compile"], "--compile"),
        (["restore", photo, out, "--weights", onnx, "--route", "0"], "--route 0"),
        (["restore", photo, out, "--weights", onnx, "--steps", "3"], "OnnxModule"),
        (["bench", "--size", "8", "--weights", onnx], "m.onnx"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("derain: error:")
        assert value in error
    assert list(tmp_path.iterdir()) == []


class Spectral(Plain):
    """Uses an operator that ONNX lacks."""

    def forward(self, rainy):
        return super().forward(rainy) + torch.fft.fft2(rainy).real


class Hungry(Plain):
    """Uses an operator that derain does not run."""

    def forward(self, rainy):
        return super().forward(rainy) + torch.cumsum(rainy, 3)


@pytest.mark.parametrize(("method", "part"), [(Spectral, "fft_fft2"), (Hungry, "CumSum")])
def test_what_onnx_cannot_hold_is_refused_in_one_line(method, part, tmp_path):
    with pytest.raises(DerainError, match=part) as caught:
        write_export(method(), tmp_path / "m.onnx")
    message = str(caught.value)
    assert "\n" not in message
    assert "--format torch" in message
    assert "tmp" not in message.replace(str(tmp_path), "")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ContractError, match=part):
        check_export(method())


def test_export_leaves_the_modes_of_modules(tmp_path):
    module = PReNetModule(stages=1).train()
    module.network.conv0.eval()
    write_export(module, tmp_path / "m.onnx")
    assert module.training
    assert module.network.training
    assert not module.network.conv0.training


def test_a_diffusion_is_compared_with_its_own_sampling(tmp_path):
    torch.manual_seed(0)
    module = DACLIPSDEModule(**SMALL["DACLIPSDEModule"])
    module.set_sampling(Sampling("ode", 3, 2))
    write_export(module, tmp_path / "m.onnx")
    assert module.sampling == Sampling("ode", 3, 2)


def test_a_graph_of_another_function_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PReNetModule, "export_graph", lambda self: Graph(self, lambda rainy: rainy - self(rainy)))
    for name, format in (("m.onnx", "onnx"), ("m.pt2", "torch")):
        command = ["export", str(tmp_path / name), "--weights", str(folder / "w.safetensors"), "--format", format]
        assert main(command) == 2
        assert name in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
