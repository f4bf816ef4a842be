"""Files of weights and checkpoints: bytes to tensors and metadata and back, without knowledge of any method."""
