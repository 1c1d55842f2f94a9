"""What tests and debugging hook into: places to die at, and a count of live autograd graphs."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pwm_torchrl.errors import GraphLeak

__all__ = ["GraphCheck", "live_nodes", "live_tensors"]

VARIABLE = "PWM_TORCHRL_FAILPOINT"
#: Every place, and where it is.
FAILPOINTS = {
    "start.claimed": "the attempt owns the run and has built nothing",
    "start.built": "networks, environments and replay exist; nothing is restored",
    "resume.restoring": "a checkpoint is about to be read",
    "resume.restored": "a checkpoint is restored, the metrics that follow it are not dropped yet",
    "epoch.collected": "new data are in replay, no update has been made",
    "epoch.updated": "the epoch's updates are done, its row is not written",
    "epoch.logged": "the epoch's row is written, its checkpoint is not",
    "save.begin": "a checkpoint is about to be written",
    "save.written": "its files are written, not flushed",
    "save.sealed": "it is flushed and sealed, under another name",
    "save.renamed": "it has its name, older ones are still there",
    "save.deleting": "an older one has lost its name, its files are still there",
    "save.pruned": "older ones are deleted",
    "stop.asked": "a stop was asked for, nothing is saved",
    "stop.saved": "the checkpoint of a stop is saved, the outcome is not written",
    "finish.summary": "the run has finished, its summary is not written",
    "finish.outcome": "the summary is written, the attempt has not said that it ended",
}
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die here, if the environment says so."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    place, _, count = wanted.partition(":")
    if place != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


#: How far the owners of a tensor are followed, from the list that holds it to the name that holds the list.
OWNER_DEPTH = 3


class GraphCheck:
    """Compares the live autograd nodes at the end of each epoch with those at its beginning.

    An epoch lasts from the end of the one before (the first: from :meth:`start`) to its own, so that collection,
    updates, hooks, evaluation, logging and checkpoints are all inside. Graphs that were alive before, whoever owns
    them, are no fault of the epoch and may stay or go.

    .. note:: Counting takes about 0.1 s and, only where any graph is alive, a garbage collection: a graph in an
        unreachable cycle is not a leak. Graphs held by nothing but C++ are invisible to it.

    Examples:
        >>> check = GraphCheck()
        >>> check.start()
        >>> history = [(2 * torch.ones(2, requires_grad=True)).sum()]
        >>> check.compare("epoch 1")
        Traceback (most recent call last):
        ...
        pwm_torchrl.errors.GraphLeak: epoch 1 left 3 more live autograd nodes than it found ...
    """

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def start(self) -> None:
        """Take note of what is alive."""
        self._note(live_roots())

    def compare(self, what: str) -> None:
        """Raise if more nodes are alive than at the last call, and take note of what is alive now.

        Args:
            what (str): what ended, the beginning of the sentence.

        Raises:
            GraphLeak: in one sentence: how many nodes more, of which kinds, and who holds a tensor of them.
        """
        before, known = self._before, self._known
        roots = live_roots()
        self._note(roots)
        more = self._before.total() - before.total()
        if more <= 0:
            return
        kinds = (self._before - before).most_common(3)
        new = [x for x in roots if isinstance(x, Tensor) and (id(x) not in known or known[id(x)]() is not x)]
        # Many tensors may share a graph; the one made last, a loss rather than its inputs, reaches most of it.
        culprit = max(new, key=lambda x: sum(count_nodes([x]).values()), default=None)
        del new
        held = "" if culprit is None else f"; a {_describe(culprit)} is held by {_owner(culprit, [roots])}"
        raise GraphLeak(
            f"{what} left {more} more live autograd nodes than it found ({before.total()} before; mostly "
            f"{', '.join(f'{count} {name}' for name, count in kinds)}){held}; detach it where it is made."
        )

    def _note(self, roots: list[Any]) -> None:
        self._before = count_nodes(roots)
        self._known = {id(x): weakref.ref(x) for x in roots if isinstance(x, Tensor)}


def live_nodes() -> Counter[str]:
    """Live autograd nodes by name: distinct nodes that a live tensor, or a node held by Python, leads to."""
    return count_nodes(live_roots())


def live_tensors(collect: bool = True) -> list[Tensor]:
    """Every tensor that Python knows of.

    Args:
        collect (bool): collect garbage first, so that unreachable cycles do not count. Defaults to ``True``.
    """
    if collect:
        gc.collect()
    return _living(lambda kind: issubclass(kind, Tensor))


def live_roots() -> list[Any]:
    """Every tensor that owns an autograd graph, and every node that Python holds, garbage excluded."""
    found = _graph_owners()
    if not found:
        return found  # then there is none in garbage either
    del found
    gc.collect()
    return _graph_owners()


def count_nodes(roots: Iterable[Any]) -> Counter[str]:
    """Distinct autograd nodes reachable from tensors and nodes, by name."""
    with torch._C.DisableTorchFunctionSubclass():
        waiting = [x.grad_fn if isinstance(x, Tensor) else x for x in roots]
    # By identity: a node's Python object is one and the same as long as it is held, and here it is held.
    seen: dict[int, Any] = {}
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            waiting += [following for following, _ in node.next_functions]
    return Counter(node.name().rpartition("::")[2] for node in seen.values())


def _graph_owners() -> list[Any]:
    found = _living(lambda kind: issubclass(kind, (Tensor, Node)))
    # A subclass may answer for its attributes itself; only the tensor's own graph is wanted.
    with torch._C.DisableTorchFunctionSubclass():
        return [x for x in found if not isinstance(x, Tensor) or x.grad_fn is not None]


def _living(wanted: Callable[[type], bool]) -> list[Any]:
    """Objects of the wanted types; asks each type once, since there are many objects and few types."""
    answers: dict[type, bool] = {}
    found = []
    for x in gc.get_objects():
        # isinstance would wake the deprecated proxies that some libraries keep among their objects
        kind = type(x)
        if kind not in answers:
            answers[kind] = wanted(kind)
        if answers[kind]:
            found.append(x)
    return found


def _describe(tensor: Tensor) -> str:
    node = tensor.grad_fn
    return f"tensor of shape {list(tensor.shape)}" + ("" if node is None else f" made by {node.name()}")


def _owner(held: Any, ours: list[Any]) -> str:
    """Who holds an object, outwards: ``a list of 3 under 'history'``."""
    words: list[str] = []
    for _ in range(OWNER_DEPTH):
        owners = [x for x in gc.get_referrers(held) if not any(x is other for other in ours) and not _is_frame(x)]
        if not owners:
            break
        owner = owners[0]
        words.append(_relation(owner, held))
        if isinstance(owner, dict):
            break
        ours.append(owners)
        held = owner
    return " in ".join(words) or "a running function or C++ code"


def _is_frame(x: Any) -> bool:
    return type(x).__name__ == "frame"


def _relation(owner: Any, held: Any) -> str:
    if isinstance(owner, dict):
        return f"the name {next((key for key, value in owner.items() if value is held), '?')!r}"
    names = [name for name, value in getattr(owner, "__dict__", {}).items() if value is held]
    size = f" of {len(owner)}" if isinstance(owner, (list, tuple, set)) else ""
    return f"a {type(owner).__name__}{size}" + (f" as {names[0]!r}" if names else "")
