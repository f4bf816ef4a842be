from derain.cli import main
from derain.methods import weights
from derain.models import in_the_box


def test_list_tells_what_each_holds(capsys):
    assert main(["models", "list"]) == 0
    told = capsys.readouterr().out
    for name, file in in_the_box().items():
        module = weights.load(file).module
        assert name in told
        assert f"{module.parameter_count:,}" in told
        assert type(module).__name__ in told


def test_every_model_in_the_box_is_small_and_has_a_card(capsys):
    assert "default" in in_the_box()
    for name, file in in_the_box().items():
        assert file.stat().st_size <= 8e6
        assert main(["models", "info", name]) == 0
        card = capsys.readouterr().out
        for part in ("Data", "terms", "Budget", "Results", "matlab-y", "Limits"):
            assert part in card
    assert main(["models", "info"]) == 0


def test_an_unknown_name_takes_one_line(capsys):
    assert main(["models", "info", "best"]) == 2
    assert capsys.readouterr().err.strip() == "derain: error: no model 'best' in the box; known are default"
