"""Planted faults: each is written into a copy of derain, where a test must fail.

    python -m tests.mutants            plants all of them, one by one
    python -m tests.mutants SDE EMA    those whose names contain one of the words

Exit code 1: a fault survived that `SURVIVORS` does not list. Exit code 2: a fault cannot be planted, or tests fail
without any. Needs ``os.fork``: every run starts from a process that has imported the libraries.
"""

import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

ROOT = Path(__file__).parents[1]
SECONDS = 600
"""Time after which a run is ended; a fault that makes tests hang counts as caught."""
HEAVY = (
    "torch",
    "lightning.pytorch.cli",
    "torchmetrics.image",
    "timm",
    "transformers",
    "albumentations",
    "scipy.stats",
)
"""Libraries that are imported once for all runs."""


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: What goes wrong.
        file: File below ``derain/``.
        old: Text that the file contains exactly once.
        new: Text that replaces it.
        tests: Files below ``tests/`` of which one should fail, or tests in them. Of a file, quick tests are run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


FAULTS: dict[tuple[str, ...], list[tuple[str, str, str]]] = {
    ("metrics/full_reference.py", "metrics/test_full_reference.py"): [
        ("luma: red weighs less", "65.481 / 255", "64.481 / 255"),
        ("PSNR: 20 log", "min(10 * math.log10", "min(20 * math.log10"),
        (
            "output truncated instead of rounded and the reverse",
            'np.rint(values) if output == "round" else np.trunc(values)',
            'np.trunc(values) if output == "round" else np.rint(values)',
        ),
        ("luma: never rounded", "np.rint(luma) if protocol.luma_rounded", "luma if protocol.luma_rounded"),
        ("SSIM: border of 6 pixels", "_MARGIN = 5", "_MARGIN = 6"),
        ("SSIM: another constant", "(0.03 * 255) ** 2", "(0.3 * 255) ** 2"),
        ("SSIM: strips lose rows", "top + _STRIP + 2 * _MARGIN", "top + _STRIP + _MARGIN"),
        ("interval of 90 %", "(2.5, 97.5)", "(5, 95)"),
    ],
    ("metrics/protocols.py", "metrics/test_protocols.py", "metrics/test_full_reference.py"): [
        ("protocol: other output", 'output="truncate"', 'output="round"'),
    ],
    ("nn/ssim.py", "nn/test_ssim.py"): [
        ("loss SSIM: smaller window", "RADIUS = 5", "RADIUS = 4"),
        ("loss SSIM: no deviation of products", "2 * (mean_xy - product)", "2 * (mean_xy + product)"),
    ],
    ("methods/daclipsde/sde.py", "methods/daclipsde/test_sde.py"): [
        ("SDE: variance decays once", "torch.expm1(-2 * tau)", "torch.expm1(-tau)"),
        ("SDE: drift of ODE and SDE swapped", "1.0 if ode else 2.0", "2.0 if ode else 1.0"),
        ("SDE: decimal logarithm", "-math.log(eps)", "-math.log10(eps)"),
        ("SDE: sign of the score", "return -noise.float() /", "return noise.float() /"),
        (
            "SDE: posterior weighs the clean image otherwise",
            "self.decay[earlier] * step / total",
            "self.decay[earlier] * rest / total",
        ),
        ("SDE: cosine schedule shifted", "(k + 0.008) / 1.008", "(k + 0.08) / 1.08"),
        ("SDE: posterior deviation", "torch.sqrt(step * rest / total)", "torch.sqrt(step * total)"),
    ],
    ("methods/daclipsde/solvers.py", "methods/daclipsde/test_solvers.py"): [
        ("solver: MaRS without kappa", "step - change / kappa", "step - change"),
        ("solver: exponential of the wrong sign", "math.exp((1 - kappa) * step)", "math.exp((kappa - 1) * step)"),
        ("solver: Euler noise too small", "math.sqrt(2 * step)", "math.sqrt(step)"),
        ("solver: times rounded down", "round(sde.steps * remaining / steps)", "int(sde.steps * remaining / steps)"),
        (
            "solver: first order only",
            "weight / previous_step * (residual - previous_residual)",
            "0 * (residual - previous_residual)",
        ),
    ],
    ("methods/daclipsde/loss.py", "methods/daclipsde/test_loss.py", "methods/daclipsde/test_sde.py"): [
        ("matching loss: squares", "F.l1_loss(step", "F.mse_loss(step"),
    ],
    ("methods/daclipsde/loss.py", "methods/daclipsde/test_loss.py", "methods/daclipsde/test_daclip.py"): [
        ("contrastive loss: one direction twice", "logits.logsumexp(0)", "logits.logsumexp(1)"),
    ],
    ("methods/plnlingan/loss.py", "methods/plnlingan/test_loss.py"): [
        ("PLNLIN: weights of scales reversed", "(0.1, 0.05, 0.02, 0.01)", "(0.01, 0.02, 0.05, 0.1)"),
        ("PLNLIN: relativistic loss one-sided", "F.softplus(below - above.mean())", "F.softplus(above - below.mean())"),
        ("PLNLIN: finest weights for coarsest scales", "scale_weights[-len(losses) :]", "scale_weights[: len(losses)]"),
        ("PLNLIN: pyramid's border", '(2, 2, 2, 2), "reflect"', '(2, 2, 2, 2), "replicate"'),
    ],
    ("methods/cliprpn/loss.py", "methods/cliprpn/test_loss.py"): [
        ("CLIP-RPN: exponent does not grow", "beta + eta * progress", "beta + eta"),
        ("CLIP-RPN: mask needs all channels", ".amax(1, keepdim=True)", ".amin(1, keepdim=True)"),
        ("CLIP-RPN: mask shifted", "mask[..., ::factor, ::factor]", "mask[..., 1::factor, 1::factor]"),
    ],
    ("nn/recurrent.py", "methods/prenet/test_network.py"): [
        ("PReNet: forget gate", "_sigmoid(gates.forget, x, maps) * cell", "_sigmoid(gates.input, x, maps) * cell"),
    ],
    ("nn/padding.py", "nn/test_padding.py"): [
        (
            "padding: reflection and copies swapped",
            '"reflect" if min(height, width) >= multiple else "replicate"',
            '"replicate" if min(height, width) >= multiple else "reflect"',
        ),
    ],
    ("nn/schedule.py", "nn/test_schedule.py"): [
        ("warm-up starts at 0", "(step + 1) / warm_up_steps", "step / warm_up_steps"),
        ("milestone one epoch late", "bisect_right(ordered, step)", "bisect_right(ordered, step - 1)"),
    ],
    ("callbacks/ema.py", "callbacks/test_ema.py"): [
        ("EMA: shares swapped", "average.dtype), 1 - decay)", "average.dtype), decay)"),
        ("EMA: slower warm-up", "/ (10 + self.updates))", "/ (100 + self.updates))"),
        ("EMA: buffers stay", "average_buffer.copy_(buffer)", "average_buffer.copy_(average_buffer)"),
        ("EMA: counter not saved", '"batches": self.batches}', '"batches": 0}'),
        (
            "EMA: validation without the average",
            "weight.data, average.data = average.data, weight.data",
            "weight.data, average.data = weight.data, average.data",
        ),
    ],
    ("callbacks/checkpoints.py", "callbacks/test_checkpoints.py"): [
        ("best checkpoint: lowest score", 'mode="max"', 'mode="min"'),
    ],
    (
        "callbacks/checkpoints.py",
        "commands/test_train_resume.py::test_the_best_score_is_discarded_if_scores_cannot_be_compared",
    ): [
        (
            "best checkpoint: compared with other images",
            'if saved["images"] != self._validation["images"]:',
            "if False:",
        ),
    ],
    ("callbacks/final_weights.py", "callbacks/test_checkpoints.py"): [
        (
            "final weights: of the last epoch",
            "best.best_model_path or last.best_model_path",
            "last.best_model_path or best.best_model_path",
        ),
    ],
    ("callbacks/image_counts.py", "callbacks/test_image_counts.py"): [
        (
            "counts: a limited validation looks whole",
            "return min(batches * trainer.world_size, count)",
            "return max(batches * trainer.world_size, count)",
        ),
    ],
    ("callbacks/results.py", "callbacks/test_checkpoints.py"): [
        ("counts: a limited test looks whole", '"images": len(evaluated)', '"images": len(names)'),
    ],
    ("callbacks/seeds.py", "callbacks/test_seeds.py"): [
        ("seeds: ranks draw the same", "batch_idx, trainer.global_rank)", "batch_idx)"),
        ("seeds: epochs draw the same", "(self.seed, trainer.current_epoch, batch_idx,", "(self.seed, batch_idx,"),
    ],
    (
        "loops.py",
        "commands/test_train_resume.py::test_any_method_resumes_from_any_step[PReNetModule]",
    ): [
        ("resume: the logger's step twice", 'step=saved["steps"] - 1', 'step=saved["steps"]'),
    ],
    (
        "methods/resuming.py",
        "commands/test_train_resume.py::test_changed_options_apply_to_every_step_after_a_resume",
    ): [
        ("resume: learning rate one step ahead", "factor(schedule.last_epoch)", "factor(schedule.last_epoch + 1)"),
    ],
    ("methods/plnlingan/module.py", "methods/plnlingan/test_module.py"): [
        ("resume: GAN forgets its updates", 'checkpoint["updates"] = self.updates', 'checkpoint["updates"] = 0'),
        (
            "GAN: discriminator steps at the wrong time",
            '% self.hparams["generator_steps"] == 0',
            '% self.hparams["generator_steps"] == 1',
        ),
    ],
    ("methods/plnlingan/module.py", "methods/plnlingan/test_module.py::test_training_equals_a_hand_written_loop"): [
        ("GAN: accumulated gradients too large", 'total / self.hparams["accumulate"]', "total"),
    ],
    ("data/samplers.py", "data/test_samplers.py"): [
        ("order: the same in every epoch", "manual_seed(self.seed + epoch)", "manual_seed(self.seed)"),
        ("resume: the epoch starts again", "[self.first_batch : self", "[: self"),
        ("evaluation: every rank all images", "ranks[rank].append(index)", "[part.append(index) for part in ranks]"),
    ],
    ("data/splitting.py", "data/test_splitting.py"): [
        ("split: held-out images train", "if pair.scene not in held_out)", "if pair.scene)"),
        ("split: photos validate", " and not pair.is_photo)", ")"),
    ],
    ("data/datamodule.py", "data/test_datamodule.py"): [
        ("pixels: divided by 256", "div_(255)", "div_(256)"),
    ],
    ("data/transforms.py", "data/test_transforms.py"): [
        ("flips: horizontal alone flips both ways", "if flips is True:", "if flips:"),
    ],
    ("data/name_matching.py", "data/test_name_matching.py"): [
        (
            "names: a clash is a pair too",
            "        elif key not in clean_by_key:",
            "        if key not in clean_by_key:",
        ),
    ],
    ("data/name_matching.py", "data/test_name_matching.py", "data/test_pairs.py"): [
        ("names: last number excluded", '<= int(groups["n"]) <= numbers[1]', '<= int(groups["n"]) < numbers[1]'),
    ],
    ("data/result_folders.py", "data/test_result_folders.py", "data/test_names.py"): [
        ("results: zeros count", 'part.lstrip("0") or "0"', "part"),
        ("results: clean images may be left over", "len(distinct) != len(clean)", "len(distinct) > len(clean)"),
    ],
    ("images.py", "test_images.py"): [
        (
            "rounding: 8 bits truncated",
            "np.rint(np.clip(rgb, 0, 1) * np.float32(255))",
            "(np.clip(rgb, 0, 1) * np.float32(255))",
        ),
    ],
    ("image_sources.py", "test_images.py", "test_image_metadata.py"): [
        ("EXIF: orientation ignored", "return upright(array, self.orientation)", "return array"),
    ],
    ("listing.py", "test_images.py", "test_listing.py"): [
        ("natural order: text", "(1, int(part), part) if part.isdecimal()", "(1, 0, part) if part.isdecimal()"),
    ],
    ("tiles.py", "test_restoration.py"): [
        ("tiles: fade not mirrored", "ramp.flip(0)", "ramp"),
        ("tiles: not divided by weights", "cast(Tensor, total) / total_weight", "cast(Tensor, total)"),
    ],
    ("batching.py", "test_restoration.py"): [
        ("ensemble: rotated the wrong way back", "-quarter_turns, (2, 3))", "quarter_turns, (2, 3))"),
    ],
    ("restoration.py", "test_restoration.py"): [
        ("restoration: bytes truncated", "packed.mul(255).round()", "packed.mul(255)"),
    ],
}
"""Faults by the file below ``derain/`` and the test files that should catch them: name, old text, new text.

The file contains the old text exactly once.
"""

