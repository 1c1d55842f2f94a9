"""Memory of a run: what it will need, what it may have, and what it holds while it trains.

Importing this package is light. ``readings``, ``cgroups``, ``budget`` and ``watch`` import torch only where GPU memory
is asked for; ``trace``, ``predict`` and ``plan`` import modules, objectives and algorithm.
"""
