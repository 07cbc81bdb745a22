"""Train a GPT on your own text with PyTorch Lightning."""

__version__ = "0.1.0"