MUTANTS = [
    Mutant(name, file, old, new, tests) for (file, *tests), faults in FAULTS.items() for name, old, new in faults
]

SURVIVORS: dict[str, str] = {}
"""Reasons why some faults may survive, by name."""


class UsageError(Exception):
    """A fault that cannot be planted."""


def planted(text: str, mutant: Mutant) -> str:
    """Return the text of a file with the fault.

    Raises:
        UsageError: If the text does not contain ``old`` exactly once.
    """
    count = text.count(mutant.old)
    if count != 1:
        message = f"{mutant.name}: {mutant.file} contains {mutant.old!r} {count} times, expected once"
        raise UsageError(f"{message}; adapt the entry in tests/mutants.py")
    return text.replace(mutant.old, mutant.new)


def chosen(words: Sequence[str]) -> list[Mutant]:
    """Return the mutants whose names contain one of the words; all without words."""
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not mutants:
        raise UsageError(f"{' '.join(words)}: in no mutant's name; choose from {', '.join(m.name for m in MUTANTS)}")
    for mutant in mutants:
        planted((ROOT / "derain" / mutant.file).read_text(encoding="utf-8"), mutant)
    return mutants


def copy_repository(target: Path) -> None:
    """Copy derain and its tests, and link everything else beside them."""
    for path in ROOT.iterdir():
        if path.name in {"derain", "tests"}:
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith("."):
            (target / path.name).symlink_to(path)


