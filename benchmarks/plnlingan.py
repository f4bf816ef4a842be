"""PLNLIN-MCDDL against its textbook form: same weights, same losses, less time.

A training round has five generator steps and one discriminator step, on batches of two crops of 112×112 with networks
of the paper's size. The textbook form (`tests/methods/plnlingan/references.py`, also the reference of the tests)
partitions windows and builds their masks at each call, keeps the discriminator's graph during generator steps, and
computes the features of clean images again for the discriminator step. Targets: a speed-up of 1.3, and losses that
differ by at most 1e-5.

At inference, the hierarchy is skipped, with the same output. Target: a speed-up of 1.12 over inference with it.

Variants run in alternation; ratios are of medians. If other programs run, processor time on a single thread
(``--threads 1``) is more reliable than wall-clock time; both are printed.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from _timing import references, report, time_alternately
from torch import Tensor

from derain.memory import keep_freed_memory
from derain.methods import PLNLINGANModule
from derain.methods.plnlingan.loss import hierarchical_losses, relativistic_losses, weighted_sum
from derain.methods.plnlingan.network import Restored
from derain.nn.ssim import structural_similarity

CROP, BATCH, STEPS, SIDE = 112, 2, 5, 224
TRAINING_SPEED_UP, INFERENCE_SPEED_UP, MAX_DIFFERENCE = 1.3, 1.12, 1e-5


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return the rainy and clean crops of a round."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(STEPS, BATCH, 3, CROP, CROP, generator=generator)
    streaks = 0.3 * (torch.rand(STEPS, BATCH, 1, CROP, CROP, generator=generator) > 0.9)
    return list(zip((clean + streaks).clamp(0, 1), clean, strict=True))


def optimizers(module: PLNLINGANModule) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Return optimisers of generator and discriminator with a learning rate of 0, so that all rounds are equal."""
    return torch.optim.Adam(module.network.parameters(), 0.0), torch.optim.Adam(module.discriminator.parameters(), 0.0)


def ours(module: PLNLINGANModule) -> list[float]:
    """Train for a round like ``training_step``; return the losses of every step."""
    generator_optimizer, discriminator_optimizer = optimizers(module)
    losses = []
    for index, (rainy, clean) in enumerate(batches()):
        restored = module.network(rainy, hierarchy=True)
        with torch.no_grad():
            real = module.network(clean, hierarchy=True).features
        losses += step(module.generator_losses(restored, clean, real), generator_optimizer)
        if index == STEPS - 1:
            losses += step(module.discriminator_losses(restored, clean, real), discriminator_optimizer)
    return losses


def textbook(module: PLNLINGANModule) -> list[float]:
    """Train for a round with the textbook form; return the losses of every step."""
    form = references("plnlingan").Textbook
    generator = form(dict(module.network.named_parameters()))
    discriminator = form(dict(module.discriminator.named_parameters()))
    generator_optimizer, discriminator_optimizer = optimizers(module)
    losses = []
    for index, (rainy, clean) in enumerate(batches()):
        restored = Restored(*generator.generator(rainy, 2))
        with torch.no_grad():
            real = generator.generator(clean, 2)[2]
        fake_score = discriminator.discriminator(restored.derained, restored.features)
        parts = {
            "pixel": [1 - structural_similarity(restored.derained, clean)],
            "hierarchical": hierarchical_losses(restored.images, clean),
            "generator": relativistic_losses(fake_score, discriminator.discriminator(clean, real)),
        }
        losses += step(parts, generator_optimizer)
        if index == STEPS - 1:
            discriminator_optimizer.zero_grad()
            with torch.no_grad():
                real = generator.generator(clean, 2)[2]
            features = [feature.detach() for feature in restored.features]
            fake_score = discriminator.discriminator(restored.derained.detach(), features)
            real_score = discriminator.discriminator(clean, real)
            losses += step({"discriminator": relativistic_losses(real_score, fake_score)}, discriminator_optimizer)
    return losses


def step(parts: dict[str, list[Tensor]], optimizer: torch.optim.Adam) -> list[float]:
    """Backpropagate the weighted losses, step the optimiser, and return the losses."""
    optimizer.zero_grad()
    weighted_sum(parts, 1.0, 1.0).backward()
    optimizer.step()
    return [loss.item() for losses in parts.values() for loss in losses]


def main() -> int:
    """Print times and ratios; return 1 if a target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after a warm-up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    module = PLNLINGANModule()
    difference = max(abs(our - their) for our, their in zip(ours(module), textbook(module), strict=True))
    variants: dict[str, Callable[[], object]] = {"textbook": lambda: textbook(module), "ours": lambda: ours(module)}
    title = f"{STEPS} generator steps and 1 discriminator step, {BATCH} × {CROP}×{CROP}, {options.threads} threads"
    training_speed_up = report(title, time_alternately(variants, options.rounds))
    print(f"maximum difference of losses: {difference:.0e} (at most {MAX_DIFFERENCE:.0e})")
    image = torch.rand(1, 3, SIDE, SIDE)
    network = module.network.eval()
    with torch.inference_mode():
        same = torch.equal(network(image).derained, network(image, hierarchy=True).derained)
        variants = {"with the hierarchy": lambda: network(image, hierarchy=True), "without": lambda: network(image)}
        inference_speed_up = report(f"restoring {SIDE}×{SIDE}", time_alternately(variants, options.rounds))
    print(f"same output: {same}")
    fast = training_speed_up >= TRAINING_SPEED_UP and inference_speed_up >= INFERENCE_SPEED_UP
    missed = not fast or difference > MAX_DIFFERENCE or not same
    print("a target is missed" if missed else "all targets are met")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
