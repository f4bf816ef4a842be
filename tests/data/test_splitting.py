from pathlib import Path

from derain.data.pairs import Pair
from derain.data.splitting import hold_out


def test_photos_of_held_out_images_neither_train_nor_validate(caplog):
    caplog.set_level("INFO", "derain")
    names = [f"{index}.png" for index in range(4)]
    pairs = [Pair(name, Path("rainy", name), Path("clean", name)) for name in names]
    photos = [Pair(f"photo/{name}", Path("clean", name), Path("clean", name)) for name in names]
    training, validation = hold_out([*pairs, *photos], 0.25, seed=0)
    (held_out,) = validation
    assert held_out in pairs
    assert list(training) == [pair for pair in (*pairs, *photos) if pair.clean != held_out.clean]
    assert "--data.train" in caplog.text


def test_sets_without_validation_pairs_are_named(caplog):
    caplog.set_level("INFO", "derain")
    pairs = [
        Pair(f"{name}/{index}", Path(name, "rainy", str(index)), Path(name, "clean", str(index)), data_set=name)
        for name, count in (("large", 200), ("small", 2))
        for index in range(count)
    ]
    _, validation = hold_out(pairs, 0.02, seed=0)
    assert {pair.data_set for pair in validation} == {"large"}
    assert "small" in caplog.text
    caplog.clear()
    _, validation = hold_out(pairs, 0.9, seed=0)
    assert {pair.data_set for pair in validation} == {"large", "small"}
    assert not caplog.text