def run_tests(folder: Path, tests: Sequence[str], report: Path) -> bool:
    """Return whether tests pass, in a process of its own.

    Args:
        folder: Copy of the repository.
        tests: Files below ``tests/``.
        report: Receives pytest's output.

    Raises:
        UsageError: If pytest did not get to run the tests.
    """
    process = os.fork()
    if process == 0:
        code = 3  # pytest's code for an internal error
        try:
            code = _run_in_child(folder, tests, report)
        except Exception:  # noqa: BLE001 - the parent reports it
            report.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return False
    code = os.waitstatus_to_exitcode(status)
    if code not in {0, 1, 2}:  # 2: the fault breaks an import
        raise UsageError(f"pytest ended with code {code}: {report.read_text()[-500:]}")
    return code == 0


def _run_in_child(folder: Path, tests: Sequence[str], report: Path) -> int:
    """Run pytest in this process and return its exit code."""
    signal.alarm(SECONDS)
    with report.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    sys.path[0] = str(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in {"derain", "tests"}]:
        del sys.modules[name]
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
    if not any("::" in test for test in tests):
        options += ["-m", "not slow"]
    code = int(pytest.main([*options, *(f"tests/{file}" for file in tests)]))
    sys.stdout.flush()
    return code


def failing_files(mutants: Sequence[Mutant], copy: Path, report: Path) -> list[str]:
    """Print and return the test files that fail without any fault."""
    failing = []
    for file in track(sorted({file for mutant in mutants for file in mutant.tests}), description="without faults"):
        if not run_tests(copy, [file], report):
            failing.append(file)
            print(f"tests/{file} fails without any fault:\n{report.read_text()[-1500:]}", flush=True)
    return failing


