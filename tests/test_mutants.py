"""The planted faults of ``make mutants`` can be planted, and the script distinguishes caught faults from survivors."""

from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, SURVIVORS, Mutant, UsageError, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_can_be_planted(mutant):
    text = (ROOT / "derain" / mutant.file).read_text(encoding="utf-8")
    assert planted(text, mutant) != text
    assert all((ROOT / "tests" / file.partition("::")[0]).is_file() for file in mutant.tests)


def test_there_are_enough_faults():
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert set(SURVIVORS) <= {mutant.name for mutant in MUTANTS}


@pytest.mark.parametrize("text", ["a = 2", "a = 1; b = 1"])
def test_an_absent_or_repeated_text_is_refused(text):
    with pytest.raises(UsageError, match=r"a\.py"):
        planted(text, Mutant("name", "a.py", "= 1", "= 3", ["test_a.py"]))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one function and its test."""
    files = {
        "derain/__init__.py": "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n",
        "tests/__init__.py": "",
        "tests/test_double.py": "from derain import double\n\n\ndef test_double():\n    assert double(2) == 4\n",
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow: slow"]\n',
    }
    for name, text in files.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    faults = [("product", "2 * x", "3 * x"), ("quotient", "x / 2", "x / 3"), ("import", "def double", "def duplicate")]
    made = [Mutant(name, "__init__.py", old, new, ["test_double.py"]) for name, old, new in faults]
    monkeypatch.setattr(mutants, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(mutants, "MUTANTS", made)
    monkeypatch.setattr(mutants, "HEAVY", ())
    return tmp_path / "repository"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(mutants.os, "fork"), reason="needs os.fork")
def test_survivors_are_reported(repository, capsys, monkeypatch):
    assert mutants.main([]) == 1
    printed = capsys.readouterr().out
    assert "SURVIVED: quotient" in printed
    assert "2 of 3" in printed
    monkeypatch.setattr(mutants, "SURVIVORS", {"quotient": "half has no test"})
    assert mutants.main(["quotient"]) == 0
    assert "x / 2" in Path(repository / "derain/__init__.py").read_text()


@pytest.mark.skipif(not hasattr(mutants.os, "fork"), reason="needs os.fork")
def test_tests_that_fail_without_a_fault_are_reported(repository, capsys):
    (repository / "tests/test_double.py").write_text("def test_false():\n    assert False\n")
    assert mutants.main(["product"]) == 2
    assert "test_double.py" in capsys.readouterr().err
    assert mutants.main(["no such fault"]) == 2
