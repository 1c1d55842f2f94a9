"""Which keys of a configuration a small run reads, from its words to its end; a program that prints them as JSON.

It is a process of its own, since classes are changed in it and environments leave their loggers behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stored_cases import write_store

from pwm_torchrl import training
from pwm_torchrl.choices import schema_keys
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.finalize import finalize
from pwm_torchrl.cli.prepare import HERE, preflight
from pwm_torchrl.config import Section
from pwm_torchrl.run.directory import prepare_run_dir

#: Every key that holds a value.
LEAVES = [key for key, hint in schema_keys().items() if not dataclasses.is_dataclass(hint)]
#: Code that looks at every key, whatever it means: copies, comparisons, checks, and what writes configurations down.
LOOKS_AT_ALL = (
    "dataclasses.py", "<string>", "copy.py", "algorithm/declarations.py", "cli/validate.py", "cli/command_line.py",
    "cli/compose.py", "choices.py", "omegaconf",
)  # fmt: skip
SMALL = ("training.epochs=2", "training.eval_every=1", "training.video=false", "training.progress=false", "device=cpu")
NETWORKS = ("size.units=[16]", "size.encoder_units=[16]", "size.latent_dim=16")
POLICY = ("size.actor_units=[16]", "size.critic_units=[16]", "training.eval_episodes=1")
BATCHES = ("algorithm.model_batch=8", "algorithm.actor_batch=8", "algorithm.first_model_updates=1")
#: Small runs, one of each kind.
RUNS: dict[str, tuple[str, ...]] = {
    "pwm": ("algorithm=pwm", "algorithm.random_steps=8", "model=mlp", "env.num_envs=2", *NETWORKS, *POLICY, *BATCHES),
    "pwm_paper": (
        "algorithm=pwm_paper", "model=flow_v1", "env.num_envs=2", "algorithm.model_updates=1", *NETWORKS, *POLICY,
        *BATCHES,
    ),
    "shac": ("algorithm=shac", "env=pendulum_torchrl", "env.num_envs=2", "algorithm.horizon=4", *POLICY),
    "pretrain": (
        "experiment=pretrain", "data.path=store", "algorithm.model_updates=1", "algorithm.model_batch=8", *NETWORKS,
    ),
    "extract": (
        "experiment=extract", "data.path=store", "world_model=pretrain", "task=cup-catch", "algorithm.actor_updates=1",
        "algorithm.actor_batch=8", *POLICY,
    ),
    "pretrain_pwm": (
        "experiment=pretrain", "algorithm=pwm", "data.path=store", "algorithm.model_updates=1",
        "algorithm.model_batch=8", *NETWORKS,
    ),
    "extract_pwm": (
        "experiment=extract", "algorithm=pwm", "data.path=store", "world_model=pretrain", "task=cup-catch",
        "algorithm.actor_updates=1", "algorithm.actor_batch=8", "algorithm.critic_batch=8", *POLICY,
    ),
}  # fmt: skip


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Inside, the keys that are read by what uses them."""
    known, found = set(LEAVES), set()

    def look(section: Section, name: str) -> object:
        value = object.__getattribute__(section, name)
        key = name if name.startswith("_") else object.__getattribute__(section, "key") + name
        if key in known and key not in found:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.endswith("pwm_torchrl/config.py") and frame.f_code.co_name != "check":
                frame = frame.f_back  # a property, which is read by its caller
            caller = frame.f_code
            checks = caller.co_filename.endswith("pwm_torchrl/config.py") and caller.co_name == "check"
            if not checks and not any(part in caller.co_filename for part in LOOKS_AT_ALL):
                found.add(key)
        return value

    with patch.object(Section, "__getattribute__", look):
        yield found


def read_by(name: str, more: Sequence[str] = ()) -> set[str]:
    """The keys that a run reads; it is made in the current folder."""
    if not Path("store").exists():
        write_store(Path("store"))
    words = [*RUNS[name], *SMALL, *more, f"run_dir={name}"]
    config = compose(words)
    with recorded() as found:
        config = finalize(config, words)
        preflight([config], HERE)
        run = prepare_run_dir(config, here=True)
        training.train(config, run.path)
    return found


def read_elsewhere() -> dict[str, set[str]]:
    """What each run reads, in a process of its own; the extraction's world model is that of the pre-training before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: set(keys) for name, keys in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    """Make the runs in the current folder."""
    with patch("pwm_torchrl.run.train.write_curves", lambda run_dir: None):
        found = {name: sorted(read_by(name)) for name in RUNS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
