"""Single-image rain removal with PyTorch Lightning."""

__version__ = "0.1.0"
