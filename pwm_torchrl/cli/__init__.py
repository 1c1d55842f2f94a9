"""What the commands do: from what a user types to a run directory, a job and its result.

May import every other folder; none imports it. The scripts in the top-level ``launch/`` folder and the console command
``pwm`` call :mod:`.entry`, which lists the commands. Modules that read words (``arguments``, ``requests``, ``compose``,
``modes``, ``validate``, ``words``, ``help``) import no torch; those that do a command's work import what they need.
"""
