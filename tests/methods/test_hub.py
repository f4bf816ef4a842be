import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from derain import DerainModule, PReNetModule, RestormerModule
from derain.cli import main
from derain.errors import DerainError
from derain.files.hub import fetch_weights
from derain.files.weights import sha256
from derain.methods import catalog
from derain.models import bundled


def tiny():
    torch.manual_seed(0)
    return PReNetModule(stages=1)


def test_what_is_saved_comes_back(tmp_path):
    module = tiny()
    module.trained_on = ("Rain800",)
    module.save_pretrained(tmp_path / "saved")
    for kind in (PReNetModule, DerainModule):
        again = kind.from_pretrained(str(tmp_path / "saved"))
        assert isinstance(again, PReNetModule)
        assert again.trained_on == ("Rain800",)
        assert not again.training
        for name, value in module.network.state_dict().items():
            assert torch.equal(again.network.state_dict()[name], value)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["stages"] == 1
    with pytest.raises(DerainError, match="RestormerModule"):
        RestormerModule.from_pretrained(str(tmp_path / "saved"))


def test_pushing_sends_weights_and_card(monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **options):
            sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    tiny().push_to_hub("someone/prenet")
    assert {"model.safetensors", "README.md", "config.json"} <= set(sent)
    assert b"derain" in sent["README.md"]


def hub(monkeypatch, tmp_path, files):
    """A hub that has a repository with these files, none of which is here yet."""
    tiny().save_pretrained(tmp_path / "saved")
    asked = []

    def download(repo_id, filename, local_files_only=False, **options):
        asked.append(options)
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path / "saved" / filename)

    class Api:
        def __init__(self, token=None):
            pass

        def model_info(self, name, revision, files_metadata):
            found = [type("File", (), {"rfilename": file, "size": 700_000})() for file in files]
            return type("Info", (), {"siblings": found})()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return asked


def test_weights_of_the_hub_are_fetched_with_a_word_about_it(monkeypatch, tmp_path, caplog):
    hub(monkeypatch, tmp_path, ["model.safetensors"])
    caplog.set_level("INFO", "derain")
    file = catalog.locate("hub:someone/prenet")
    assert isinstance(catalog.load(file).module, PReNetModule)
    for part in ("someone/prenet", "0.7 MB", "from https://"):
        assert part in caplog.text


def test_a_revision_is_asked_for(monkeypatch, tmp_path):
    asked = hub(monkeypatch, tmp_path, ["model.safetensors"])
    assert isinstance(PReNetModule.from_pretrained("someone/prenet", revision="v1"), PReNetModule)
    assert [options["revision"] for options in asked] == ["v1", "v1"]
    with pytest.raises(TypeError, match="strict"):
        PReNetModule.from_pretrained("someone/prenet", strict=False)


def test_a_repository_without_weights_is_refused(monkeypatch, tmp_path):
    hub(monkeypatch, tmp_path, ["pytorch_model.bin"])
    with pytest.raises(DerainError, match=r"model\.safetensors"):
        catalog.locate("hub:someone/other")


@pytest.mark.parametrize("name", ["hub:a/b/c", "hub:some/one"])
def test_unavailable_weights_are_reported_in_one_line(monkeypatch, name):
    def absent(self, *arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", absent)
    with pytest.raises(DerainError, match=name) as caught:
        catalog.locate(name)
    assert "\n" not in str(caught.value)


def test_bundled_names_come_before_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").write_text("mine")
    assert catalog.locate("default") == bundled()["default"]
    assert catalog.locate("./default").read_text() == "mine"


def test_public_models_are_fetched_after_a_word_about_size_source_and_licence(monkeypatch, tmp_path, caplog):
    asked = hub(monkeypatch, tmp_path, ["clearview-derain-nafnet.pth"])
    caplog.set_level("INFO", "derain")
    for name in ("clearview-nafnet", "hub:dronefreak/clearview-derain-nafnet"):
        assert catalog.locate(name).name == "clearview-derain-nafnet.pth"
    assert len(asked) == 4
    for part in ("clearview-derain-nafnet", "0.7 MB", "Apache-2.0", "from https://"):
        assert part in caplog.text


def test_public_files_with_another_hash_are_refused(monkeypatch, tmp_path):
    hub(monkeypatch, tmp_path, ["model.safetensors"])
    digest = sha256(catalog.locate("hub:someone/prenet"))
    assert fetch_weights("someone/prenet", sha256=digest).is_file()
    with pytest.raises(DerainError, match=f"{digest}; expected 1234"):
        fetch_weights("someone/prenet", sha256="1234")


def test_public_models_are_listed_and_shown(capsys):
    assert main(["models", "list", "--all"]) == 0
    assert "clearview-restormer" in capsys.readouterr().out
    assert main(["models", "info", "clearview-restormer"]) == 0
    shown = capsys.readouterr().out
    for part in ("Apache-2.0", "RealRain-1k-L: 42.35", "dronefreak/clearview-derain-restormer"):
        assert part in shown
    assert main(["models", "info", "absent"]) == 2
    assert "clearview-nafnet" in capsys.readouterr().err
