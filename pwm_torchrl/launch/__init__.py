"""The command line: from what a user types to a run directory, a job and its result.

May import everything else of the package; nothing imports it. The scripts in the top-level ``launch/`` folder and
the console commands of :mod:`.entry` only call the ``main`` functions of the modules here that have their names. Of use
elsewhere: :func:`pwm_torchrl.launch.compose.compose` and :mod:`pwm_torchrl.launch.run_dir`.
"""
