"""A run from its configuration to its summary: the loop, its sources of data, its evaluations, how it stops and ends.

May import everything but cluster and launch. Importing this package is light; its modules import torch.
"""
