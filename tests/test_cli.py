import logging
import subprocess
import sys
from pathlib import Path

import pytest

import derain
from derain import cli
from derain.cli import COMMANDS, TRAINER_COMMANDS, main
from derain.methods.registry import BUILT_IN


def test_help_has_one_line_a_command_and_imports_nothing_heavy():
    code = "import sys; from derain.cli import main; main(['--help']); " + (
        "print(sorted(set(sys.modules) & {'torch', 'lightning', 'numpy', 'PIL', 'rich', 'inspect', 'jsonargparse'}))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    for command in (*TRAINER_COMMANDS, *COMMANDS):
        assert sum(line.split()[:1] == [command] for line in lines) == 1
    assert lines[-1] == "[]"


@pytest.mark.parametrize(
    "start",
    [
        "from derain.cli import main; main(['data', 'list'])",
        "from derain.cli import main; main(['models', 'info'])",
        "import derain.commands.score",
    ],
)
def test_commands_without_networks_do_not_import_torch(start):
    code = f"import sys; {start}; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("variables", "level"),
    [({}, logging.INFO), ({"RANK": "2", "LOCAL_RANK": "0"}, logging.WARNING), ({"SLURM_PROCID": "0"}, logging.INFO)],
)
def test_only_the_first_rank_logs_messages(variables, level, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert logging.getLogger("derain").level == level


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == derain.__version__


def test_bad_input_gives_one_line_and_code_2(capsys):
    assert main(["deran"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("derain: error: ")
    assert "deran" in error
    assert error.count("\n") == 1


def test_other_exceptions_are_not_caught(monkeypatch):
    def fail(arguments):
        raise RuntimeError("a fault")

    from derain.commands import train

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["fit"])


def test_ctrl_c_gives_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    from derain.commands import train

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_public_names_are_imported_when_used():
    assert derain.PReNetModule().parameter_count == 168_963
    for name in derain.__all__:
        assert getattr(derain, name) is not None
    assert {path.rpartition(".")[2] for path in BUILT_IN} <= set(derain.__all__)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = derain.Nothing


RAIN800 = str(Path(__file__).parents[1] / "experiments/rain800.yaml")


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (["restore", "a.jpg"], ["out", "derain restore --help"]),
        (["restore", "a.jpg", "b.jpg", "--ensembel"], ["--ensembel:", "--ensemble?"]),
        (["table", "runs", "--format", "word"], ["--format", "'word'"]),
        (["data", "lisst"], ["lisst", "synthesize"]),
        (["data"], ["SUBCOMMAND", "list", "synthesize"]),
        (["restore", "a.jpg", "b.jpg", "--json"], ["--json: no such option;"]),
        (["score", "a", "b", "--output", "c"], ["--output:", "--out?"]),
        (["data", "list", "--json"], ["--json:", "--format json?"]),
        (["caption", "a", "b", "--max_tokens", "3"], ["--max_tokens:", "--max-tokens?"]),
        (["bench", "--size", "x"], ["--size", "'x'"]),
        (["fit"], ["--model", "--config"]),
        (["fit", "--config", "absent.yaml"], ["absent.yaml"]),
        (["fit", "--config", RAIN800, "--data.cropp", "3"], ["--data.cropp:", "--data.crop?"]),
        (["fit", "--config", RAIN800, "--data.crop", "x"], ["--data.crop x", "whole number"]),
        (["fit", "--config", RAIN800, "--data.cache", "x"], ["--data.cache x", "auto, ram, disk, off"]),
        (["fit", "--config", RAIN800, "--model", "Alien"], ["--model Alien"]),
        (["fit", "--config", RAIN800, "--model.dims", "8"], ["--model.dims:", "--model.dim?"]),
        (["fit", "--config", RAIN800, "--model.dim", "x"], ["--model.dim x", "whole number"]),
        (["restore", "a.jpg", "b.jpg", "c.jpg", "out"], ["c.jpg", "'*.jpg'"]),
        (["caption", "Rain800"], ["out", "derain caption --help"]),
        (["predict"], ["derain predict", "--weights default"]),
        (["fit", "--config", RAIN800, "--data", "{crop: x}"], ["--data.crop x", "whole number"]),
        (["fit", "--config", RAIN800, "--model", "derain.nope.Foo"], ["--model derain.nope.Foo"]),
        (
            ["fit", "--config", RAIN800, "--model", "json.JSONDecoder"],
            ["--model json.JSONDecoder", "TrainableModule"],
        ),
        (["fit", "--config", RAIN800, "--model.nope", "3"], ["--model.nope:"]),
        (["fit", "--config", RAIN800, "--trainer.accelerator", "tpuu"], ["--trainer: "]),
        (["fit", "--config", RAIN800, "--trainer.max_time", "x"], ["--trainer: "]),
        (
            ["fit", "--config", RAIN800, "--trainer.callbacks", "EarlyStopping"],
            ["EarlyStopping", "monitor"],
        ),
        (["test", "--config", RAIN800, "--sampling.stepz", "5"], ["--sampling.stepz:", "--sampling.steps?"]),
        (["test", "--config", RAIN800, "--sampling.steps", "x"], ["--sampling.steps x", "whole number", "null"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_give_one_line(line, values, capsys):
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("derain: error: ")
    for value in values:
        assert value in error


def test_a_broken_configuration_gives_one_line(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("data: [\n")
    (tmp_path / "unknown.yaml").write_text("data: {cropp: 3}\nmodel: PReNetModule\n")
    (tmp_path / "nested.yaml").write_text("model: {class_path: PReNetModule, init_args: {stagess: 3}}\n")
    for name, values in (
        (
            "broken",
            ["--config", "while parsing a flow node"],
        ),
        ("unknown", ["--data.cropp:", "--data.crop?"]),
        ("nested", ["--model.stagess:", "--model.stages?"]),
    ):
        assert main(["fit", "--config", str(tmp_path / f"{name}.yaml")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for value in values:
            assert value in error
