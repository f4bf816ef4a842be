"""Layers, losses and learning rate schedules for networks; they depend on PyTorch, not on Lightning."""
