"""Weights files and checkpoints as tensors and metadata; this package does not depend on any method."""
