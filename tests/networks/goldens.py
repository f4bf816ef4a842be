"""Compare networks with recorded outputs of the authors' code (``DERAIN_DATA/../zoo``)."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from derain.images import read_rgb
from derain.methods.prenet.network import PReNet
from derain.metrics import psnr_ssim, resolve
from derain.networks.base import Network, translate_name
from derain.nn.restormer import Restormer

Change = Callable[[Tensor], Tensor]
"""Changes an input or an output between the authors' form and ours, such as ``lambda image: image / 255``."""


def folder() -> Path:
    """Return the folder of the recorded outputs; skip the test if it is absent."""
    data = os.environ.get("DERAIN_DATA")
    found = Path(data).resolve().parent / "zoo" if data else None
    if found is None or not found.is_dir():
        pytest.skip("DERAIN_DATA/../zoo, the recorded outputs of the authors' code, is absent")
    return found


class Golden:
    """Recorded outputs of one system, and its deterministic weights.

    Args:
        name: Name of the file.
    """

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(folder() / f"{name}.npz", allow_pickle=False))
        facts = folder() / f"{name}.json"
        self.facts = json.loads(facts.read_text()) if facts.exists() else {}

    def rows(self) -> Iterator[tuple[str, tuple[int, ...], str, float, str]]:
        """Return name, shape, kind, constant and alias of every tensor of the authors."""
        arrays = self.arrays
        columns = (arrays[name] for name in ("keys", "shapes", "kinds", "consts", "alias_of"))
        for key, shape, kind, constant, alias in zip(*columns, strict=True):
            sides = tuple(int(side) for side in str(shape).split(",")) if str(shape) else ()
            yield str(key), sides, str(kind), float(constant), str(alias)

    def state(self) -> dict[str, Tensor]:
        """Return the authors' state dict, filled by the rule of the package, in float32.

        Buffers that stay at their defaults (kinds ``i`` and ``d``) are left out.
        """
        gain = float(self.arrays["gain"])
        state: dict[str, Tensor] = {}
        for key, shape, kind, constant, alias in self.rows():
            if kind in "id":
                continue
            state[key] = state[alias] if kind == "a" else torch.from_numpy(_filled(key, shape, kind, constant, gain))
        return state

    def shapes(self) -> dict[str, Tensor]:
        """Return the authors' state dict without values: tensors of the device ``meta``, which take no time to fill."""
        return {key: torch.empty(shape, device="meta") for key, shape, kind, _, _ in self.rows() if kind not in "id"}

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the gradient of every tensor of the authors; NaN if it has none."""
        keys = map(str, self.arrays["keys"])
        return dict(zip(keys, map(float, self.arrays["grad_l2_64x64"]), strict=True))

    def sizes(self) -> list[str]:
        """Return the sizes of the recorded outputs, as ``53x75``."""
        names = (name for name in self.arrays if name.startswith("out_") and name.endswith("_f64"))
        return [name.split("_")[1] for name in names]


def _filled(key: str, shape: tuple[int, ...], kind: str, constant: float, gain: float) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if kind == "w":
        return np.asarray(noise * np.float32(gain / math.sqrt(math.prod(shape[1:]))), np.float32)
    if kind == "c":
        return np.asarray(np.float32(constant) + np.float32(0.02) * noise, np.float32)
    if kind == "v":
        return np.asarray(np.float32(1) + np.float32(0.1) * np.abs(noise), np.float32)
    return np.asarray(np.float32(0.02) * noise, np.float32)


def image(size: str) -> Tensor:
    """Return the input of the recorded outputs, float32 ``(1, 3, h, w)`` in [0, 1], channels as the authors' first."""
    height, width = map(int, size.split("x"))
    return torch.from_numpy(np.random.default_rng(0).random((1, 3, height, width)).astype(np.float32))


def load(network: Network, golden: Golden) -> None:
    """Load the authors' weights strictly, by the network's own translation of their names.

    Buffers that the package leaves at their defaults may be missing.
    """
    translated = type(network).translate(golden.state())
    result = network.load_state_dict(translated, strict=False)
    defaults = {name for name, _ in network.named_buffers()}
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= defaults


def published_state(network: Network, golden: Golden) -> dict[str, Tensor]:
    """Return the tensors of a network by the authors' names, such as of a small one to test `Network.options_of`.

    Args:
        network: The network; it may have other shapes and fewer blocks than the recorded one.
        golden: Recorded outputs with all names.
    """
    own, names = network.state_dict(), type(network).published_names
    translated = {key: translate_name(key, names) for key, *_ in golden.rows()}
    state = {key: own[name] for key, name in translated.items() if name in own}
    assert own.keys() == {translated[key] for key in state}
    return state


