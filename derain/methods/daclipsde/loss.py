"""Losses for training IR-SDE's U-Net and DA-CLIP's controller."""

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
    """Return the mean absolute difference between the Euler step and the posterior mean (IR-SDE, eq. 16).

    It is computed in float32, whatever the precision of the network.

    Args:
        sde: The SDE.
        estimated: Estimated noise in the states.
        state: States ``x(t)``.
        clean: Clean images ``x(0)`` in [0, 1].
        rainy: Rainy images ``μ`` in [0, 1].
        times: Times ``t`` from 1 to T, on the CPU.
    """
    step = sde.euler(state, rainy, sde.score(estimated, times), times, times - 1)
    return F.l1_loss(step, sde.posterior_mean(state, clean, rainy, times, times - 1))


def cosines(image_embeddings: Float[Tensor, "n d"], text_embeddings: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the cosine similarity of each image and each text embedding, in float32 also under autocast."""
    with torch.autocast(image_embeddings.device.type, enabled=False):
        return F.normalize(image_embeddings.float(), dim=-1) @ F.normalize(text_embeddings.float(), dim=-1).T


def contrastive_loss(
    image_embeddings: Float[Tensor, "b d"],
    text_embeddings: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    same: Bool[Tensor, "b b"] | None = None,
) -> Float[Tensor, ""]:
    """Return the symmetric cross-entropy of matching images and texts (Pullabhotla, eq. 3, with the missing log).

    With ``same``, all texts that equal the text of an image are correct for this image: their probabilities are summed.
    If all texts are equal, the loss is 0.

    Args:
        image_embeddings: Embeddings of images, normalised or not.
        text_embeddings: Embeddings of the texts of the images, normalised or not.
        scale: Inverse temperature.
        same: Whether texts i and j are equal. Default: all texts count as different, as in CLIP's loss.
    """
    logits = scale.float() * cosines(image_embeddings, text_embeddings)
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    mask = torch.zeros_like(logits).masked_fill(~same, -torch.inf)
    to_texts = (logits + mask).logsumexp(1) - logits.logsumexp(1)
    to_images = (logits + mask).logsumexp(0) - logits.logsumexp(0)
    return -(to_texts.mean() + to_images.mean()) / 2
