import threading
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from derain import batching
from derain.batching import Scheduler, on_threads, repeat
from derain.errors import DerainError
from derain.methods import CLIPRPNModule, DACLIPSDEModule, PReNetModule
from derain.methods.interfaces import Sampling
from derain.restoration import Restorer


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return PReNetModule(stages=1, variant="PRN")


def restorer_of(method, stacks, **options):
    restorer = Restorer(method, device="cpu", **options)
    restorer.scheduler.stacks, restorer.scheduler.threads = stacks, 2
    return restorer


def images(count, height=64, width=70):
    return list(np.random.default_rng(0).random((count, height, width, 3), np.float32))


def record_passes(restorer, monkeypatch, limit=None):
    """Record the shape of each pass and its thread; passes with more than ``limit`` pixels run out of memory."""
    passes, run = [], restorer.scheduler._forward

    def forward(tiles, *arguments):
        passes.append((tuple(tiles.shape), threading.get_ident()))
        if limit is not None and tiles.numel() // 3 > limit:
            raise torch.OutOfMemoryError("out of memory")
        return run(tiles, *arguments)

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    return passes


def modules():
    torch.manual_seed(0)
    routed = CLIPRPNModule(perception="none", dim=8, blocks=(1, 1, 1, 1), refinement=1)
    sampled = DACLIPSDEModule("none", channels=16, multipliers=(1, 2), attention="none", sde_steps=4)
    return {"routed": routed, "sampled": sampled}


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize("kind", ["routed", "sampled"])
@pytest.mark.parametrize("options", [{}, {"tile": 64, "overlap": 16}, {"ensemble": True}])
@pytest.mark.slow
def test_several_images_equal_single_ones(kind, stacks, options):
    module = modules()[kind]
    if kind == "sampled":
        options = options | {"sampling": Sampling(steps=2, seed=3)}
    batch = images(3, 64, 96)
    expected = [Restorer(module, device="cpu", **options)(image) for image in batch]
    restored = restorer_of(module, stacks, **options)(batch)
    for actual, single in zip(restored, expected, strict=True):
        np.testing.assert_allclose(actual, single, atol=1e-5 if kind == "sampled" else 1e-6)  # steps amplify rounding


def test_routes_of_a_batch_are_those_of_its_images(monkeypatch):
    """Each image is encoded once, and its route also holds for its tiles."""
    module = CLIPRPNModule(perception="fixed", route=0, dim=8, blocks=(1, 1, 1, 1), refinement=1)
    encoded = []

    def encode(rainy):
        encoded.append(len(rainy))
        return {"routes": [round(float(image.mean())) for image in rainy]}

    def forward(rainy, routes):
        return rainy * 0 + torch.tensor([0.2, 0.7])[list(routes)].view(-1, 1, 1, 1)

    monkeypatch.setattr(module, "encode", encode)
    monkeypatch.setattr(module, "forward", forward)
    restorer = restorer_of(module, True, tile=64)
    values = [0.9, 0.1, 0.8]
    restored = restorer([np.full((64, 150, 3), value, np.float32) for value in values])
    assert [round(float(image.mean()), 3) for image in restored] == [0.7, 0.2, 0.7]
    assert encoded == [3]


def test_equal_sizes_share_a_pass_and_keep_their_order(method, monkeypatch):
    restorer = restorer_of(method, True)
    passes = record_passes(restorer, monkeypatch)
    mixed = [*images(2), *images(1, 65, 64), *images(1)]
    restored = restorer(mixed)
    assert sorted(shape for shape, _ in passes) == [(1, 3, 65, 64), (3, 3, 64, 70)]
    for actual, image in zip(restored, mixed, strict=True):
        np.testing.assert_allclose(actual, Restorer(method, device="cpu")(image), atol=1e-6)


def test_batches_follow_memory(method, monkeypatch):
    monkeypatch.setattr(batching, "memory_for", lambda device: 2 * 3 * 64 * 70 * method.bytes_per_pixel)
    restorer = restorer_of(method, True)
    passes = record_passes(restorer, monkeypatch)
    restorer(images(7))
    assert [shape[0] for shape, _ in passes] == [3, 3, 1]
    assert restorer.scheduler.images_at_once(64, 70) == 3


