import functools
import json
import re

import jaxtyping
import onnx
import pytest
import torch

from derain.errors import DerainError
from derain.export import write
from derain.methods import CLIPRPNModule, DACLIPSDEModule, PReNetModule, Syn2RealModule, catalog, onnx_model
from derain.methods.interfaces import Sampled, Sampling
from derain.methods.onnx_model import OnnxNetwork
from tests.methods.test_contract import METHODS, SMALL

SIZES = [(37, 31), (101, 77), (1, 1)]
CASES = {method.__name__: (method, SMALL.get(method.__name__, {})) for method in METHODS}
CASES["CLIPRPNModule"] = (CLIPRPNModule, SMALL["CLIPRPNModule"] | {"perception": "fixed", "route": 1})
CASES["DACLIPSDEModule with contexts"] = (
    DACLIPSDEModule,
    SMALL["DACLIPSDEModule"] | {"contexts": "both", "context": 8, "multipliers": (2, 4), "attention": "linear"},
)
CONTEXTS = {"content": torch.linspace(-1, 1, 8)[None], "degradation": torch.linspace(1, -2, 8)[None]}


def perturbed_method(name):
    """Return a method whose parts all contribute to the result; before training, some have zero weights."""
    method, options = CASES[name]
    torch.manual_seed(0)
    module = method(**options).eval()
    module.trained_on = ("RainTrainL",)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    return module


def restored(method, size):
    rainy = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(size[1]))
    if isinstance(method, DACLIPSDEModule):
        method.set_sampling(Sampling(steps=2))
        return method(rainy, **(CONTEXTS if method.hparams.contexts == "both" else {}))
    with torch.no_grad():
        return method(rainy)


def largest_difference(method, loaded):
    return max(float((restored(method, size) - restored(loaded, size)).abs().max()) for size in SIZES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function that returns a case's method and its ONNX file, which is written once."""

    @functools.cache
    def write_once(name):
        method = perturbed_method(name)
        path = tmp_path_factory.mktemp("onnx") / "m.onnx"
        write(method.export_graph().eval(), method, path, "onnx")
        return method, path

    return write_once


@pytest.mark.parametrize(
    "name", [name if name == "PReNetModule" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_onnx_equals_torch(name, written):
    method, path = written(name)
    loaded, note = catalog.load(path)
    assert type(method).__name__ in note
    assert ("route 1" in note) == (name == "CLIPRPNModule")
    assert largest_difference(method, loaded) < (1e-4 if isinstance(method, Sampled) else 1e-5)
    if not isinstance(method, Syn2RealModule):  # needs more memory than ONNX files are assumed to
        assert loaded.bytes_per_pixel >= method.bytes_per_pixel


def test_a_saved_program_has_the_metadata(tmp_path):
    method = PReNetModule(stages=1).eval()
    graph = method.export_graph().eval()
    write(graph, method, tmp_path / "m.pt2", "torch")
    files = {"derain.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=files).module()
    metadata = json.loads(files["derain.json"])
    assert metadata.pop("graph")["inputs"] == ["rainy"]
    assert metadata == method.metadata()
    inputs = graph.example(*SIZES[0])
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), graph(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "PReNet" in name else pytest.mark.slow)
        for name in CASES
        if name != "DACLIPSDEModule"  # with contexts, it has all inputs
    ],
)
def test_exported_programs_equal_torch(name, tmp_path, monkeypatch):
    """Programs are not read back: to load the operators of a large network takes PyTorch as long as to trace them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks need sizes, which are symbolic here
    programs = []
    monkeypatch.setattr(torch.export, "save", lambda program, path, **_: programs.append(program))
    method = perturbed_method(name)
    graph = method.export_graph().eval()
    write(graph, method, tmp_path / "m.pt2", "torch")
    program = programs[0].module()
    with torch.no_grad():
        for size in SIZES:
            inputs = graph.example(*size)
            torch.testing.assert_close(program(*inputs), graph(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_metadata(written):
    method, path = written("DACLIPSDEModule with contexts")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}["derain"])
    graph = metadata.pop("graph")
    assert metadata == method.metadata()
    assert graph["inputs"] == ["state", "rainy", "times", "content", "degradation"]
    assert graph["inputs"] == [value.name for value in model.graph.input]
    assert graph["parameters"] == sum(parameter.numel() for parameter in method.network.parameters())
    sde = type(method.sde).from_state(metadata["sde"])
    assert torch.equal(sde.tau, method.sde.tau)
    sizes = [dimension.dim_param for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes[2:] == ["height", "width"]


@pytest.mark.slow
@pytest.mark.parametrize("contexts", ["content", "degradation"])
def test_graphs_with_one_context_are_loaded(contexts, tmp_path):
    _, options = CASES["DACLIPSDEModule with contexts"]
    method = DACLIPSDEModule(**options | {"contexts": contexts}).eval()
    write(method.export_graph(), method, tmp_path / "m.onnx", "onnx")
    assert catalog.load(tmp_path / "m.onnx").module.hparams["contexts"] == contexts


def test_a_graph_needs_a_route():
    with pytest.raises(DerainError, match=r"--route 0 to --route 1"):
        CLIPRPNModule(**SMALL["CLIPRPNModule"] | {"perception": "clip"}).export_graph()


def test_batches(written):
    method, path = written("PReNetModule")
    loaded, _ = catalog.load(path)
    rainy = torch.rand(3, 3, 10, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rainy), method(rainy), atol=1e-5, rtol=1e-5)


def test_files_that_cannot_be_run_are_refused_in_one_line(written, tmp_path, monkeypatch):
    _, path = written("PReNetModule")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:5000])
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for text in ("no json", "[1]"):
        onnx.helper.set_model_props(model, {"derain": text})
        onnx.save(model, tmp_path / f"{text[:2]}.onnx")
    for name in ("absent.onnx", "cut.onnx", "foreign.onnx", "no.onnx", "[1.onnx"):
        with pytest.raises(DerainError, match=re.escape(name)) as caught:
            catalog.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(onnx_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DerainError, match=r"onnxruntime.*derain\[export\]"):
        catalog.load(path)


def test_the_session_uses_the_gpu_of_the_images(written, monkeypatch):
    import onnxruntime

    network, opened = OnnxNetwork(written("PReNetModule")[1]), []

    class Session:
        def get_providers(self):
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(network, "_open", lambda *providers: opened.append(providers) or Session())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    for index in (1, 1, 0):
        network._use(torch.device("cuda", index))
    assert [providers[0] for providers in opened] == [
        ("CUDAExecutionProvider", {"device_id": index}) for index in (1, 0)
    ]


def test_every_image_on_a_gpu_that_onnxruntime_cannot_use_is_refused(written, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    network = OnnxNetwork(written("PReNetModule")[1])
    for _ in range(2):
        with pytest.raises(DerainError, match="CUDA"):
            network._use(torch.device("cuda", 0))
    assert network.gpu is None


def test_running_out_of_memory_raises_memory_error(written):
    """`Restorer` then tries smaller tiles."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

    network = OnnxNetwork(written("PReNetModule")[1])

    class Session:
        def __init__(self, error):
            self.error = error

        def run(self, *inputs):
            raise self.error

    for error, expected in (
        (RuntimeException("std::bad_alloc"), MemoryError),
        (Fail("bfc_arena.cc: Failed to allocate memory for requested buffer of size 7"), MemoryError),
        (Fail("another reason"), DerainError),
    ):
        network.session = Session(error)
        with pytest.raises(expected):
            network(torch.rand(1, 3, 4, 4))
