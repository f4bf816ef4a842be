"""Weights files of all kinds with reproducible damage and hostile content.

To check more files than the tests do, and keep those that fail::

    python -m tests.mutated_weights 1000 --seed 7
"""

import argparse
import json
import shutil
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import onnx
import psutil
import safetensors
import safetensors.torch
import torch
from spandrel.architectures.NAFNet import NAFNet

from derain.errors import DerainError
from derain.export import write
from derain.methods import DACLIPSDEModule, DerainModule, PReNetModule, catalog
from derain.restoration import Restorer
from tests.methods.test_contract import METHODS, SMALL

HOSTILE_VALUES: tuple[Callable[[Any], Any], ...] = (
    lambda old: None,
    lambda old: True,
    lambda old: -1,
    lambda old: 0,
    lambda old: 20_000,
    lambda old: 10**6,
    lambda old: 2**63,
    lambda old: 10**400,
    lambda old: 1e300,
    lambda old: float("nan"),
    lambda old: "1",
    lambda old: "x\n\x1b[31m" * 200,
    lambda old: [],
    lambda old: {},
    lambda old: {"class_path": "os.system", "init_args": {"command": "true"}},
    lambda old: [old] * 3,
    lambda old: [20_000] * 4,
    lambda old: [1] * 50_000,
    lambda old: [[[]]],
    lambda old: old * 2 if isinstance(old, int | float | str | list) else old,
)
"""Functions of the value in a file that return its replacement."""


def undamaged_files(folder: Path) -> list[Path]:
    """Write a small undamaged file of every kind and method."""
    torch.manual_seed(0)
    paths = []
    for method in METHODS:
        module = method(**SMALL[method.__name__]).eval()
        weights = folder / f"{method.__name__}.safetensors"
        module.save_weights(weights)
        torch.save(checkpoint(module), weights.with_suffix(".ckpt"))
        paths += [weights, weights.with_suffix(".ckpt")]
    published = {
        "prenet": PReNetModule("PRN_r").network.state_dict(),
        "irsde": DACLIPSDEModule(**SMALL["DACLIPSDEModule"] | {"attention": "linear"}).network.state_dict(),
        "nafnet": NAFNet(width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]).state_dict(),
    }
    for name, state in published.items():
        path = folder / f"{name}.pth"
        torch.save({"params": state} if name == "nafnet" else state, path)
        paths.append(path)
    for module in (PReNetModule(stages=1).eval(), DACLIPSDEModule(**SMALL["DACLIPSDEModule"]).eval()):
        path = folder / f"{type(module).__name__}.onnx"
        write(module.export_graph(), module, path, "onnx")
        paths += [path] * 2
    return paths


def checkpoint(module: DerainModule) -> dict[str, Any]:
    """Return a checkpoint with the average of EMA, as training saves it."""
    state = {f"network.{name}": value for name, value in module.network.state_dict().items()}
    average = {"network": module.network.state_dict(), "updates": 3, "batches": 3}
    return {"derain": module.metadata(), "state_dict": state, "ema": average, "epoch": 3, "global_step": 7}


def mutate(source: Path, target: Path, random: Random) -> str:
    """Write a mutated copy of a file; return a description of the change."""
    shutil.copy(source, target)
    if random.random() < 0.4:
        return mutate_bytes(target, random)
    if target.suffix == ".safetensors":
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        content = {"derain": json.loads(metadata["derain"]), "state_dict": safetensors.torch.load_file(source)}
        change = mutate_content(content, random)
        write_safetensors(content, target, random)
        return change
    if target.suffix == ".onnx":
        return mutate_onnx(target, random)
    content = torch.load(source, weights_only=True)
    change = mutate_content(content, random)
    torch.save(content, target, _use_new_zipfile_serialization=random.random() < 0.7)
    return change


