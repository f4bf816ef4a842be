"""Weights files that are damaged or hostile, kind by kind: refused in one line, in a moment."""

import json
import time
import zipfile

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from spandrel.architectures.NAFNet import NAFNet

from derain.errors import DerainError
from derain.export import write as write_graph
from derain.files.limits import built_within
from derain.methods import CLIPRPNModule, DACLIPModule, DACLIPSDEModule, PReNetModule, catalog
from derain.methods.daclipsde.controller import FrozenDACLIP
from tests.factories import make_clip
from tests.methods.test_contract import METHODS, SMALL
from tests.mutated_weights import checkpoint

NAMED = {method.__name__: method for method in METHODS}


def refused(path, *parts, load=catalog.load):
    began = time.process_time()
    with pytest.raises(DerainError) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 1000
    for part in parts:
        assert part in message
    assert time.process_time() - began < 30  # where it fails, it never ends


def small(name):
    return NAMED[name](**SMALL[name]).eval()


def write(path, module, metadata):
    """A file of weights with changed metadata: a mapping, or text."""
    state = {name: value.contiguous() for name, value in module.network.state_dict().items()}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    safetensors.torch.save_file(state, path, {"derain": text})
    return path


METADATA = {
    "method list": {"method": []},
    "method of two lines": {"method": "a\n\x1b[31mb"},
    "trained on a number": {"trained_on": 5},
    "trained on a text": {"trained_on": "Rain100L"},
    "hyper-parameters list": {"hyper_parameters": []},
    "version list": {"version": ["1"]},
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_metadata_of_other_types(change, tmp_path):
    module = PReNetModule(stages=1)
    refused(write(tmp_path / "w.safetensors", module, module.metadata() | change), *change)
    content = checkpoint(module)
    content["derain"] |= change
    torch.save(content, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt", *change)


HYPER_PARAMETERS = {
    "RestormerModule heads [0, 0, 0, 0]",
    "RestormerModule heads [1]",
    "RestormerModule blocks 4",
    'RestormerModule blocks ["1", "1", "1", "1"]',
    "RestormerModule blocks [20000, 20000, 20000, 20000]",
    "RestormerModule refinement 1000000",
    "RestormerModule refinement true",
    "RestormerModule dim 1000000",
    "RestormerModule dim -8",
    "RestormerModule dim 1e300",
    "RestormerModule expansion 1e300",
    "RestormerModule unknown 1",
    "PReNetModule stages 1000000000",
    "PReNetModule stages null",
    'PReNetModule variant "os.system"',
    'PReNetModule variant {"class_path": "os.system"}',
    "DACLIPSDEModule sde_steps 1000000000",
    "DACLIPSDEModule eps 0",
    "DACLIPSDEModule multipliers [1, 200000]",
    "DACLIPSDEModule channels 0",
    "PLNLINGANModule discriminator_channels 1000000",
    "PLNLINGANModule discriminator_stages 1000000",
    "PLNLINGANModule heads 0",
    "CLIPRPNModule spatial_kernel 99999999",
    'CLIPRPNModule prompts {"a": 1}',
    "CLIPRPNModule route 100000000000000000000000",
}


@pytest.mark.parametrize("case", sorted(HYPER_PARAMETERS))
def test_hyper_parameters_that_do_not_fit_the_tensors(case, tmp_path):
    name, key, value = case.split(" ", 2)
    options = {"perception": "fixed"} if name == "CLIPRPNModule" else {}
    module = NAMED[name](**SMALL[name] | options)
    metadata = module.metadata()
    metadata["hyper_parameters"][key] = json.loads(value)
    refused(write(tmp_path / "w.safetensors", module, metadata))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"method": "PReNetModule", "x": NaN}',
        '{"x": %s}' % ("9" * 5_000),
        " " * 2**21,
    ],
    ids=["lists", "objects", "NaN", "digits", "long"],
)
def test_metadata_that_json_cannot_hold(text, tmp_path):
    refused(write(tmp_path / "w.safetensors", PReNetModule(stages=1), text), "metadata")


