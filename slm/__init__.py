"""slm: scaling-law experiments on families of small language models."""

__version__ = "0.1.0"