class ContiguousConvolutions(TorchFunctionMode):
    """Makes the inputs and gradients of grouped convolutions in float64 contiguous.

    PyTorch computes these convolutions group by group, which is several times slower if channels are last.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        options = kwargs or {}
        if func is not torch.conv2d or args[0].dtype != torch.float64 or options.get("groups", 1) == 1:
            return func(*args, **options)
        output = func(args[0].contiguous(), *args[1:], **options)
        if output.requires_grad:
            output.register_hook(Tensor.contiguous)
        return output


def check_outputs(
    network: Network,
    golden: Golden,
    *,
    names: Mapping[str, str] | None = None,
    to_authors: Change = lambda output: output,
    crop: int = 1,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    sizes: Sequence[str] = (),
) -> None:
    """Compare outputs with the recorded ones, in float64 to 1e-9 and in float32 to 1e-5.

    Args:
        network: The network with the recorded weights, in float32.
        golden: Recorded outputs.
        names: Our names of further outputs by the authors' names.
        to_authors: Changes our output to the authors' range, such as ``lambda output: output * 255``.
        crop: The authors crop images around the centre to a multiple of this.
        dtypes: Types to compare; not float32 for networks that select the top k.
        sizes: Sizes to compare; by default all but 64×64, which `check_gradients` compares in float64.
    """
    network.eval()
    for dtype in dtypes:
        network.to(dtype)
        for size in sizes or [size for size in golden.sizes() if size != "64x64"]:
            rainy = _centre(image(size), crop).to(dtype)
            with torch.no_grad(), ContiguousConvolutions():
                outputs = network.outputs(rainy.flip(1) if network.bgr else rainy)
            _compare_outputs(network, outputs, golden, names or {}, to_authors, size)
    network.to(torch.float32)


def check_gradients(
    network: Network,
    golden: Golden,
    *,
    names: Mapping[str, str] | None = None,
    to_authors: Change = lambda output: output,
) -> None:
    """Compare outputs, loss and gradient norms with the recorded ones at 64×64, in float64; norms to 1e-6.

    A tensor of ours that is several of the authors' (aliases) is compared by the sum that the authors recorded for
    each of its names.

    Args:
        network: The network with the recorded weights.
        golden: Recorded outputs.
        names: Our names of further outputs by the authors' names.
        to_authors: Changes our output to the authors' range.
    """
    network.eval().to(torch.float64)
    rainy = image("64x64").to(torch.float64)
    network.zero_grad()
    with ContiguousConvolutions():
        outputs = network.outputs(rainy.flip(1) if network.bgr else rainy)
    _compare_outputs(network, outputs, golden, names or {}, to_authors, "64x64")
    output = outputs["derained"]
    if network.bgr:
        output = output.flip(1)
    output = to_authors(output)
    target = torch.from_numpy(np.random.default_rng(1).random(tuple(output.shape)))
    loss = (output - target).square().mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(golden.arrays["loss_64x64"]), rel=1e-9)
    parameters = dict(network.named_parameters())
    compared = 0
    for theirs, norm in golden.gradient_norms().items():
        name = translate_name(theirs, type(network).published_names)
        if name is None:
            assert math.isnan(norm) or norm == 0, theirs
            continue
        if name not in parameters:
            continue
        gradient = parameters[name].grad
        if math.isnan(norm):
            assert gradient is None or not gradient.any(), theirs
            continue
        assert gradient is not None, theirs
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-6, abs=1e-12), theirs
        compared += 1
    assert compared >= len(parameters) * 0.9
    network.to(torch.float32)


def unused_numbers(network: type[Network], golden: Golden) -> int:
    """Return the number of the authors' parameters that their network does not use and ours does not have."""
    names = network.published_names
    rows = ((key, shape) for key, shape, kind, _, _ in golden.rows() if kind in "wbc")
    return sum(math.prod(shape) for key, shape in rows if translate_name(key, names) is None)


def check_parameters(network: Network, golden: Golden) -> None:
    """Compare the number of parameters, with those that the authors' network does not use, with the measured one."""
    own = sum(parameter.numel() for parameter in network.parameters())
    assert own + unused_numbers(type(network), golden) == golden.facts["measured"]["params"]


def check_recognition(network: type[Network], *own: str) -> None:
    """Check that a network takes the tensors of no other system for its own.

    Args:
        network: Class of the network.
        own: Names of the recorded systems that are this network.
    """
    for name, names in _tensor_names().items():
        if name not in own:
            assert network.options_of(dict.fromkeys(names, torch.empty(0))) is None, name


@functools.cache
def _tensor_names() -> dict[str, list[str]]:
    """Return the names of the tensors of every recorded system, of Restormer and of PReNet."""
    names = {path.stem: [str(key) for key in np.load(path)["keys"]] for path in folder().glob("*.npz")}
    with torch.device("meta"):
        return names | {"Restormer": list(Restormer().state_dict()), "PReNet": list(PReNet().state_dict())}


