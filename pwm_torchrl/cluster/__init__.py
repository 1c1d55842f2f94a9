"""Jobs and their restarts: submitting a job, the program that it runs, why it ended, and whether it runs again.

May import ``run`` and everything before it, but only modules without torch, because most of this package runs outside
of a job. :mod:`~pwm_torchrl.cluster.slurm` queries SLURM; :mod:`~pwm_torchrl.cluster.resources` chooses resources and
rejects requests that no node could ever satisfy.
"""
