"""What ``launch/report.py`` is made of: reading runs, statistics over seeds, tables, figures and the page.

May import every folder but ``cli``. What needs matplotlib or torch imports it where it is used.
"""
