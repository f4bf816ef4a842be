"""What IR-SDE and DA-CLIP's controller minimise."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from derain.methods.daclipsde.sde import MeanRevertingSDE


def matching_loss(
    sde: MeanRevertingSDE,
    estimated: Float[Tensor, "b 3 h w"],
    state: Float[Tensor, "b 3 h w"],
    clean: Float[Tensor, "b 3 h w"],
    rainy: Float[Tensor, "b 3 h w"],
    times: Int[Tensor, " b"],
) -> Float[Tensor, ""]:
    """Mean absolute difference of the Euler step to the most likely one (IR-SDE, eq. 16: maximum likelihood).

    It is one of the noise, weighted by ``σ_t² dt / √v_t``, so about 1e-3; computed in float32.

    Args:
        sde: The schedule.
        estimated: The noise that the network sees in the state.
        state: ``x(t)``.
        clean: ``x(0)``.
        rainy: ``μ``.
        times: ``t`` from 1, on the CPU.
    """
    step = sde.euler(state, rainy, sde.score(estimated, times), times, times - 1)
    return F.l1_loss(step, sde.optimum(state, clean, rainy, times, times - 1))


def cosines(images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosines of embeddings, in float32 also where a precision is chosen automatically."""
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T


def contrastive_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    same: Bool[Tensor, "b b"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of matching images and texts, mean of both directions (Pullabhotla, eq. 3, with the log it lacks).

    Where texts are equal, telling them apart is neither possible nor wanted. Then any of them counts as right: the
    probabilities of all that are equal add up. With texts that all differ, this is CLIP's loss; with texts that are all
    equal, it is 0, where CLIP's would push images towards each other.

    Args:
        images: Embeddings, normalised or not.
        texts: Of the matching texts.
        scale: Inverse temperature.
        same: Which texts are equal; only the diagonal if not given.
    """
    logits = scale.float() * cosines(images, texts)
    right = torch.eye(len(logits), dtype=torch.bool, device=logits.device) if same is None else same
    wrong = torch.zeros_like(logits).masked_fill(~right, -torch.inf)
    to_texts = (logits + wrong).logsumexp(1) - logits.logsumexp(1)
    to_images = (logits + wrong).logsumexp(0) - logits.logsumexp(0)
    return -(to_texts.mean() + to_images.mean()) / 2
