"""Looking into a run: failpoints for tests, a check for leaked autograd graphs, and a profile of the updates."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pwm_torchrl.algorithm.updates import Updates
from pwm_torchrl.errors import GraphLeak
from pwm_torchrl.files import replacing
from pwm_torchrl.terminal import say, warn

__all__ = ["TRACE", "WARM_UP", "GraphCheck", "UpdateProfile", "live_nodes", "live_tensors"]

# Failpoints -----------------------------------------------------------------------------------------------------------


VARIABLE = "PWM_TORCHRL_FAILPOINT"
#: All failpoints, each with the state of the run at this point.
FAILPOINTS = {
    "start.claimed": "the attempt owns the run and has built nothing",
    "start.built": "networks, environments and replay exist; nothing is restored",
    "resume.restoring": "a checkpoint is about to be read",
    "resume.restored": "a checkpoint is restored, but the metrics after it are not yet dropped",
    "epoch.collected": "new data are in the replay, but no update has been made",
    "epoch.updated": "the epoch's updates are done, but its row is not written",
    "epoch.logged": "the epoch's row is written, but its checkpoint is not",
    "save.begin": "a checkpoint is about to be written",
    "save.written": "its files are written, but not flushed",
    "save.sealed": "it is flushed and has its checksums, but is not renamed",
    "save.renamed": "it has its final name, and older checkpoints still exist",
    "save.deleting": "an older checkpoint is renamed for deletion, but its files still exist",
    "save.pruned": "older checkpoints are deleted",
    "stop.asked": "a stop was requested, but nothing is saved",
    "stop.saved": "the checkpoint of a stop is saved, but the outcome is not written",
    "finish.summary": "the run has finished, but its summary is not written",
    "finish.outcome": "the summary is written, but the attempt is not recorded as ended",
}
_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Kill the process here if the environment variable selects this failpoint."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    place, _, count = wanted.partition(":")
    if place != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


# A check for leaked autograd graphs -----------------------------------------------------------------------------------

#: Number of references followed from a tensor to its owners, such as from a list to the variable that holds the list.
OWNER_DEPTH = 3


class GraphCheck:
    """Compares the number of live autograd nodes at the end of each epoch with that at its beginning.

    An epoch lasts from the end of the previous one (the first one from :meth:`start`) to its own end, so that it
    includes collection, updates, hooks, evaluation, logging and checkpoints. Graphs that were alive before are ignored.

    .. note:: Counting takes about 0.1 s, and a garbage collection if any graph is alive, because a graph in an
        unreachable cycle is not a leak. Graphs that are only held by C++ are not found.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.run.debugging import GraphCheck
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
        """Record the live nodes."""
        self._record(live_roots())

    def compare(self, what: str) -> None:
        """Record the live nodes, and raise an error if there are more than at the last call.

        Args:
            what (str): what has ended, for the error message.

        Raises:
            GraphLeak: with the number and kinds of the additional nodes, and the owner of one of their tensors.
        """
        before, known = self._before, self._known
        roots = live_roots()
        self._record(roots)
        more = self._before.total() - before.total()
        if more <= 0:
            return
        kinds = (self._before - before).most_common(3)
        new = [x for x in roots if isinstance(x, Tensor) and (id(x) not in known or known[id(x)]() is not x)]
        # Many tensors may share a graph; the one created last (a loss rather than its inputs) reaches the most nodes.
        culprit = max(new, key=lambda x: sum(count_nodes([x]).values()), default=None)
        del new
        held = "" if culprit is None else f"; a {_describe(culprit)} is held by {_owner(culprit, [roots])}"
        raise GraphLeak(
            f"{what} left {more} more live autograd nodes than it found ({before.total()} before; mostly "
            f"{', '.join(f'{count} {name}' for name, count in kinds)}){held}; detach it where it is created."
        )

    def _record(self, roots: list[Any]) -> None:
        self._before = count_nodes(roots)
        self._known = {id(x): weakref.ref(x) for x in roots if isinstance(x, Tensor)}


def live_nodes() -> Counter[str]:
    """Number of live autograd nodes by name: all nodes reachable from a live tensor or a node held by Python."""
    return count_nodes(live_roots())


def live_tensors(collect: bool = True) -> list[Tensor]:
    """All live tensors.

    Args:
        collect (bool): collect garbage first, which removes unreachable cycles. Defaults to ``True``.
    """
    if collect:
        gc.collect()
    return _living(lambda kind: issubclass(kind, Tensor))


