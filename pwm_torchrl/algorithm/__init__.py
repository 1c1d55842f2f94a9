"""The algorithms: what an epoch learns and how, with the networks, losses and optimizers.

May import ``modules``, ``objectives`` and top-level modules such as the configuration; must not depend on environments,
ranks, checkpoints or the cluster.
"""