def test_out_of_memory_halves_the_batch_before_the_tile(method, monkeypatch, caplog):
    restorer = restorer_of(method, True)
    passes = record_passes(restorer, monkeypatch, limit=2 * 64 * 70)
    batch = images(5)
    restored = restorer(batch)
    assert [shape[0] for shape, _ in passes] == [5, 2, 2, 1]
    assert {shape[2:] for shape, _ in passes} == {(64, 70)}  # no tiles
    np.testing.assert_allclose(restored[4], Restorer(method, device="cpu")(batch[4]), atol=1e-6)
    passes.clear()
    restorer(batch)
    assert [shape[0] for shape, _ in passes] == [2, 2, 1]  # remembered
    assert sum("out of memory" in record.message for record in caplog.records) == 1


def test_out_of_memory_reduces_tiles_at_once_then_their_side(method, monkeypatch):
    restorer = restorer_of(method, True, tile=128, overlap=0)
    passes = record_passes(restorer, monkeypatch, limit=64 * 64)
    image = images(1, 128, 256)[0]
    restored = restorer(image)
    assert [shape[0] for shape, _ in passes[:2]] == [2, 1]
    assert {shape for shape, _ in passes[2:]} == {(1, 3, 64, 64)}
    assert restored.shape == image.shape


def test_threads_restore_an_image_each(method, monkeypatch):
    restorer = restorer_of(method, False)
    passes = record_passes(restorer, monkeypatch)
    batch, threads = images(4), torch.get_num_threads()
    restored = restorer(batch)
    assert {shape for shape, _ in passes} == {(1, 3, 64, 70)}
    assert passes[0][1] == threading.get_ident()  # the first image shows whether threads are possible
    assert threading.get_ident() not in {thread for _, thread in passes[1:]}
    assert torch.get_num_threads() == threads
    for actual, image in zip(restored, batch, strict=True):
        np.testing.assert_allclose(actual, Restorer(method, device="cpu")(image), atol=1e-6)


def test_out_of_memory_on_threads_falls_back_to_single_images(method, monkeypatch):
    restorer = restorer_of(method, False)
    run, main = restorer.scheduler._forward, threading.get_ident()

    def forward(*arguments):
        if threading.get_ident() != main:
            raise MemoryError
        return run(*arguments)

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    batch = images(3)
    for actual, image in zip(restorer(batch), batch, strict=True):
        np.testing.assert_allclose(actual, Restorer(method, device="cpu")(image), atol=1e-6)
    assert restorer.scheduler.images_at_once(64, 70) == 1


def test_errors_hold_no_tensors_of_the_failed_pass(method, monkeypatch):
    restorer, tensors = restorer_of(method, True, tile=None), []

    def forward(rainy):
        tensors.append(weakref.ref(rainy))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(method, "forward", forward)
    (error,) = restorer.restore_each(images(1), ["a"])
    assert isinstance(error, DerainError)
    assert [tensor() for tensor in tensors] == [None]


def test_out_of_memory_outside_the_network_is_an_error_of_the_image(method, monkeypatch):
    """Copies of a batch that do not fit halve it; those of an image fail this image only."""
    batch = images(4)
    batch[2][:] = 1

    def to_unit(tensors):
        if len(tensors) > 2 or (tensors == 1).flatten(1).all(1).any():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return tensors

    monkeypatch.setattr(batching, "to_unit", to_unit)
    for stacks in (True, False):
        results = restorer_of(method, stacks).restore_each(batch, list("abcd"))
        assert [isinstance(result, DerainError) for result in results] == [False, False, True, False]


@pytest.mark.parametrize("state", ["attribute", "list", "buffer"])
def test_methods_that_keep_state_are_not_run_on_threads(state, monkeypatch):
    module = PReNetModule(stages=1, variant="PRN")
    module.network.register_buffer("mean", torch.zeros(()))
    module.network.seen = []

    def forward(rainy):
        if state == "attribute":
            module.network.mask = rainy.mean()
        elif state == "list":
            module.network.seen.append(0)
        else:
            module.network.mean.copy_(rainy.mean())
        return rainy

    monkeypatch.setattr(module, "forward", forward)
    restorer = restorer_of(module, False)
    passes = record_passes(restorer, monkeypatch)
    restorer(images(3))
    assert {thread for _, thread in passes} == {threading.get_ident()}


