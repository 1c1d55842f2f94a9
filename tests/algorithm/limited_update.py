"""Updates under a limit of address space, in processes of their own; prints JSON. Run by test_updates.py.

Each update is first measured, whole and in halves, to find a limit that refuses the one and admits the other.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from recovery_cases import UPDATES, do, make_bench, prepared, state_of
from training_cases import Bench

from pwm_torchrl.algorithm.base import MetricRow

ROWS = {"model": 512, "actor": 512, "critic": 2048}
CHANGES = {
    "size.units": [256, 256],
    "size.latent_dim": 64,
    "size.critic_units": [512, 512],
    "algorithm.model_batch": 512,
    "algorithm.actor_batch": 512,
    "algorithm.critic_minibatches": 1,
}


def addresses(what: str) -> int:
    """Bytes of address space: ``VmSize`` now, ``VmPeak`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def in_child(call: Callable[[], Any]) -> Any:
    """What a call gives in a process that starts with the memory of this one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(call()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if status == 0 else {"died": os.waitstatus_to_exitcode(status)}


Call = Callable[[MetricRow], object]


def update(bench: Bench, name: str, call: Call, size: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Do an update; how much address space it took, what became of it."""
    if size is not None:
        bench.algorithm.updates.reduced[name] = size
    before = addresses("VmSize")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (before + limit, before + limit))
    call(MetricRow())
    bench.generator = torch.get_rng_state()
    content = hashlib.sha256()
    for key, value in sorted(state_of(bench).items()):
        content.update(key.encode() + value.numpy().tobytes())
    return {
        "growth": addresses("VmPeak") - before,
        "reductions": bench.reduced,
        "state": content.hexdigest(),
    }


def main() -> None:
    torch.set_num_threads(1)
    bench = make_bench({**CHANGES})
    for name in (*UPDATES, *UPDATES):  # libraries and optimizers take what they keep
        bench.algorithm.updates.reduced[name] = 8
        do(bench, name)
    bench.algorithm.updates.reduced.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    out = {}
    for name, rows in ROWS.items():
        call = prepared(bench, name)  # here: of a child, the peak counts from its beginning
        do_it = partial(update, bench, name, call)
        whole, half = (in_child(partial(do_it, size=size)) for size in (rows, rows // 2))
        limit = (whole["growth"] + half["growth"]) // 2
        limited = in_child(partial(do_it, limit=limit))
        out[name] = {"rows": rows, "whole": whole, "half": half, "limited": limited}
    sys.stdout.write("\n" + json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