def live_roots() -> list[Any]:
    """All tensors with an autograd graph and all nodes held by Python, without garbage."""
    found = _graph_owners()
    if not found:
        return found  # the garbage contains none, either
    del found
    gc.collect()
    return _graph_owners()


def count_nodes(roots: Iterable[Any]) -> Counter[str]:
    """Distinct autograd nodes reachable from tensors and nodes, by name."""
    with torch._C.DisableTorchFunctionSubclass():
        waiting = [x.grad_fn if isinstance(x, Tensor) else x for x in roots]
    # By identity: a node has one Python object as long as it is referenced, as it is here.
    seen: dict[int, Any] = {}
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            waiting += [following for following, _ in node.next_functions]
    return Counter(node.name().rpartition("::")[2] for node in seen.values())


def _graph_owners() -> list[Any]:
    found = _living(lambda kind: issubclass(kind, (Tensor, Node)))
    # A subclass may override attribute access; this reads the tensor's own grad_fn.
    with torch._C.DisableTorchFunctionSubclass():
        return [x for x in found if not isinstance(x, Tensor) or x.grad_fn is not None]


def _living(wanted: Callable[[type], bool]) -> list[Any]:
    """Objects of the wanted types; tests each type once, because there are many objects and few types."""
    answers: dict[type, bool] = {}
    found = []
    for x in gc.get_objects():
        # isinstance would trigger the deprecation warnings of proxy objects in some libraries.
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
    """The chain of owners of an object, for messages: ``a list of 3 in the name 'history'``."""
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


# A profile of the updates: where their time goes, as a trace that browsers show (training.profile) --------------------


#: The trace in the run directory.
TRACE = "trace.json.gz"
#: Updates of each network that this process has made before the profile begins. The first ones compile, allocate and
#: choose kernels, which later ones do not.
WARM_UP = 2


class UpdateProfile:
    """Profiles a number of consecutive updates in steady state, then removes itself.

    It begins after the run's first updates, when this process has updated every trained network ``WARM_UP`` times, and
    records ``count`` updates of any network. The trace includes what happens between two updates (collection,
    evaluation, checkpoints). Each update is marked by a range: ``model update``, ``actor update``, ``critic update``.
    The trace is in Chrome's format. An attempt that resumes the run profiles again and replaces the trace.

    Args:
        updates (Updates): the updates to profile.
        count (int): updates to record, at least 1.
        run_dir (Path): where ``trace.json.gz`` goes.
        started (callable): returns whether the first updates of the run have been made.
        device (torch.device): device of the updates; a GPU's kernels are recorded beside the operators.
    """

    def __init__(
        self, updates: Updates, count: int, run_dir: Path, started: Callable[[], bool], device: torch.device
    ) -> None:
        self._updates, self._count, self._started = updates, count, started
        self._path = run_dir / TRACE
        self._made: Counter[str] = Counter()
        self._recorded = 0
        self._written = False
        self._profile: profile | None = None
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        else:
            # PyTorch's profiler prints two lines when it starts and stops, at a level above errors. Hiding them hides
            # errors too. On a CPU there are none; on a GPU, errors of its counters must be shown.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        updates.around = self._around

    @contextmanager
    def _around(self, update: str) -> Iterator[None]:
        if self._profile is None and self._warm():
            self._begin()
        with record_function(f"{update} update"):
            yield
        self._made[update] += 1
        if self._profile is None:
            return
        self._recorded = self._profile.step_num  # the first step is the profiler's own warm-up
        self._profile.step()
        if self._recorded == self._count:
            self.close()

    def _warm(self) -> bool:
        trained = self._updates.executor.undo
        return self._started() and all(self._made[name] >= WARM_UP for name in trained)

    def _begin(self) -> None:
        self._profile = profile(
            activities=self._activities,
            schedule=schedule(wait=0, warmup=1, active=self._count, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def close(self) -> None:
        """Stop profiling. If not all updates are recorded yet, those that are get written, with a message."""
        if self._updates.around is None:
            return
        self._updates.around = None
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if not self._written:
            say(f"no {TRACE}: the run ended before its updates were in steady state (training.profile={self._count})")

    def _write(self, recorded: profile) -> None:
        if not self._recorded:  # stopped in the profiler's warm-up
            return
        self._written = True
        try:
            with replacing(self._path, suffix=".gz") as draft:  # the profiler compresses a file named .gz
                recorded.export_chrome_trace(str(draft))
        except OSError as error:  # a full disk must not end the run here
            warn(f"no {TRACE}: {error}")
            return
        wanted = "" if self._recorded == self._count else f" of {self._count}"
        say(f"profile of {self._recorded}{wanted} updates: {self._path} (open it in https://ui.perfetto.dev)")
