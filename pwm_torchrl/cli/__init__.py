"""What the commands do: from what a user types to a run directory, a job and its result.

May import every other folder; none imports it. The scripts in the top-level ``launch/`` folder and the console commands
of :mod:`.entry` only call the ``main`` functions of the modules here that have their names.
"""
