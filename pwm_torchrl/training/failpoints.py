"""Named places at which a test kills the process, to show that a run comes back from a death there.

``PWM_TORCHRL_FAILPOINT=save.sealed`` kills this process (SIGKILL) where it first passes that place;
``save.sealed:3`` the third time. Without the variable a place costs a dictionary look-up.
"""

from __future__ import annotations

import os
import signal

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
