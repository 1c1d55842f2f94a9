"""``data``: imports, generates, lists and checks stored episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pwm_torchrl.cli import console
from pwm_torchrl.cli.evaluate import ArgumentParser
from pwm_torchrl.cli.words import HELP
from pwm_torchrl.commands import named, typed
from pwm_torchrl.envs.tasks import TaskSet, task_set
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.report.tables import Table
from pwm_torchrl.user_code import make_cwd_importable

if TYPE_CHECKING:
    from pwm_torchrl.data.episodes import EpisodeStore, Inspection
    from pwm_torchrl.run.generate import Behaviour

__all__ = ["generate_main", "main"]


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
    from pwm_torchrl.run.generate import generate_episodes
    from pwm_torchrl.terminal import counting

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
    from pwm_torchrl.run.generate import RANDOM, Behaviour

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


def _usage() -> str:
    return f"""\
usage: {typed("data")} COMMAND ...

  import SOURCE... STORE --tasks TASKS   TD-MPC2's chunks, one's own episodes or Minari's, into a store
  inspect SOURCE|STORE [--tasks TASKS]   what is in it, and whether actions or rewards lie in the wrong rows
  generate ...                           episodes of random or trained policies, in the format of TD-MPC2

Each of them explains itself: {typed("data")} COMMAND --help"""


_SOURCES = (
    "folder or file: *.pt (TD-MPC2's chunks), *.npz, *.h5 or *.hdf5 (one's own episodes); or minari:ID, minari:ID=TASK"
)
_TASKS = "mt30, mt80, names separated by commas, or a YAML list of names"
_TASK = "the task of episodes that do not name theirs"


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands."""
    words = list(argv or ())
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "import": _import,
        "inspect": _inspect,
        "generate": _generate,
    }
    if not words or (words[0] not in commands and not HELP.isdisjoint(words)):
        console.say(_usage())
        return console.OK
    if words[0] not in commands:
        raise ConfigurationError(f"{words[0]!r} is not a command of {named('data')}; there are {', '.join(commands)}")
    make_cwd_importable()
    try:
        return commands[words[0]](words[1:])
    except StorageFault as fault:
        console.error(str(fault))
        return console.STORAGE


def _import(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog=f"{typed('data')} import",
        description="Import episodes into a memory-mapped store; the same command goes on with an import that stopped.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store, new or of an unfinished import")
    parser.add_argument("--tasks", required=True, help=f"the tasks of the store: {_TASKS}")
    parser.add_argument("--task", metavar="NAME", help=_TASK)
    parser.add_argument("--keep-good", action="store_true", help="finish the store without the files that are wrong")
    args = parser.parse_args(argv)
    from pwm_torchrl.data.episodes import import_episodes
    from pwm_torchrl.envs.tasks import task_set

    store = import_episodes(
        args.sources, args.store, task_set(args.tasks), task=args.task, keep_good=args.keep_good, progress=True
    )
    _report_store(store)
    return console.OK


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


def _inspect(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog=f"{typed('data')} inspect", description="What a store or a source holds of each task.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE|STORE", help=f"a store; or a {_SOURCES}")
    parser.add_argument("--tasks", help=f"the tasks that a source numbers or names; a store knows its own: {_TASKS}")
    parser.add_argument("--task", metavar="NAME", help=_TASK)
    args = parser.parse_args(argv)
    from pwm_torchrl.data.episodes import inspect_source, inspect_store
    from pwm_torchrl.data.episodes.store import MANIFEST
    from pwm_torchrl.envs.tasks import task_set

    if len(args.sources) == 1 and (Path(args.sources[0]) / MANIFEST).exists():
        found = inspect_store(args.sources[0])
    elif args.tasks is None:
        raise ConfigurationError(
            f"{args.sources[0]} is no store; say which tasks it numbers or names: --tasks {_TASKS}"
        )
    else:
        found = inspect_source(args.sources, task_set(args.tasks), task=args.task, progress=True)
    return _report_inspection(found)


def _report_inspection(found: Inspection) -> int:
    """Prints what was found.

    Returns:
        The exit code: a failure if something is wrong with the data.
    """
    from pwm_torchrl.data.episodes.inspection import describe_shifts

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
        console.say("O and A: dimensions in use, of the task's; actions, rewards: the rows where they lie")
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


def _generate(argv: Sequence[str]) -> int:
    # MERGED

    return generate_main(argv)