def test_schedules_and_counts_of_other_lengths(tmp_path):
    module = small("DACLIPSDEModule")
    metadata = module.metadata()
    for speed in ([], [1.0], [1.0, -1.0], [0.0, 0.0], ["a", "b"], [1.0, 2.0]):
        metadata["sde"]["speed"] = speed
        with pytest.raises(DerainError):
            catalog.load(write(tmp_path / "w.safetensors", module, metadata))
    module = CLIPRPNModule(**SMALL["CLIPRPNModule"] | {"perception": "fixed"})
    with pytest.raises(DerainError, match="route_counts"):
        catalog.load(write(tmp_path / "w.safetensors", module, module.metadata() | {"route_counts": [1]}))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth", ".onnx"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x00" * 64, b"{" * 64], ids=["empty", "zip", "zeros", "braces"])
def test_files_of_a_few_bytes(suffix, data, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(data)
    refused(tmp_path / f"w{suffix}")


CHECKPOINTS = {
    "state_dict list": {"state_dict": [1]},
    "state_dict of numbers": {"state_dict": {"network.conv.0.weight": 1}},
    "state_dict with other keys": {"state_dict": {5: torch.zeros(1)}},
    "ema number": {"ema": 5},
    "ema without network": {"ema": {}},
    "ema list": {"ema": {"network": [1]}},
    "metadata list": {"derain": [1]},
    "metadata with other keys": {"derain": {5: 5}},
    "hyper-parameters of tensors": {
        "derain": {"method": "PReNetModule", "hyper_parameters": {"stages": torch.ones(2)}}
    },
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_of_other_structure(change, tmp_path):
    torch.save(checkpoint(PReNetModule(stages=1)) | change, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt")


def test_an_epoch_that_is_text_is_not_formatted(tmp_path):
    torch.save(checkpoint(PReNetModule(stages=1)) | {"epoch": "{0.__class__}\n"}, tmp_path / "w.ckpt")
    assert "epoch unknown" in catalog.load(tmp_path / "w.ckpt").note


TENSORS = {
    "integers": lambda one: torch.ones_like(one, dtype=torch.int64),
    "booleans": lambda one: torch.ones_like(one, dtype=torch.bool),
    "complex": lambda one: one.to(torch.complex64),
    "sparse": lambda one: one.to_sparse(),
    "without numbers": lambda one: one.to("meta"),
    "NaN": lambda one: one * float("nan"),
    "infinite": lambda one: one / 0,
    "infinite in float32": lambda one: one.double().abs().add(1) * 1e300,
}


@pytest.mark.parametrize("kind", ["PRN", "IR-SDE", "NAFNet", "checkpoint", "average"])
@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_weights(kind, change, tmp_path):
    module = PReNetModule("PRN", stages=1)
    content = checkpoint(module)
    states = {
        "PRN": module.network.state_dict(),
        "IR-SDE": DACLIPSDEModule(**SMALL["DACLIPSDEModule"] | {"attention": "linear"}).network.state_dict(),
        "NAFNet": NAFNet(width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]).state_dict(),
        "checkpoint": content["state_dict"],
        "average": content["ema"]["network"],
    }
    state = states[kind]
    name = next(name for name in reversed(state) if state[name].ndim > 1)
    state[name] = change(state[name])
    if kind == "checkpoint":
        del content["ema"]
    torch.save(content if kind in {"checkpoint", "average"} else state, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", name.removeprefix("network."))


@pytest.mark.parametrize("change", ["integers", "booleans", "complex"])
@pytest.mark.parametrize("name", ["derainet.conv.0.weight", "derainet.convfinal.0.bias"])
def test_tensors_that_are_not_weights_by_the_authors_names(change, name, tmp_path):
    state = {f"derainet.{key}": tensor for key, tensor in PReNetModule(stages=1).network.state_dict().items()}
    state |= {"derainet.convfinal.0.weight": torch.rand(6, 32, 3, 3), "derainet.convfinal.0.bias": torch.rand(6)}
    torch.save(state, tmp_path / "DerainNet_state_1.pt")
    assert catalog.load(tmp_path / "DerainNet_state_1.pt").module.title == "VRGNet"
    state[name] = TENSORS[change](state[name])
    torch.save(state, tmp_path / "DerainNet_state_2.pt")
    refused(tmp_path / "DerainNet_state_2.pt", name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safetensors_with_nan(value, tmp_path):
    module = PReNetModule(stages=1)
    with torch.no_grad():
        module.network.conv[0].bias[1] = value
    refused(write(tmp_path / "w.safetensors", module, module.metadata()), "conv.0.bias")


@pytest.mark.parametrize("change", ["NaN", "integers"])
def test_controllers_with_nan(change, tmp_path):
    module = DACLIPModule(str(make_clip(tmp_path / "clip")))
    state = {name: value.contiguous() for name, value in module.network.state_dict().items()}
    state["zero.0.weight"] = TENSORS[change](state["zero.0.weight"] + 1)
    safetensors.torch.save_file(state, tmp_path / "c.safetensors", {"derain": json.dumps(module.metadata())})
    refused(tmp_path / "c.safetensors", "zero.0.weight")
    daclip = FrozenDACLIP(str(tmp_path / "clip"), str(tmp_path / "c.safetensors"))
    refused(tmp_path / "c.safetensors", "zero.0.weight", load=lambda path: daclip.controller)


def test_controllers_with_other_metadata(tmp_path):
    module = DACLIPModule(str(make_clip(tmp_path / "clip")))
    metadata = module.metadata()
    metadata["hyper_parameters"]["order"] = {"a": 1}
    path = write(tmp_path / "c.safetensors", module, metadata)
    refused(path, "order", load=lambda path: FrozenDACLIP(str(tmp_path / "clip"), str(path)).controller)


def test_numbers_that_are_not_in_the_file(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "views.pth")
    refused(tmp_path / "views.pth", "more elements than its memory")
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as plain, zipfile.ZipFile(tmp_path / "packed.pth", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "packed.pth", "unpacks to")


def test_names_that_ask_for_a_huge_network(tmp_path):
    state = PReNetModule("PRN").network.state_dict()
    torch.save({**state, "a\n\x1b[2J" * 1000: torch.zeros(1)}, tmp_path / "long.pth")
    refused(tmp_path / "long.pth")
    nafnet = NAFNet(width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]).state_dict()
    torch.save(nafnet | {"middle_blks.999999999.beta": torch.zeros(1)}, tmp_path / "deep.pth")
    refused(tmp_path / "deep.pth")
    sde = DACLIPSDEModule(**SMALL["DACLIPSDEModule"] | {"attention": "linear"}).network.state_dict()
    for name in ("init_conv.weight", "downs.0.3.weight"):
        for value in (torch.zeros(()), torch.zeros(0, 3), torch.zeros(10**6, 1)):
            torch.save(sde | {name: value}, tmp_path / "sde.pth")
            refused(tmp_path / "sde.pth")


def test_limits_count_one_thread_and_end():
    with pytest.raises(ValueError, match="tensors"), built_within(0, 10**9):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5000))
    torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5000))


