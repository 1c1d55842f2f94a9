"""Jobs that come back: what a job runs, why it ended, what is done about it, and how it is submitted.

May import ``run`` and everything before it; of these only what needs no torch, since most of this runs beside a job
and not in it. :mod:`~pwm_torchrl.cluster.slurm` asks SLURM, :mod:`~pwm_torchrl.cluster.resources` tells what could
never run there.
"""
