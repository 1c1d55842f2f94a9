"""Several processes that train one run: ranks that meet and exchange tensors, and updates that they share.

May import modules, objectives, algorithm and memory; knows no environment, data or run directory.
"""
