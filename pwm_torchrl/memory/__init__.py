"""Memory of a run: what it will need, what it may have, and what it holds while it runs.

Importing this package is light. The watcher (``units``, ``processes``, ``cgroups``, ``budget``, ``gpus``, ``readings``,
``watch``, ``guard``) imports nothing else of the package, and torch not at all unless GPU memory is asked for.
"""
