"""Building blocks that two or more methods use; they depend on PyTorch, not on Lightning."""
