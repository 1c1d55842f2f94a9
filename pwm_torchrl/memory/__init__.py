"""Memory of a run: the prediction of what it needs, the budget that it has, and the use measured while it trains.

May import modules, objectives and algorithm; ``trace``, ``predict`` and ``plan`` do. ``readings``, ``cgroups``,
``budget`` and ``watch`` import only the configuration schema, and torch only to query a GPU; ``storage`` needs no
torch.
"""