# ONNX.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    module = PReNetModule(stages=1).eval()
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    write_graph(module.export_graph(), module, path, "onnx")
    return onnx.load(path)


def loop(graph):
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [helper.make_tensor_value_info(n, k, []) for n, k in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )
    graph.initializer.append(helper.make_tensor("trips", TensorProto.INT64, [], [10**15]))
    graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    graph.node.append(helper.make_node("Loop", ["trips", "yes"], [], body=body))


def add_range(graph):
    for name, value in (("zero", 0), ("one", 1), ("end", 10**12)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [value]))
    graph.node.append(helper.make_node("Range", ["zero", "end", "one"], ["long"]))


def double(graph):
    graph.initializer.append(helper.make_tensor("c0", TensorProto.FLOAT, [1024], [0.0] * 1024))
    for step in range(40):
        graph.node.append(helper.make_node("Concat", [f"c{step}"] * 2, [f"c{step + 1}"], axis=0))


def outside(graph):
    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def nan(graph):
    tensor = graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * float("nan"), tensor.name))


def rename(graph):
    graph.input[0].name = "image"
    for node in graph.node:
        node.input[:] = ["image" if name == "rainy" else name for name in node.input]


def fix(graph):
    for index in (2, 3):
        graph.input[0].type.tensor_type.shape.dim[index].dim_value = 64


