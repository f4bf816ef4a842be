"""Losses of IR-SDE and of DA-CLIP's controller."""

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
    """Return the mean absolute difference of the Euler step and the posterior mean (IR-SDE, eq. 16).

    It equals the error of the noise weighted by ``σ_t² dt / √v_t``, about 1e-3, and is computed in float32.

    Args:
        sde: The schedule.
        estimated: Noise in the state, as the network estimates it.
        state: ``x(t)``.
        clean: ``x(0)``.
        rainy: ``μ``.
        times: ``t`` from 1, on the CPU.
    """
    step = sde.euler(state, rainy, sde.score(estimated, times), times, times - 1)
    return F.l1_loss(step, sde.posterior_mean(state, clean, rainy, times, times - 1))


def cosines(images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the cosine similarities of embeddings, in float32 also under autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T


def contrastive_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    same: Bool[Tensor, "b b"] | None = None,
) -> Float[Tensor, ""]:
    """Return the symmetric cross-entropy of matching images and texts (Pullabhotla, eq. 3, with the missing log).

    Equal texts cannot be distinguished, so each of them is correct: their probabilities are summed. If all texts
    differ, this is CLIP's loss. If all are equal, it is 0, whereas CLIP's loss would push images towards each other.

    Args:
        images: Embeddings of images, normalised or not.
        texts: Embeddings of their texts.
        scale: Inverse temperature.
        same: Which texts are equal; by default, each only to itself.
    """
    logits = scale.float() * cosines(images, texts)
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    mask = torch.zeros_like(logits).masked_fill(~same, -torch.inf)
    to_texts = (logits + mask).logsumexp(1) - logits.logsumexp(1)
    to_images = (logits + mask).logsumexp(0) - logits.logsumexp(0)
    return -(to_texts.mean() + to_images.mean()) / 2
