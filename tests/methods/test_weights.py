import json
import pickle

import pytest
import safetensors.torch
import torch

from derain.errors import DerainError
from derain.methods import PReNetModule, catalog


@pytest.fixture
def method():
    return PReNetModule(stages=1)


def refused(path, *parts):
    with pytest.raises(DerainError) as caught:
        catalog.load(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("variant", ["PReNet", "PReNet_r", "PRN", "PRN_r"])
def test_authors_state_dicts_are_recognised_by_their_keys(tmp_path, variant):
    original = PReNetModule(variant=variant)
    torch.save(original.network.state_dict(), tmp_path / "net_latest.pth")
    loaded, note = catalog.load(tmp_path / "net_latest.pth")
    assert loaded.hparams.variant == variant
    assert note.startswith("authors' weights of PReNetModule")
    for name, value in original.network.state_dict().items():
        assert torch.equal(value, loaded.network.state_dict()[name])


@pytest.mark.parametrize("wrapped", ["params_ema", "model_state_dict", "model", "net"])
def test_tensors_are_found_where_others_keep_them(tmp_path, wrapped):
    torch.save({wrapped: PReNetModule().network.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    assert isinstance(catalog.load(tmp_path / "w.pth").module, PReNetModule)


def test_published_files_load(authors_weights):
    found = sorted(authors_weights.rglob("*.pth"))
    assert len(found) == 5
    for path in found:
        loaded, _ = catalog.load(path)
        assert loaded.hparams.variant == ("PReNet_r" if path.parent.name.endswith("_r") else "PReNet")


def test_a_checkpoints_average_is_preferred(method, tmp_path):
    average = {name: torch.zeros_like(value) for name, value in method.network.state_dict().items()}
    state = {f"network.{name}": value for name, value in method.network.state_dict().items()}
    torch.save(
        {"derain": method.metadata(), "state_dict": state, "ema": {"network": average}, "epoch": 3},
        tmp_path / "a.ckpt",
    )
    loaded, note = catalog.load(tmp_path / "a.ckpt")
    assert "averaged" in note
    assert all((value == 0).all() for value in loaded.network.state_dict().values())


def test_refusals_say_what_was_found_and_expected(method, tmp_path):
    refused(tmp_path / "absent.pth", "no such file", "expected")
    (tmp_path / "text.pth").write_text("hello, this is no file of weights")
    refused(tmp_path / "text.pth", "damaged", "expected")
    for opcode in "abceorstuRS.(":  # of pickle
        (tmp_path / "letter.pth").write_text(f"{opcode}poch,step,train/loss")
        refused(tmp_path / "letter.pth", "damaged", "expected")
    (tmp_path / "empty.pth").write_bytes(b"")
    refused(tmp_path / "empty.pth", "expected")
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "layer.weight", "expected")
    torch.save({"net": {"layer.weight": torch.zeros(1)}}, tmp_path / "within.pth")
    refused(tmp_path / "within.pth", "layer.weight", "expected")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "list", "expected")
    state = method.network.state_dict()
    state["conv.0.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "misfit.pth")
    refused(tmp_path / "misfit.pth", "expected")


def test_damaged_and_foreign_safetensors_are_refused(method, tmp_path):
    method.save_weights(tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.safetensors", "damaged")
    state = {name: value.contiguous() for name, value in method.network.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "plain.safetensors")
    metadata = json.dumps({"method": "FutureModule", "hyper_parameters": {}})
    safetensors.torch.save_file(state, tmp_path / "new.safetensors", {"derain": metadata})
    refused(tmp_path / "new.safetensors", "FutureModule", "PReNetModule")
    metadata = json.dumps(method.metadata() | {"hyper_parameters": {"variant": "PRN"}})
    safetensors.torch.save_file(state, tmp_path / "wrong.safetensors", {"derain": metadata})
    refused(tmp_path / "wrong.safetensors", "does not fit PReNetModule")


def test_no_file_executes_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    refused(tmp_path / "evil.pth", "expected")
    torch.save({"state_dict": {}, "derain": Evil()}, tmp_path / "evil.ckpt")
    refused(tmp_path / "evil.ckpt", "expected")


def test_an_interrupted_write_leaves_the_old_file(method, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    method.save_weights(str(path))
    before = path.read_bytes()

    def fail(state, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        method.save_weights(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
