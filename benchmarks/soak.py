"""Does memory stay flat over a long run? The real loop, with everything on that repeats, for 1500 epochs.

    python benchmarks/soak.py --epochs 1500
    python benchmarks/soak.py --quick                # 60 epochs, a generous limit
    python benchmarks/soak.py --quick --leak         # keeps a loss with its graph every epoch: must fail

Flow V2 of size tiny on Pendulum-v1, put together and driven as ``launch/train.py`` does; updates and batches are small
so that epochs are quick, and evaluation, gradient profile and checkpoint come round every few of them. An interrupted
measurement starts over: memory is a property of one process.

*What is read.* After each epoch, its checkpoint included, the anonymous resident memory (RssAnon: heap and stacks,
neither page cache nor shared libraries). Nothing is collected before: a run does not do so either, and garbage that
piles up would be growth. The first epochs are left out, until replay is full, every periodic event has happened and the
oldest checkpoint has been deleted. Live tensors and autograd nodes are counted every few epochs, in a forked copy of
the process: the list of all objects takes megabytes, and the heap would move under the measurement. They must equal
those at the same place of the cycle before.

*What is brought forward.* Writing a checkpoint makes some thousand paths, whose parts pathlib interns. CPython's table
of interned strings counts those that are gone until it is full, then grows once: by 3.7 MB, after about 1000 of these
epochs. :func:`settle_interned_strings` fills it before the measurement; with ``--as-is`` that one step falls into it
and makes the bound 8 KiB per epoch.

*The slope* and its bound: ``benchmarks/slope.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from array import array
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from benchmarks.learning import hardware  # noqa: E402
from benchmarks.slope import slope  # noqa: E402
from pwm_torchrl.cli.compose import compose  # noqa: E402
from pwm_torchrl.config import Config  # noqa: E402
from pwm_torchrl.run.claims import RunClaim, claimed  # noqa: E402
from pwm_torchrl.run.debugging import live_nodes, live_tensors  # noqa: E402
from pwm_torchrl.run.summary import Closing, RunSummary  # noqa: E402
from pwm_torchrl.run.train import Run, quiet_torchrl  # noqa: E402

LIMIT = 4 * 1024  # bytes per epoch; the smallest real leak was 1.8 MB per epoch
QUICK_LIMIT = 256 * 1024  # a few dozen epochs cannot resolve less
QUICK_EPOCHS = 60
COUNT_EVERY = 5  # epochs; episodes of 40 steps and epochs of 16 meet as often

SETTINGS = (
    "model=flow_v2", "size=tiny", "env=pendulum", "env.episode_length=40", "training.eval_episodes=2",
    "training.replay_capacity=1280", "training.replay_storage=memory",  # full after 10 epochs
    "algorithm.random_steps=0", "algorithm.first_model_updates=4", "algorithm.model_updates=2",
    "algorithm.model_batch=16", "algorithm.actor_batch=16", "algorithm.actor_updates=1",
    "algorithm=pwm_paper", "algorithm.critic_passes=1", "algorithm.critic_minibatches=2",
    "training.video=false", "training.progress=false",
)  # fmt: skip


@dataclass
class Readings:
    """What was read of a run: bytes at the end of every epoch after the warm-up, and counts of live objects."""

    warm_up: int
    cycle: int
    rss: array = field(default_factory=lambda: array("q"))
    cuda: array = field(default_factory=lambda: array("q"))
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # by place in the cycle: tensors, nodes
    tensors_constant: bool = True
    nodes_constant: bool = True

    def take(self, epoch: int) -> None:
        """Read everything once at the end of an epoch."""
        if epoch <= self.warm_up:
            return
        self.rss.append(rss_anon())
        if torch.cuda.is_initialized():
            self.cuda.append(torch.cuda.memory_allocated())
        if epoch % COUNT_EVERY == 0:
            self.count(epoch % self.cycle)

    def count(self, place: int) -> None:
        """Compare the number of live tensors and nodes with that of the first cycle."""
        expected = self.counts.get(place)
        found = live_counts(expected)
        if expected is None:
            self.counts[place] = found
        else:
            self.tensors_constant &= found[0] == expected[0]
            self.nodes_constant &= found[1] == expected[1]


def rss_anon() -> int:
    """Anonymous resident memory of this process, bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or newer.")


