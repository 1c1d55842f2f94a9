"""Training of one run by several processes (ranks): rendezvous, exchange of tensors, and shared updates.

May import modules, objectives, algorithm and memory; knows nothing of environments, data or run directories.
"""
