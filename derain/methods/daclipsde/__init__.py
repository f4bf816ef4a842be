"""DA-CLIP + IR-SDE: mean-reverting SDE, conditioned on embeddings of a degradation-aware CLIP."""
