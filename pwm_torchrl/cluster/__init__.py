"""Jobs that come back: what a job runs, why it ended, what is done about it, and how it is submitted.

May import training, memory and what they import; of these only what needs no torch, since most of this runs beside a
job and not in it.

Reading SLURM: :mod:`~pwm_torchrl.cluster.slurm` asks, :mod:`~pwm_torchrl.cluster.fits` tells what could never run,
:mod:`~pwm_torchrl.cluster.slurm` reads and writes SLURM's times.
"""
