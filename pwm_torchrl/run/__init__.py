"""A run from its configuration to its summary: the loop, sources of data, evaluations, checkpoints, logs, its end.

May import modules, objectives, algorithm, memory, distributed, envs and data. Importing this package is light; most of
its modules import torch.
"""