def live_counts(expected: tuple[int, int] | None) -> tuple[int, int]:
    """Live tensors and autograd nodes, counted in a copy of this process; garbage counts unless that is unexpected."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = (len(live_tensors(collect=False)), live_nodes().total())
            if found != expected:
                found = (len(live_tensors()), live_nodes().total())
            os.write(writing, json.dumps(found).encode())
        except Exception:  # noqa: BLE001 - the parent raises; this process must end here whatever happened
            traceback.print_exc()
        finally:
            os._exit(0)  # nothing of the run is closed, flushed or deleted twice
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("counting the live objects failed in the forked process; its traceback is above.")
    tensors, nodes = json.loads(text)
    return tensors, nodes


def settle_interned_strings() -> None:
    """Make CPython's table of interned strings grow now: more strings than it has places are interned and dropped."""
    for number in range(400_000):
        sys.intern(f"soak {number}")


def configure(epochs: int, cycle: int, run_dir: Path, extra: list[str]) -> Config:
    """The measured run's configuration."""
    every = [f"training.{key}={cycle}" for key in ("eval_every", "checkpoint_every", "gradient_profile_every")]
    return compose([*SETTINGS, *every, f"training.epochs={epochs}", *extra, f"run_dir={run_dir}"])


def drive(cfg: Config, run_dir: Path, readings: Readings, leak: bool, settle: bool) -> int:
    """Train, reading at the end of every epoch; returns the epochs done."""
    quiet_torchrl()
    with claimed(run_dir) as claim:
        return drive_claimed(cfg, run_dir, claim, readings, leak, settle)


def drive_claimed(cfg: Config, run_dir: Path, claim: RunClaim, readings: Readings, leak: bool, settle: bool) -> int:
    """The same in a directory that this process owns."""
    summary = RunSummary.start(cfg, run_dir, resume=False)
    with Closing() as closing:
        run = Run(cfg, run_dir, summary, claim, closing)
        watch(run, readings, leak, settle)
        summary.finish(run.execute(resume=False))
    return run.loop.epoch


def watch(run: Run, readings: Readings, leak: bool, settle: bool) -> None:
    """Have every epoch of a run end with a reading, and with a leak on request."""
    save, update, history = run.loop.save_if_due, run.loop.update, []

    def save_and_read(stopping: bool) -> None:  # the last thing that an epoch does
        save(stopping)
        epoch = run.loop.epoch
        if settle and epoch == readings.warm_up:
            settle_interned_strings()
        readings.take(epoch)
        if epoch % (10 * readings.cycle) == 0:
            print(f"epoch {epoch}: {rss_anon() / 2**20:.1f} MiB anonymous", flush=True)

    def update_and_keep_a_graph() -> None:
        update()
        history.append(sum(run.algorithm.losses.model(run.source.samples.sample_slices(16)).values()))

    run.loop.save_if_due = save_and_read
    if leak:
        run.loop.update = update_and_keep_a_graph


