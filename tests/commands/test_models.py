import numpy as np
import pytest

from derain import Restorer
from derain.cli import main
from derain.data.pairs import find_pairs
from derain.data.rain import PRESETS, add_rain, sample_rain
from derain.methods import catalog
from derain.metrics import psnr_ssim, resolve
from derain.models import bundled
from tests.factories import photo


def test_list_has_every_bundled_model(capsys):
    assert main(["models", "list"]) == 0
    table = capsys.readouterr().out
    for name, file in bundled().items():
        module = catalog.load(file).module
        assert name in table
        assert f"{module.parameter_count:,}" in table
        assert module.title in table


def test_bundled_models_are_small_and_have_a_card(capsys):
    assert "default" in bundled()
    for name, file in bundled().items():
        assert file.stat().st_size <= 8e6
        assert main(["models", "info", name]) == 0
        card = capsys.readouterr().out
        for part in ("Data", "terms", "Training", "Results", "matlab-y", "Limits"):
            assert part in card
    assert main(["models", "info"]) == 0


def test_an_unknown_name_is_refused(capsys):
    assert main(["models", "info", "best"]) == 2
    error = capsys.readouterr().err
    assert "'best'" in error
    assert error.count("\n") == 1


def gains(pairs):
    """Return the gain in PSNR (dB, ``matlab-y``) of the default model on each pair."""
    (protocol,) = resolve(["matlab-y"])
    restorer = Restorer(device="cpu")
    return [
        psnr_ssim(restorer(rainy), clean, protocol)[0] - psnr_ssim(rainy, clean, protocol)[0] for rainy, clean in pairs
    ]


def test_the_default_removes_synthetic_rain():
    clean, rng = photo("chelsea")[20:220, 60:300], np.random.default_rng(0)
    (gain,) = gains([(add_rain(clean, sample_rain(*PRESETS["medium"], rng), rng), clean)])
    assert gain > 8


def test_the_default_keeps_a_clean_photo():
    clean = photo("chelsea")[20:220, 60:300]
    (protocol,) = resolve(["matlab-y"])
    assert psnr_ssim(Restorer(device="cpu")(clean), clean, protocol)[0] > 45


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("Rain800", 3), ("Rain100L", 5), ("Rain100H", 8)])
def test_the_default_is_as_good_as_its_card_says(name, least, real_data):
    """Parts of every tenth test image; the mean gains are 4.4, 6.8 and 11.1 dB."""
    pairs = find_pairs(name, "test", data_root=real_data).pairs[::10]
    found = gains([image[:200, :200] for image in pair.read()[:2]] for pair in pairs)
    assert len(found) == 10
    assert np.mean(found) > least
    assert min(found) > -3.5
