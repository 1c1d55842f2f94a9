"""Memory of a run: what it will need, what it may have, and what it holds while it trains.

May import modules, objectives and algorithm, which ``trace``, ``predict`` and ``plan`` do. ``readings``,
``cgroups``, ``budget`` and ``watch`` import the schema alone, and torch only where GPU memory is asked for; ``storage``
needs no torch.
"""
