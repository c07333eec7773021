"""Edit facts in language models, and keep their abilities: model editing as PyTorch Lightning training."""

__version__ = "0.1.0"
