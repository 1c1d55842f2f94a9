"""Parts of ``launch/report.py``: reading runs, statistics over seeds, tables, figures and the HTML page.

May import every folder except ``cli``. Matplotlib and torch are imported only where they are needed.
"""
