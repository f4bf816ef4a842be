"""AirNet: a network that an encoder of the degradation guides, with a contrastive loss."""
