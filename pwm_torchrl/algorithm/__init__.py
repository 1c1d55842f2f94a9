"""What is learned in an epoch and how: the algorithms themselves, their networks, losses and optimizers.

May import modules and objectives, and of the ground floor the configuration; knows no environment, rank, checkpoint or
cluster.
"""