def check_sizes(network: Network, *sizes: tuple[int, int]) -> None:
    """Check that outputs have the size of the images, are repeatable, and do not depend on the rest of the batch.

    Args:
        network: A small network with random weights.
        sizes: Heights and widths; by default 1×1 and three odd ones.
    """
    network.eval().double()
    for height, width in sizes or ((1, 1), (1, 9), (7, 5), (33, 18)):
        rainy = torch.rand(3, 3, height, width, dtype=torch.float64)
        with torch.no_grad(), ContiguousConvolutions():
            derained, again = network(rainy), network(rainy)
            single = network(rainy[1:2])
        assert derained.shape == rainy.shape
        assert derained.isfinite().all()
        assert torch.equal(derained, again)
        torch.testing.assert_close(single, derained[1:2], rtol=1e-9, atol=1e-9)
    network.float()


def authors_network(network: type[Network], path: str) -> Network:
    """Return a network with the authors' weights; skip the test if they are absent.

    Args:
        network: Class of the network.
        path: Their file in the folder ``weights``, such as ``nledn/Rain100L/net_Rain100L.pth``.
    """
    file = folder() / "weights" / path
    if not file.exists():
        pytest.skip(f"DERAIN_DATA/../zoo/weights/{path}, weights of the authors, is absent")
    state = torch.load(file, map_location="cpu", weights_only=True)
    options = network.options_of(state)
    assert options is not None
    restorer = network(**options)
    restorer.load_state_dict(network.translate(state), strict=True)
    return restorer.eval()


def check_real_image(
    network: nn.Module,
    data: str,
    number: int,
    recorded: Mapping[str, tuple[float, float]],
    *,
    size: tuple[int | None, int | None] = (None, None),
    device: str = "cpu",
) -> None:
    """Restore an image and compare PSNR to 0.002 dB and SSIM to 0.0001 with those of the authors' code.

    Args:
        network: The network with the authors' weights.
        data: ``Rain100L`` or ``Rain100H``.
        number: Number of the image.
        recorded: PSNR and SSIM by protocol.
        size: Height and width of the upper left part to restore; by default the whole image.
        device: Device to restore on.
    """
    files = {
        "Rain100L": (f"rainy/rain-{number:03}.png", f"norain-{number:03}.png"),
        "Rain100H": (f"rain/norain-{number}.png", f"norain/norain-{number}.png"),
    }
    root = Path(os.environ["DERAIN_DATA"]) / data
    rainy, clean = (read_rgb(root / file)[: size[0], : size[1]] for file in files[data])
    with torch.no_grad():
        tensor = torch.from_numpy(rainy.astype(np.float32).transpose(2, 0, 1) / 255)[None]
        derained = network.to(device)(tensor.to(device)).cpu()
    pixels = derained[0].clamp(0, 1).permute(1, 2, 0).double().numpy()
    for protocol, (psnr, ssim) in recorded.items():
        scores = psnr_ssim(pixels, clean, resolve([protocol])[0])
        assert scores == (pytest.approx(psnr, abs=0.002), pytest.approx(ssim, abs=1e-4)), protocol


def _compare_outputs(
    network: Network,
    outputs: Mapping[str, Tensor],
    golden: Golden,
    names: Mapping[str, str],
    to_authors: Change,
    size: str,
) -> None:
    for theirs, ours in {"out": "derained", **names}.items():
        output = outputs[ours].detach()
        recorded = _recorded(golden, theirs, size, output.dtype)
        if network.bgr and output.shape[1] == 3:
            output = output.flip(1)
        _compare(to_authors(output), recorded, f"{theirs} {size} {output.dtype}")


def _recorded(golden: Golden, name: str, size: str, dtype: torch.dtype) -> Tensor:
    key = f"{name}_{size}"
    if dtype == torch.float64:
        key = f"{key}_f64" if f"{key}_f64" in golden.arrays else key
    return torch.from_numpy(golden.arrays[key])


def _compare(output: Tensor, recorded: Tensor, label: str) -> None:
    assert output.shape == recorded.shape, label
    exact = output.dtype == recorded.dtype == torch.float64
    scale = float(recorded.std()) if exact else float(recorded.abs().max())
    difference = float((output.double() - recorded.double()).abs().max())
    assert difference <= (1e-9 if exact else 1e-5) * scale, f"{label}: {difference:.2g} of {scale:.3g}"


def _centre(rainy: Tensor, multiple: int) -> Tensor:
    height, width = rainy.shape[2:]
    top, left = height % multiple // 2, width % multiple // 2
    return rainy[..., top : top + height - height % multiple, left : left + width - width % multiple]