def mutate_bytes(path: Path, random: Random) -> str:
    """Flip, cut, insert, repeat or clear bytes, often in the header."""
    data = bytearray(path.read_bytes())
    start = random.randrange(min(len(data), random.choice((16, 2_000, len(data)))))
    end = min(len(data), start + random.choice((1, 8, 100, 5_000)))
    kind = random.choice(("flip", "cut", "insert", "repeat", "clear", "empty", "length"))
    if kind == "flip":
        for index in range(start, min(end, start + 20)):
            data[index] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[start:]
    elif kind == "insert":
        data[start:start] = random.randbytes(end - start)
    elif kind == "repeat":
        data[start:start] = data[start:end] * random.choice((1, 100))
    elif kind == "clear":
        data[start:end] = bytes(end - start)
    elif kind == "empty":
        data.clear()
    else:
        data[:8] = struct.pack("<Q", random.choice((0, 1, len(data), 2**40, 2**63)))
    path.write_bytes(data)
    return f"bytes: {kind} {start} to {end}"


def mutate_content(content: dict[str, Any], random: Random) -> str:
    """Change a metadata value, a tensor, a name, or the structure."""
    state = content.get("state_dict", content.get("params", content))
    kind = random.choice(("metadata", "metadata", "hyper-parameter", "hyper-parameter", "tensor", "name", "structure"))
    metadata = content.get("derain")
    if metadata is not None and kind in {"metadata", "hyper-parameter"}:
        entries = metadata["hyper_parameters"] if kind == "hyper-parameter" else metadata
        key = random.choice([*entries, "unknown"])
        if random.random() < 0.15:
            entries.pop(key, None)
        else:
            entries[key] = random.choice(HOSTILE_VALUES)(entries.get(key))
        return f"{kind} {key}"
    name = random.choice(list(state))
    if kind == "name":
        new_name = random.choice((f"{name}.x", "", name.upper(), "conv\n0", "body.99999999.weight", 7))
        state[new_name] = state.pop(name)
    elif kind == "structure":
        keys = [key for key in ("state_dict", "ema", "params") if key in content]
        key = random.choice(keys or [name])
        content[key] = random.choice(HOSTILE_VALUES)(3)
    else:
        state[name] = mutate_tensor(state[name], random)
    return f"{kind} {name}"