def add_input(graph):
    graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1]))


def four_channels(graph):
    graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def bytes_in(graph):
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def add_output(graph):
    graph.output.append(helper.make_tensor_value_info(graph.node[0].output[0], TensorProto.FLOAT, None))


def foreign(graph):
    graph.node[0].domain = "com.microsoft"


def constants(graph, **values):
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), name))


def computed_shape(graph):
    constants(graph, a=[30_000], b=[30_000])
    graph.node.append(helper.make_node("Mul", ["a", "b"], ["ab"]))
    graph.node.append(helper.make_node("ConstantOfShape", ["ab"], ["big"]))


def size_of_the_pixels(graph):
    """A size that follows from what is in the image."""
    constants(graph, none=[0, 1, 2, 3], one=[1])
    graph.node.append(helper.make_node("ReduceMax", ["rainy"], ["brightest"], keepdims=0))
    graph.node.append(helper.make_node("Cast", ["brightest"], ["number"], to=TensorProto.INT64))
    graph.node.append(helper.make_node("Reshape", ["number", "one"], ["length"]))
    graph.node.append(helper.make_node("ConstantOfShape", ["length"], ["big"]))


def product_of_sides(graph):
    """One of 64² × 64² numbers."""
    constants(graph, flat=[-1, 1], row=[1, -1])
    graph.node.append(helper.make_node("Reshape", ["rainy", "flat"], ["column"]))
    graph.node.append(helper.make_node("Reshape", ["rainy", "row"], ["line"]))
    graph.node.append(helper.make_node("Mul", ["column", "line"], ["big"]))


def expanded(graph):
    constants(graph, sides=[2**15, 2**15], zero=0)
    graph.node.append(helper.make_node("Expand", ["zero", "sides"], ["big"]))


def tiled(graph):
    constants(graph, times=[1, 1, 2**12, 2**12])
    graph.node.append(helper.make_node("Tile", ["rainy", "times"], ["big"]))


def padded(graph):
    constants(graph, pads=[0, 0, 2**15, 2**15, 0, 0, 0, 0])
    graph.node.append(helper.make_node("Pad", ["rainy", "pads"], ["big"]))


def kept(graph):
    """Many tensors of a reasonable size, all of them needed at the end."""
    constants(graph, side=[1, 1, 16, 16])
    for index in range(1000):
        graph.node.append(helper.make_node("Tile", ["rainy", "side"], [f"t{index}"]))
    graph.node.append(helper.make_node("Sum", [f"t{index}" for index in range(1000)], ["big"]))


def products(graph, side=1500, count=1000):
    """Small tensors of constants, and a long computation."""
    constants(graph, sides=[side, side])
    graph.node.append(helper.make_node("ConstantOfShape", ["sides"], ["m0"]))
    for index in range(count):
        graph.node.append(helper.make_node("MatMul", [f"m{index}", "m0"], [f"m{index + 1}"]))


def products_of_the_image(graph):
    constants(graph, times=[1, 1, 20, 20])
    graph.node.append(helper.make_node("Tile", ["rainy", "times"], ["m0"]))
    for index in range(1000):
        graph.node.append(helper.make_node("MatMul", [f"m{index}", "m0"], [f"m{index + 1}"]))


def einsum(graph):
    constants(graph, sides=[2000])
    graph.node.append(helper.make_node("ConstantOfShape", ["sides"], ["v"]))
    graph.node.append(helper.make_node("Einsum", ["v"] * 4, ["s"], equation="a,b,c,d->"))


def division_by_zero(graph):
    constants(graph, zero=0, end=9)
    graph.node.append(helper.make_node("Range", ["zero", "end", "zero"], ["long"]))


