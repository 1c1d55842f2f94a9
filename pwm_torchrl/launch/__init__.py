"""The command line: from what a user types to a run directory, a job and its result.

May import everything else of the package; nothing imports it. The scripts in the top-level ``launch/`` folder only
call the ``main`` functions of ``submit``, ``train``, ``evaluate``, ``report`` and ``check_env`` here. Of use elsewhere:
:func:`pwm_torchrl.launch.compose.compose` and :mod:`pwm_torchrl.launch.run_dir`.
"""
