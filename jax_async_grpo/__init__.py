"""Staleness bias and learning-rate laws of asynchronous GRPO (arXiv 2607.01083). Importing the package imports nothing else."""

__version__ = "0.1.0"
