"""``launch/data.py generate``: episodes of the registry's tasks, in TD-MPC2's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pwm_torchrl.commands import typed
from pwm_torchrl.envs.tasks import TaskSet, task_set
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch import console
from pwm_torchrl.launch.evaluate import ArgumentParser

if TYPE_CHECKING:
    from pwm_torchrl.training.generate import Behaviour

__all__ = ["generate_main"]


def generate_main(argv: Sequence[str]) -> int:
    """Plays episodes and writes the chunks; ``launch/data.py import`` reads them."""
    parser = ArgumentParser(
        prog=f"{typed('data')} generate",
        description="Play episodes of the registry's tasks and write them in TD-MPC2's format, a chunk per task.",
    )
    parser.add_argument("--tasks", required=True, metavar="SET", help="mt30, mt80, names with commas, or a YAML list")
    parser.add_argument("--episodes", type=int, default=100, metavar="N", help="episodes per task (default 100)")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="[TASK=]RUN",
        help="what acts: 'random', 'random:N', whose actions are held for 1 to N steps, or a run directory; of TASK "
        "alone where it is named; several share a task's episodes equally (default: random)",
    )
    parser.add_argument(
        "--noise", type=float, default=0.3, metavar="STD", help="largest noise on a run's actions (default 0.3)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of environments and actions (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the chunks go")
    args = parser.parse_args(list(argv))
    if args.episodes < 1:
        raise ConfigurationError(f"--episodes={args.episodes} is too small; it must be at least 1")
    if args.noise < 0:
        raise ConfigurationError(f"--noise={args.noise:g} must not be negative")
    tasks = task_set(args.tasks)
    from pwm_torchrl.terminal import counting
    from pwm_torchrl.training.generate import generate_episodes

    behaviours = _behaviours(args.policy or ["random"], tasks, args.noise)
    with counting(args.episodes * len(tasks), "episode") as advance:
        files = generate_episodes(args.out, tasks, behaviours, args.episodes, args.seed, advance)
    following = f"{typed('data')} import {args.out} STORE --tasks {args.tasks}"
    console.say(f"{len(files)} chunks in {args.out}; import them: {following}")
    return console.OK


def _behaviours(words: Sequence[str], tasks: TaskSet, noise: float) -> dict[str, list[Behaviour]]:
    """What acts in each task."""
    found: dict[str, list[Behaviour]] = {name: [] for name in tasks.names}
    for word in words:
        task, equal, run = word.partition("=")
        if equal and task in found:
            chosen = [task]
        else:
            if equal and not Path(word).exists():
                tasks.index(task)  # says which names there are
            chosen, run = list(tasks.names), word
        behaviour = _behaviour(word, run, noise)
        for name in chosen:
            found[name].append(behaviour)
    empty = [name for name, acting in found.items() if not acting]
    if empty:
        raise ConfigurationError(f"nothing acts in {', '.join(empty)}; add --policy random, or --policy TASK=RUN")
    return found


def _behaviour(word: str, text: str, noise: float) -> Behaviour:
    """What a word of ``--policy`` means, without the task that it may begin with."""
    from pwm_torchrl.training.generate import RANDOM, Behaviour

    kind, colon, steps = text.partition(":")
    if kind == RANDOM and not colon:
        return Behaviour(RANDOM, noise)
    if Path(text).is_dir():
        return Behaviour(text, noise)
    if kind != RANDOM:
        raise ConfigurationError(f"--policy {word}: {text} is neither 'random', 'random:N' nor a run directory")
    if not steps.isdecimal() or int(steps) < 1:
        raise ConfigurationError(f"--policy {word}: {text} holds actions for 1 to N steps, N a number from 1 on")
    return Behaviour(RANDOM, noise, hold=int(steps))