COSTS = (
    computed_shape,
    size_of_the_pixels,
    product_of_sides,
    expanded,
    tiled,
    padded,
    kept,
    products,
    products_of_the_image,
    einsum,
    division_by_zero,
)
GRAPHS = (
    *COSTS,
    loop,
    add_range,
    double,
    outside,
    nan,
    rename,
    fix,
    add_input,
    four_channels,
    bytes_in,
    add_output,
    foreign,
)


@pytest.mark.parametrize("change", GRAPHS, ids=[change.__name__ for change in GRAPHS])
def test_graphs_that_derain_does_not_export(change, model, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **named: pytest.fail("a session was made"))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    change(changed.graph)
    onnx.save(changed, tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx", "derain")


ONNX_METADATA = {
    "graph number": {"graph": 5},
    "graph without inputs": {"graph": {"parameters": 1}},
    "parameters text": {"graph": {"inputs": ["rainy"], "parameters": "many"}},
    "other inputs": {"graph": {"inputs": ["state", "rainy", "times"], "parameters": 1}},
    "routes number": {"graph": {"inputs": ["rainy"], "parameters": 1, "routes": 3}},
    "method list": {"method": []},
    "hyper-parameters list": {"hyper_parameters": []},
}


@pytest.mark.parametrize("change", ONNX_METADATA.values(), ids=ONNX_METADATA)
def test_onnx_metadata_of_other_types(change, model, tmp_path):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    metadata = json.loads(changed.metadata_props[0].value) | change
    helper.set_model_props(changed, {"derain": json.dumps(metadata)})
    onnx.save(changed, tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx")


def test_onnx_of_the_sde_with_other_hyper_parameters(tmp_path):
    module = small("DACLIPSDEModule")
    path = tmp_path / "m.onnx"
    write_graph(module.export_graph(), module, path, "onnx")
    original = onnx.load(path)
    for change in ({"channels": 10**6}, {"contexts": "both"}, {"sde_steps": 10**9}, {"unknown": 1}):
        metadata = json.loads(original.metadata_props[0].value)
        metadata["hyper_parameters"] |= change
        helper.set_model_props(original, {"derain": json.dumps(metadata)})
        onnx.save(original, path)
        refused(path)


def test_sizes_that_grow_only_for_large_images(model, tmp_path):
    """Loaded, since images of other sizes are checked when they come."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    constants(changed.graph, two=[2], three=[3], limit=[500], one=[1], huge=[2**40])
    for operator, given, made in (
        ("Shape", ["rainy"], "shape"),
        ("Slice", ["shape", "two", "three"], "height"),
        ("Greater", ["height", "limit"], "large"),
        ("Where", ["large", "huge", "one"], "length"),
        ("ConstantOfShape", ["length"], "big"),
    ):
        changed.graph.node.append(helper.make_node(operator, given, [made]))
    onnx.save(changed, tmp_path / "m.onnx")
    loaded = catalog.load(tmp_path / "m.onnx").module
    assert loaded(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)
    with pytest.raises(DerainError, match=r"m\.onnx: ConstantOfShape big"):
        loaded(torch.rand(1, 3, 501, 1))


def test_a_graph_that_returns_another_shape(model, tmp_path):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    last = changed.graph.output[0].name
    for node in changed.graph.node:
        node.output[:] = ["inner" if name == last else name for name in node.output]
    changed.graph.node.append(helper.make_node("Concat", ["inner", "inner"], [last], axis=3))
    onnx.save(changed, tmp_path / "m.onnx")
    loaded = catalog.load(tmp_path / "m.onnx").module
    with pytest.raises(DerainError, match=r"m\.onnx"):
        loaded(torch.rand(1, 3, 8, 8))


def test_equal_weights_are_exported_as_one_and_load(tmp_path):
    """PyTorch writes an ``Identity`` for the second of two equal tensors."""
    module = PReNetModule(stages=1).eval()
    with torch.no_grad():
        module.network.res_conv2.load_state_dict(module.network.res_conv1.state_dict())
    write_graph(module.export_graph(), module, tmp_path / "m.onnx", "onnx")
    assert "Identity" in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert catalog.load(tmp_path / "m.onnx").module(torch.rand(1, 3, 5, 5)).shape == (1, 3, 5, 5)
