import logging
import subprocess
import sys

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


def test_public_names_load_when_used():
    assert derain.PReNetModule().parameter_count == 168_963
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = derain.Nothing
