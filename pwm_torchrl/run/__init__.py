"""Runs: the training loop, data sources, evaluation, checkpoints, logging, and how a run ends.

May import modules, objectives, algorithm, memory, distributed, envs and data. Importing this package is light; most of
its modules import torch.
"""
