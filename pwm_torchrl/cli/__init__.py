"""The commands: from a command line to a run directory, a job and its result.

May import every other folder; none imports it. The scripts in the top-level ``launch/`` folder and the console command
``pwm`` call :mod:`.entry`, which lists the commands. The modules that parse command lines (``arguments``,
``command_line``, ``compose``, ``derived_settings``, ``help``, ``run_requests``, ``sweeps``, ``validate``) do not import
torch; those that do a command's work import what they need. A *word* is one argument of a command line, such as
``seed=1``.
"""