def survivors(mutants: Sequence[Mutant], copy: Path, report: Path) -> list[Mutant]:
    """Plant the faults one by one, print the result of each, and return those that no test caught."""
    survived = []
    for mutant in track(mutants, description="with faults"):
        path = copy / "derain" / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(planted(text, mutant), encoding="utf-8")
        passed = run_tests(copy, mutant.tests, report)
        path.write_text(text, encoding="utf-8")
        if passed:
            survived.append(mutant)
        print(f"{'SURVIVED' if passed else 'caught'}: {mutant.name} ({mutant.file})", flush=True)
    return survived


def run(mutants: Sequence[Mutant], folder: Path) -> int:
    """Run mutants in a copy of the repository, and return the exit code."""
    copy, report = folder / "copy", folder / "report.txt"
    copy.mkdir()
    copy_repository(copy)
    failing = failing_files(mutants, copy, report)
    runnable = [mutant for mutant in mutants if not set(failing) & set(mutant.tests)]
    survived = survivors(runnable, copy, report)
    print(f"{len(runnable) - len(survived)} of {len(runnable)} faults caught")
    for mutant in survived:
        print(f"survived: {mutant.name}: {SURVIVORS.get(mutant.name, 'add a test that fails')}")
    if failing:
        skipped = len(mutants) - len(runnable)
        print(f"mutants: {skipped} faults were not planted: mend {', '.join(failing)} first", file=sys.stderr)
        return 2
    return 1 if any(mutant.name not in SURVIVORS for mutant in survived) else 0


def main(words: Sequence[str]) -> int:
    """Run the mutants whose names contain one of the words, and return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        mutants = chosen(words)
        for library in HEAVY:
            importlib.import_module(library)
        gc.freeze()  # else pytest, when it ends, searches all libraries for garbage, several times a run
        with tempfile.TemporaryDirectory() as folder:
            return run(mutants, Path(folder))
    except UsageError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