@pytest.mark.parametrize("stacks", [True, False])
def test_an_image_that_fails_is_named_and_the_others_are_restored(method, monkeypatch, stacks):
    batch = images(4)
    batch[2][:] = 1
    monkeypatch.setattr(method, "forward", lambda rainy: torch.where(rainy == 1, np.nan, rainy))
    restorer = restorer_of(method, stacks)
    names = [f"{index}.png" for index in range(4)]
    results = restorer.restore_each(batch, names)
    assert isinstance(results[2], DerainError)
    assert "2.png" in str(results[2])
    for index in (0, 1, 3):
        np.testing.assert_allclose(results[index], batch[index])
    with pytest.raises(DerainError, match=r"scene 2"):
        restorer(batch, name="scene")


def test_an_image_that_the_method_refuses_does_not_fail_its_batch(method, monkeypatch):
    batch = images(3)
    batch[1][:] = 1

    def forward(rainy):
        if (rainy == 1).flatten(1).all(1).any():
            raise DerainError("too bright")
        return rainy

    monkeypatch.setattr(method, "forward", forward)
    results = restorer_of(method, True).restore_each(batch, ["a", "b", "c"])
    assert [isinstance(result, DerainError) for result in results] == [False, True, False]


def test_images_of_different_types_are_not_mixed(method):
    restorer = restorer_of(method, True)
    pixels = (images(1)[0] * 255).astype(np.uint8)
    floats = images(1)[0]
    restored = restorer([pixels, floats, pixels])
    assert [image.dtype for image in restored] == [np.uint8, np.float32, np.uint8]
    np.testing.assert_array_equal(restored[0], Restorer(method, device="cpu")(pixels))


def test_conditions_are_repeated_for_each_image():
    values = torch.tensor([[1.0], [2.0]])
    repeated = repeat({"vector": values, "routes": (0, 1), "none": None}, 2, 2)
    assert repeated["vector"].flatten().tolist() == [1, 2, 1, 2]
    assert repeated["routes"] == [0, 1, 0, 1]
    assert repeat({"vector": values}, 3, 2) is None
    assert repeat({"shared": object()}, 2, 2) is None


def test_threads_stop_at_an_exception():
    done = []

    def fail(item):
        done.append(item)
        if item == 1:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        list(on_threads(fail, range(1000), 2))
    assert len(done) < 1000


def test_interrupted_threads_leave_their_items():
    started, stop, left = threading.Event(), threading.Event(), []

    def function(item):
        if item == 0:
            started.wait(20)
            raise KeyError(item)
        started.set()
        left.append(stop.wait(20))

    with pytest.raises(KeyError):
        list(on_threads(function, range(2), 2, stop))
    assert left == [True]
    assert not stop.is_set()


def test_a_stopped_scheduler_starts_no_pass(method):
    restorer = restorer_of(method, False)
    restorer.scheduler._stop.set()
    with pytest.raises(CancelledError):
        restorer(images(1)[0])


def test_few_images_share_the_threads(method, monkeypatch):
    """Of three images on two threads, the last one uses both."""
    restorer, threads = restorer_of(method, False), torch.get_num_threads()
    restorer.scheduler._stateless = True
    used, run = [], restorer.scheduler._forward

    def forward(*arguments):
        used.append(torch.get_num_threads())
        return run(*arguments)

    monkeypatch.setattr(restorer.scheduler, "_forward", forward)
    torch.set_num_threads(2)
    try:
        restorer(images(3))
    finally:
        torch.set_num_threads(threads)
    assert used == [1, 1, 2]


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_restored_there(method):
    batch = torch.rand(5, 3, 64, 70)
    restorer = Restorer(method, device="cuda")
    restored = restorer(batch.cuda())
    assert restored.is_cuda
    torch.testing.assert_close(restored.cpu(), Restorer(method, device="cpu")(batch), atol=1e-4, rtol=0)


def test_a_scheduler_stacks_on_gpus(method):
    assert Scheduler(method, torch.device("cuda"), "float32", None, 0, False).stacks
    assert not Scheduler(method, torch.device("cpu"), "float32", None, 0, False).stacks
