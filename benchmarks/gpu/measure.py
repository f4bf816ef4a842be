"""Times, peak memory, and the share of the roofline that a computation reaches."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 5
"""Maximum number of timed rounds of a measurement on a GPU; there are fewer if they take more than ``SECONDS``."""

SECONDS = 4.0
"""Seconds after which no further round of a measurement begins."""


@dataclass(frozen=True)
class Setting:
    """Arithmetic of a measurement.

    Attributes:
        name: Name in the tables.
        tf32: Whether float32 products are computed in TF32.
        bf16: Whether products are computed in bfloat16, by autocast.
        compiled: Whether the network is compiled.
    """

    name: str
    tf32: bool = True
    bf16: bool = False
    compiled: bool = False

    @property
    def precision(self) -> str:
        """Value of ``Restorer``'s argument ``precision``."""
        return "bf16" if self.bf16 else "float32"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Switch TF32 on or off within the block."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


FLOAT32, TF32, BF16 = Setting("float32", tf32=False), Setting("TF32"), Setting("bf16", bf16=True)
COMPILED = Setting("bf16, compiled", bf16=True, compiled=True)


class Work(FlopCounterMode):
    """Records the work of every operator: its floating-point operations, and the bytes that it reads and writes.

    Attributes:
        operators: ``(dtype, operations, bytes)`` of each operator, without views and allocations.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.operators: list[tuple[torch.dtype, int, int]] = []

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        inputs = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = {id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        name = func_packet.__name__
        storages = {leaf.untyped_storage().data_ptr() for leaf in inputs.values()}
        shares = any(leaf.untyped_storage().data_ptr() in storages for leaf in outputs.values())
        is_view = shares and not name.endswith("_")
        if outputs and not is_view and not name.startswith(("empty", "new_empty")):
            flops = 0
            if func_packet in self.flop_registry:
                flops = self.flop_registry[func_packet](*args, **kwargs, out_val=out)
            size = sum(_bytes(leaf) for leaf in (inputs | outputs).values())
            self.operators.append((next(iter(outputs.values())).dtype, flops, size))
        return super()._count_flops(func_packet, out, args, kwargs)

    def least_seconds(self, peaks: Mapping[str, float], setting: Setting) -> float:
        """Return the minimum seconds for the recorded operators, one after another, on a device with measured peaks.

        Args:
            peaks: Result of the item ``device``: ``copy`` in bytes per second; ``float32``, ``TF32`` and ``bf16`` in
                operations per second.
            setting: Arithmetic; its ``tf32`` selects the rate of float32 products.
        """
        float32 = peaks["TF32" if setting.tf32 else "float32"]
        seconds = 0.0
        for dtype, flops, size in self.operators:
            peak = peaks["bf16"] if dtype in {torch.bfloat16, torch.float16} else float32
            seconds += max(flops / peak, size / peaks["copy"])
        return seconds


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, each counted once: expanded tensors repeat some."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; on a CPU, return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak memory of a GPU in GiB since the last call of this function; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def median_seconds(run: Callable[[], object], device: torch.device, limit: float = SECONDS) -> float:
    """Return the median seconds of a computation that has been warmed up; no round begins after ``limit`` seconds."""
    times: list[float] = []
    rounds = 1 if device.type == "cpu" else ROUNDS  # on a CPU, the items are only tested
    while len(times) < rounds and sum(times) < limit:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    run: Callable[[], object],
    device: torch.device,
    setting: Setting,
    peaks: Mapping[str, float],
    work: Work | None = None,
) -> tuple[dict[str, Any], Work]:
    """Time a computation.

    Args:
        run: The computation.
        device: Device that it uses.
        setting: Arithmetic. Only its choice of TF32 is applied here; ``run`` itself applies bfloat16.
        peaks: Peaks of the device, for the roofline.
        work: Work of the same computation without compilation; if None, it is counted in an additional first call.

    Returns:
        A row of the table (seconds, share of the roofline, peak memory in GiB, and for compiled networks the seconds of
        the first call); and the work.
    """
    with setting.applied():
        if work is None:
            with Work() as work:
                run()
        start = time.perf_counter()
        run()  # compiles, and chooses kernels
        synchronize(device)
        first = time.perf_counter() - start
        peak_gib(device)
        seconds = median_seconds(run, device)
    row: dict[str, Any] = {"seconds": seconds, "share of roofline": work.least_seconds(peaks, setting) / seconds}
    row["peak GiB"] = peak_gib(device)
    if setting.compiled:
        row["first call (s)"] = first
    return row, work
