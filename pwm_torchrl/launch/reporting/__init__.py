"""What ``launch/report.py`` is made of: reading runs, statistics over seeds, tables, pictures and the page.

May import everything that ``pwm_torchrl.launch`` may. ``statistics`` and ``aggregate`` are functions of numbers; what
needs matplotlib or torch imports it where it is used.
"""
