import logging
import subprocess
import sys
from pathlib import Path

import pytest

import derain
from derain import cli
from derain.cli import COMMANDS, TRAINER, main


def test_help_lists_every_command_on_one_line_and_imports_nothing_heavy():
    code = "import sys; from derain.cli import main; main(['--help']); " + (
        "print(sorted(set(sys.modules) & {'torch', 'lightning', 'numpy', 'PIL', 'rich', 'jsonargparse'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in (*TRAINER, *COMMANDS):
        assert sum(line.split()[:1] == [command] for line in told.splitlines()) == 1
    assert told.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "start",
    [
        "from derain.cli import main; main(['data', 'list'])",
        "from derain.cli import main; main(['models', 'info'])",
        "import derain.commands.score",
    ],
)
def test_what_needs_no_torch_starts_without(start):
    code = f"import sys; {start}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("variables", "level"),
    [({}, logging.INFO), ({"RANK": "2", "LOCAL_RANK": "0"}, logging.WARNING), ({"SLURM_PROCID": "0"}, logging.INFO)],
)
def test_one_rank_of_all_nodes_speaks(variables, level, monkeypatch):
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
    assert error.startswith("derain: error: no command 'deran'")
    assert error.count("\n") == 1


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fault(arguments):
        raise RuntimeError("a fault")

    from derain.commands import train

    monkeypatch.setattr(train, "run", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["fit"])


def test_ctrl_c_takes_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    from derain.commands import train

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_public_names_load_when_used():
    assert derain.PReNetModule().parameter_count == 168_963
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = derain.Nothing


RAIN800 = str(Path(__file__).parents[1] / "experiments/rain800.yaml")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["restore", "a.jpg"], "the following arguments are required: output; derain restore --help"),
        (["restore", "a.jpg", "b.jpg", "--ensembel"], "--ensembel: no such option; did you mean --ensemble?"),
        (["table", "runs", "--format", "word"], "argument --format: invalid choice: 'word'"),
        (["data", "lisst"], "invalid choice: 'lisst'"),
        (["fit"], "--model: is missing; give it, or a --config FILE that has it"),
        (["fit", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["fit", "--config", RAIN800, "--data.cropp", "3"], "--data.cropp: no such option; did you mean --data.crop?"),
        (["fit", "--config", RAIN800, "--data.crop", "x"], "--data.crop x: must be a whole number"),
        (["fit", "--config", RAIN800, "--data.cache", "x"], "--data.cache x: must be one of auto, ram, disk, off"),
        (["fit", "--config", RAIN800, "--model", "Alien"], "--model Alien: no such class"),
        (["fit", "--config", RAIN800, "--model.dims", "8"], "--model.dims: no such option; did you mean --model.dim?"),
        (["fit", "--config", RAIN800, "--model.dim", "x"], "--model.dim x: must be a whole number"),
        (["restore", "a.jpg", "b.jpg", "c.jpg", "out"], "c.jpg: one argument too many; quote globs, as '*.jpg'"),
        (["caption", "Rain800"], "the following arguments are required: OUT.tsv; derain caption --help"),
        (["predict"], "derain predict: no weights given; add --weights default"),
        (["fit", "--config", RAIN800, "--data", "{crop: x}"], "--data.crop x: must be a whole number"),
        (["fit", "--config", RAIN800, "--model", "derain.nope.Foo"], "--model derain.nope.Foo: no such class"),
        (
            ["fit", "--config", RAIN800, "--model", "json.JSONDecoder"],
            "--model json.JSONDecoder: is no TrainableModule",
        ),
        (["fit", "--config", RAIN800, "--model.nope", "3"], "--model.nope: no such option; derain fit"),
        (["fit", "--config", RAIN800, "--trainer.accelerator", "tpuu"], "--trainer: "),
        (["fit", "--config", RAIN800, "--trainer.max_time", "x"], "--trainer: "),
        (
            ["fit", "--config", RAIN800, "--trainer.callbacks", "EarlyStopping"],
            "EarlyStopping: needs monitor; derain fit",
        ),
        (["test", "--config", RAIN800, "--sampling.stepz", "5"], "--sampling.stepz: no such option; did you mean"),
        (["test", "--config", RAIN800, "--sampling.steps", "x"], "--sampling.steps x: must be a whole number or null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_are_wrong_take_one_line(line, told, capsys):
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("derain: error: ")
    assert told in error


def test_a_broken_configuration_takes_one_line(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("data: [\n")
    (tmp_path / "unknown.yaml").write_text("data: {cropp: 3}\nmodel: PReNetModule\n")
    (tmp_path / "nested.yaml").write_text("model: {class_path: PReNetModule, init_args: {stagess: 3}}\n")
    for name, told in (
        (
            "broken",
            "--config: a file is no YAML: while parsing a flow node",
        ),
        ("unknown", "--data.cropp: no such option; did you mean --data.crop?"),
        ("nested", "--model.stagess: no such option; did you mean --model.stages?"),
    ):
        assert main(["fit", "--config", str(tmp_path / f"{name}.yaml")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
