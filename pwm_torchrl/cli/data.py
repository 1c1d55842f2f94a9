"""``launch/data.py``: imports, generates, lists and checks stored episodes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.arguments import TASKS
from pwm_torchrl.commands import typed
from pwm_torchrl.data.episodes import EpisodeStore, Inspection, import_episodes, inspect_source, inspect_store
from pwm_torchrl.data.episodes.inspection import describe_shifts
from pwm_torchrl.data.episodes.sources import Source
from pwm_torchrl.data.episodes.store import MANIFEST
from pwm_torchrl.envs.tasks import TaskSet, task_set
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.progress import counting
from pwm_torchrl.report.collect import is_run
from pwm_torchrl.report.tables import Table
from pwm_torchrl.run.new_episodes import RANDOM, Behaviour, RunReplay, generate_episodes
from pwm_torchrl.user_code import make_cwd_importable

__all__ = ["run"]


def run(args: Namespace) -> int:
    """Runs one of the subcommands.

    Returns:
        The exit code: 0, 1 if something is wrong with the data, 74 if a disk is full or broken.
    """
    make_cwd_importable()
    try:
        return {"import": _import, "inspect": _inspect, "generate": _generate}[args.command](args)
    except StorageFault as fault:
        console.error(str(fault))
        return console.STORAGE


def _generate(args: Namespace) -> int:
    """Plays episodes and writes the chunks; ``launch/data.py import`` reads them."""
    tasks = task_set(args.tasks)
    behaviours = _behaviours(args.policy or ["random"], tasks, args.noise)
    with counting(args.episodes * len(tasks), "episode") as advance:
        files = generate_episodes(args.out, tasks, behaviours, args.episodes, args.seed, advance)
    following = f"{typed('data')} import {args.out} STORE --tasks {args.tasks}"
    console.say(f"{len(files)} chunks in {args.out}; import them: {following}")
    return console.OK


def _behaviours(words: Sequence[str], tasks: TaskSet, noise: float) -> dict[str, list[Behaviour]]:
    """The behaviours of each task, by its name."""
    found: dict[str, list[Behaviour]] = {name: [] for name in tasks.names}
    for word in words:
        task, equal, run = word.partition("=")
        if equal and task in found:
            chosen = [task]
        else:
            if equal and not Path(word).exists():
                tasks.index(task)  # raises an error that lists the names
            chosen, run = list(tasks.names), word
        behaviour = _behaviour(word, run, noise)
        for name in chosen:
            found[name].append(behaviour)
    empty = [name for name, acting in found.items() if not acting]
    if empty:
        raise ConfigurationError(
            f"no policy was given for {', '.join(empty)}; add --policy random, or --policy TASK=RUN"
        )
    return found


def _behaviour(word: str, text: str, noise: float) -> Behaviour:
    """The behaviour for a value of ``--policy``; ``text`` is the value without the optional task."""
    kind, colon, steps = text.partition(":")
    if kind == RANDOM and not colon:
        return Behaviour(RANDOM, noise)
    if Path(text).is_dir():
        return Behaviour(text, noise)
    if kind != RANDOM:
        raise ConfigurationError(f"--policy {word}: {text} is neither 'random', 'random:N' nor a run directory")
    if not steps.isdecimal() or int(steps) < 1:
        raise ConfigurationError(f"--policy {word}: {text}: N in 'random:N' must be an integer of at least 1")
    return Behaviour(RANDOM, noise, hold=int(steps))


def _import(args: Namespace) -> int:
    sources = _sources(args.sources, args.task)
    tasks = task_set(args.tasks)
    store = import_episodes(sources, args.store, tasks, task=args.task, keep_good=args.keep_good, progress=True)
    _report_store(store)
    return console.OK


def _sources(given: Sequence[str], task: str | None) -> list[str | Path | Source]:
    """The sources of an import; a run directory is replaced by the run's replay."""
    found: list[str | Path | Source] = []
    for each in given:
        if is_run(Path(each)):
            path = Path(each).resolve()
            # Runs of a sweep are often named only by their seed.
            found.append(RunReplay(each, task, path.name if len(given) == 1 else f"{path.parent.name}/{path.name}"))
        else:
            found.append(each)
    return found


def _report_store(store: EpisodeStore) -> None:
    manifest = store.manifest
    rows = [
        [
            task["name"],
            str(task["observation_dim"]),
            str(task["action_dim"]),
            f"{task['episodes']:,}",
            f"{task['transitions']:,}",
            _span(task["lengths"]),
            f"{task['mean_return']:.1f}",
        ]
        for task in manifest["tasks"]
        if task["episodes"]
    ]
    console.say(Table(["task", "O", "A", "episodes", "transitions", "length", "mean return"], rows).text())
    if manifest["tasks_without_data"]:
        console.say(f"no data: {', '.join(manifest['tasks_without_data'])}")
    for source in manifest["sources"]:
        if source["state"] != "imported":
            console.say(f"left out: {source['name']}: {source['problem']}")
    console.say(f"{store.path}: {store.num_episodes:,} episodes, {store.num_transitions:,} transitions")


def _inspect(args: Namespace) -> int:
    if len(args.sources) == 1 and (Path(args.sources[0]) / MANIFEST).exists():
        found = inspect_store(args.sources[0])
    elif args.tasks is None:
        raise ConfigurationError(f"{args.sources[0]} is not a store; name its tasks with --tasks: {TASKS}")
    else:
        sources = _sources(args.sources, args.task)
        found = inspect_source(sources, task_set(args.tasks), task=args.task, progress=True)
    return _report_inspection(found)


def _report_inspection(found: Inspection) -> int:
    """Prints the result of an inspection.

    Returns:
        The exit code: 1 if something is wrong with the data.
    """
    head = ["task", "episodes", "transitions", "length", "returns: lowest, quartiles, highest"]
    rows = [
        [
            task.name,
            f"{task.episodes:,}",
            f"{task.transitions:,}",
            _span(task.lengths),
            " ".join(f"{value:.1f}" for value in task.return_quantiles),
            f"{task.observation_used}/{task.observation_dim}",
            f"{task.action_used}/{task.action_dim}",
            task.action_shift.verdict,
            task.reward_shift.verdict,
        ]
        for task in found.tasks
    ]
    if rows:
        console.say(Table([*head, "O", "A", "actions", "rewards"], rows).text())
        console.say(
            "O and A: dimensions in use, of the task's dimensions; actions, rewards: in their own row (aligned), or a "
            "row early or late"
        )
    for task in found.tasks:
        for line in describe_shifts(task):
            console.say(line)
    if found.absent:
        console.say(f"no data: {', '.join(found.absent)}")
    for name, problem in found.problems.items():
        console.error(f"{name}: {problem}")
    shifted = any(s.verdict in ("early", "late") for t in found.tasks for s in (t.action_shift, t.reward_shift))
    return console.FAILED if found.problems or shifted else console.OK


def _span(lengths: Sequence[int]) -> str:
    low, high = lengths
    return f"{low}" if low == high else f"{low}-{high}"