def result(readings: Readings, epochs: int, asked: int, limit: int, settled: bool) -> dict[str, Any]:
    """The JSON of a measurement."""
    estimate, upper = slope(readings.rss)
    passed = epochs == asked and upper < limit and readings.tensors_constant and readings.nodes_constant
    tensors, nodes = (sorted(set(column)) for column in zip(*readings.counts.values()))
    found = {
        "epochs": epochs,
        "rss_slope_bytes_per_epoch": estimate,
        "rss_slope_upper_95_bytes_per_epoch": upper,
        "limit_bytes_per_epoch": limit,
        "live_tensors_constant": readings.tensors_constant,
        "live_nodes_constant": readings.nodes_constant,
        "live_tensors": tensors,  # one number per place in the cycle, equal ones once
        "live_nodes": nodes,
        "interned_strings_settled": settled,
        "warm_up_epochs": readings.warm_up,
        "measured_epochs": len(readings.rss),
        "cycle_epochs": readings.cycle,  # evaluation, gradient profile and checkpoint
        "rss_anon_first_bytes": readings.rss[0],
        "rss_anon_last_bytes": readings.rss[-1],
        "rss_anon_peak_bytes": max(readings.rss),
        "rss_anon_by_cycle_bytes": list(readings.rss[:: readings.cycle]),
    }
    if readings.cuda:
        cuda, cuda_upper = slope(readings.cuda)
        found |= {"cuda_slope_bytes_per_epoch": cuda, "cuda_slope_upper_95_bytes_per_epoch": cuda_upper}
        passed = passed and cuda_upper < limit
    return {
        **found,
        "passed": passed,
        "settings": list(SETTINGS),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "hardware": hardware(),
    }


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    rows = {
        "RssAnon slope, bytes per epoch": f"{found['rss_slope_bytes_per_epoch']:.0f}",
        "its upper 95 % bound": f"{found['rss_slope_upper_95_bytes_per_epoch']:.0f}"
        f" (limit {found['limit_bytes_per_epoch']})",
        "RssAnon first, last, highest, MiB": ", ".join(
            f"{found[f'rss_anon_{key}_bytes'] / 2**20:.1f}" for key in ("first", "last", "peak")
        ),
        **{
            f"live {name}": f"{' or '.join(map(str, found[f'live_{key}']))}, constant: {found[f'live_{key}_constant']}"
            for name, key in (("tensors", "tensors"), ("autograd nodes", "nodes"))
        },
    }
    if "cuda_slope_bytes_per_epoch" in found:
        rows["CUDA allocated, slope, bytes per epoch"] = f"{found['cuda_slope_bytes_per_epoch']:.0f}"
        rows["its upper 95 % bound "] = f"{found['cuda_slope_upper_95_bytes_per_epoch']:.0f}"
    else:
        rows["CUDA allocated"] = "not measured: no CUDA device"
    lines = [
        "# Memory over a long run",
        "",
        f"`python benchmarks/soak.py --epochs {found['epochs']}`, {found['date']}, {found['hardware']}.",
        f"Flow V2, size tiny, Pendulum-v1: {found['measured_epochs']} epochs, after {found['warm_up_epochs']} to warm "
        f"up; evaluation, gradient profile and checkpoint every {found['cycle_epochs']} epochs, replay full.",
        "CPython's table of interned strings was made to grow before the measurement (once, 3.7 MB)."
        if found["interned_strings_settled"]
        else "CPython's table of interned strings may grow within the measurement (once, 3.7 MB).",
        "The docstrings of `benchmarks/soak.py` and `slope.py` explain the measurement, the slope and its bound.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        f"| passed | {found['passed']} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the soak and write its table; 0 if memory is flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="epochs of the run, at least 30 (default: 1500; with --quick: 60)")
    parser.add_argument("--quick", action="store_true", help="few epochs and a generous limit")
    parser.add_argument("--leak", action="store_true", help="keep a loss with its graph every epoch, which must fail")
    parser.add_argument(
        "--as-is", action="store_true", help="do not fill CPython's table of interned strings first (see above)"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("settings", nargs="*", help="settings of the run, such as device=cpu or model=mlp")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/results")
    args = parser.parse_intermixed_args()
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else 1500)
    if epochs < 30:
        parser.error(f"--epochs {epochs} leaves nothing to measure after the warm-up; give at least 30")
    cycle = 25 if epochs >= 300 else 10 if epochs >= 60 else 5
    # Three checkpoints are kept, so the fourth is the first to delete one.
    readings = Readings(warm_up=4 * cycle if epochs >= 300 else 2 * cycle, cycle=cycle)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        done = drive(
            configure(epochs, cycle, run_dir, args.settings), run_dir, readings, args.leak, settle=not args.as_is
        )
    try:
        found = result(readings, done, epochs, QUICK_LIMIT if args.quick else LIMIT, not args.as_is)
    except ValueError as error:
        sys.exit(f"stopped after epoch {done}: {error}")
    print(table(found))
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    if done == epochs and args.publish:
        results = ROOT / "benchmarks" / "results"
        (results / "soak.json").write_text(text, encoding="utf-8")
        (results / "soak.md").write_text(table(found), encoding="utf-8")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