def mutate_tensor(tensor: torch.Tensor, random: Random) -> Any:
    """Return a tensor of another type, shape or layout, or with other values."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.bool),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.double() * 1e300,
        lambda: tensor * float("nan"),
        lambda: tensor.clone().flatten().index_fill(0, torch.tensor([0]), float("inf")).reshape(tensor.shape),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.new_zeros(0),
        lambda: tensor.new_zeros(()),
        lambda: tensor.new_zeros(1).expand(10**5, 10**5),
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: tensor.to("meta"),
        lambda: tensor.half(),
    )
    return random.choice(changes)()


def write_safetensors(content: dict[str, Any], path: Path, random: Random) -> None:
    """Write the mutated content that safetensors can contain; sometimes with metadata that is not JSON."""
    state = content["state_dict"] if isinstance(content["state_dict"], dict) else {}
    tensors = {}
    for name, value in state.items():
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if dense and value.numel() < 10**8:
            tensors[str(name)] = value.clone(memory_format=torch.contiguous_format)
    text = json.dumps(content["derain"])
    if random.random() < 0.1:
        text = random.choice(("", "[", "[" * 100_000, '{"a":' * 100_000, "5", '"x"', "null", text[:-1], "9" * 5_000))
    safetensors.torch.save_file(tensors, path, {"derain": text})


def mutate_onnx(path: Path, random: Random) -> str:
    """Change metadata, an operator, an input or output, or weights; return a description of the change."""
    model = onnx.load(path)
    graph = model.graph
    kind = random.choice(
        ("metadata", "operator", "name", "shape", "type", "input", "output", "weights", "edge", "loop")
    )
    if kind == "metadata":
        metadata = json.loads(model.metadata_props[0].value)
        entries = random.choice((metadata, metadata["graph"], metadata["hyper_parameters"]))
        key = random.choice(list(entries))
        entries[key] = random.choice(HOSTILE_VALUES)(entries[key])
        onnx.helper.set_model_props(model, {"derain": json.dumps(metadata)})
    elif kind == "operator":
        random.choice(graph.node).op_type = random.choice(("Loop", "If", "Conv", "Range", "Nothing", "Expand"))
    elif kind == "name":
        random.choice((*graph.input, *graph.output)).name = random.choice(("x", "", "rainy", "times"))
    elif kind == "shape":
        dimension = random.choice(random.choice((*graph.input, *graph.output)).type.tensor_type.shape.dim)
        dimension.dim_value = random.choice((1, 3, 64, 10**9, 2**62, -5))
    elif kind == "type":
        random.choice((*graph.input, *graph.output)).type.tensor_type.elem_type = random.choice((0, 7, 8, 10, 11, 99))
    elif kind == "input":
        graph.input.add().CopyFrom(graph.input[0])
        graph.input[-1].name = random.choice(("second", "rainy"))
    elif kind == "output":
        graph.output.add().CopyFrom(graph.output[0])
        graph.output[-1].name = random.choice([name for node in graph.node for name in node.output])
    elif kind == "weights":
        tensor = random.choice(graph.initializer)
        values = onnx.numpy_helper.to_array(tensor).copy()
        tensor.CopyFrom(onnx.numpy_helper.from_array(values * float("nan"), tensor.name))
        if random.random() < 0.5:
            tensor.dims[:] = [10**9, 10**9]
    elif kind == "edge":
        node = random.choice(graph.node)
        node.input[:] = [random.choice(random.choice(graph.node).output) for _ in node.input]
    else:
        limit = onnx.helper.make_tensor("limit", onnx.TensorProto.INT64, [], [10**15])
        graph.initializer.append(limit)
        step = onnx.helper.make_tensor("step", onnx.TensorProto.INT64, [], [1])
        graph.initializer.append(step)
        graph.node.append(onnx.helper.make_node("Range", ["step", "limit", "step"], ["long"]))
        graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("long", onnx.TensorProto.INT64, [None]))
        if random.random() < 0.5:
            del graph.output[-1]
    onnx.save(model, path)
    return f"onnx: {kind}"


def outcome(path: Path, by_restorer: bool) -> str:
    """Load a file; return ``loaded``, ``refused``, or ``refused badly`` (not in one line that names the file)."""
    try:
        if by_restorer:
            Restorer(path, device="cpu")
        else:
            catalog.load(path)
    except DerainError as error:
        message = str(error)
        is_one_line = path.name in message and "\n" not in message and len(message) < 1_500
        return "refused" if is_one_line else f"refused badly: {message}"
    return "loaded"


def run(count: int, seed: int, folder: Path, report: Callable[[Path, str, BaseException], None]) -> dict[str, Any]:
    """Load mutated files.

    Args:
        count: Number of files.
        seed: Seed of all mutations.
        folder: Folder for the files.
        report: Called with the file, its change and the error if a file is neither loaded nor refused.

    Returns:
        ``outcomes``: number of files by outcome; ``slowest``: processor time in seconds and change of the slowest file;
        ``growth``: growth of memory in bytes.
    """
    sources = undamaged_files(folder)
    process = psutil.Process()
    initial_memory = process.memory_info().rss
    peak_memory = 0
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    for number in range(count):
        random = Random(f"{seed} {number}")
        source = sources[number % len(sources)]
        path = folder / f"{number}{source.suffix}"
        change = f"{source.name}, {mutate(source, path, random)}"
        start = time.process_time()
        try:
            result = outcome(path, by_restorer=number % 3 == 0)
            outcomes[result] += 1
            if result.startswith("refused badly"):
                report(path, change, ValueError(result))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcomes["failed"] += 1
            report(path, change, error)
        else:
            path.unlink()
        slowest = max(slowest, (time.process_time() - start, change))
        peak_memory = max(peak_memory, process.memory_info().rss)
    return {"outcomes": dict(outcomes), "slowest": slowest, "growth": peak_memory - initial_memory}


def main() -> None:
    """Load mutated files; print errors and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)

    def report(path: Path, change: str, error: BaseException) -> None:
        print(f"{path} ({change}): {''.join(traceback.format_exception(error)[-3:])}", flush=True)

    start = time.perf_counter()
    figures = run(args.count, args.seed, folder, report)
    print(f"{figures}, {time.perf_counter() - start:.0f} s, failing files in {folder}")


if __name__ == "__main__":
    main()
