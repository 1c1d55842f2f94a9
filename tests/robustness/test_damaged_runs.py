"""Every kind of file of a run, damaged: each command works, or says in one sentence which file it cannot read."""

from __future__ import annotations

import shutil
from pathlib import Path

import damaged_runs
import pytest
from damaged_runs import DAMAGES, Answer, ask, files_of, names_of
from training_cases import no_curves

from pwm_torchrl.run.checkpoints import CheckpointStore

__all__ = ["no_curves"]

pytest.importorskip("hydra")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs, made once."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for base in damaged_runs.BASES:
            made[base] = tmp_path_factory.mktemp(base) / "run"
            patch.setattr("pwm_torchrl.run.train.write_curves", lambda run_dir: (run_dir / "curves.png").touch())
            damaged_runs.make(base, made[base], patch)
    return made


@pytest.fixture(scope="module")
def healthy(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answer]:
    """What the commands answer of the undamaged runs."""
    place = tmp_path_factory.mktemp("healthy")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        damaged_runs.no_figures(patch)
        patch.setattr("pwm_torchrl.run.train.write_curves", lambda run_dir: None)
        for base, run in runs.items():
            for command in damaged_runs.COMMANDS:
                copy = place / "run"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(run, copy)
                found[base, command] = ask(command, copy, place / "out")
    return found


#: Files of a run; NEWEST and BEST are its checkpoints, whose components are alike to everything that reads them.
FILES = {
    "stopped": (
        "config.yaml", "summary.json", "metrics.csv", "events.jsonl", "memory_plan.json", "memory_plan.txt",
        "compile.json", "job.json", "README.md", "curves.png", "attempts/000001.json", "attempts/000001.outcome.json",
        "NEWEST/manifest.json", "NEWEST/checksums.json", "NEWEST/*-loop/state.safetensors",
        "NEWEST/*-model/state.safetensors", "BEST/manifest.json", "BEST/checksums.json",
        "BEST/*-actor/state.safetensors",
    ),
    "died": ("summary.json", "attempts/000001.json"),
    "on_disk": ("replay/replay.json", "replay/segment_*.bin"),
}  # fmt: skip


def resolved(run: Path, pattern: str) -> list[str]:
    """The files of a run that a pattern of :data:`FILES` stands for."""
    store = CheckpointStore(run)
    newest, best = store.latest(), store.best()
    assert newest is not None
    assert best is not None
    for word, folder in (("NEWEST", newest), ("BEST", best)):
        if pattern.startswith(word):
            within = pattern.removeprefix(word + "/").replace("*-", "components/*-")
            return [each.relative_to(run).as_posix() for each in sorted(folder.glob(within))]
    return [each.relative_to(run).as_posix() for each in sorted(run.glob(pattern)) if each.is_file()]


def fault_of(answer: Answer, healthy: Answer, file: str, damage: str) -> str | None:
    """What is wrong with an answer, if anything is."""
    if "Traceback" in answer.text + answer.page:
        return f"a traceback: {answer.text[-400:]}"
    if answer.code == healthy.code and answer.numbers == healthy.numbers:
        return None
    if answer.names(names_of(file), healthy):
        return None
    if damage in MAY_BE_EDITED and "checkpoints" not in file and not file.endswith(".bin"):
        return None
    return (
        f"exit code {answer.code}, another answer, and the file is not named: {answer.text[-600:]!r}, numbers "
        f"{str(answer.numbers)[:300]!r} in the place of {str(healthy.numbers)[:300]!r}"
    )


#: Damage that may leave another valid text.
MAY_BE_EDITED = [
    name for name in damaged_runs.DAMAGES_IN_FULL if name.startswith(("flipped_low", "flipped_01", "flipped_10"))
]


def faults(
    run: Path, file: str, trials: list[tuple[str, str]], healthy: dict[str, Answer], place: Path
) -> dict[tuple[str, str], str]:
    """Faults of some commands on some damages of a file, by both."""
    found = {}
    for command, damage in trials:
        copy = place / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (copy / file).write_bytes(damaged_runs.DAMAGES_IN_FULL[damage]((copy / file).read_bytes()))
        try:
            fault = fault_of(ask(command, copy, place / "out"), healthy[command], file, damage)
        except Exception as error:  # noqa: BLE001 - whatever is no sentence is what is looked for
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        if fault is not None:
            found[command, damage] = fault
    return found


def trials_of(number: int, whole: bool) -> list[tuple[str, str]]:
    """Commands with damages: all with all, or so many that each command meets each damage on one file or another."""
    if whole:
        return [(command, damage) for command in damaged_runs.COMMANDS for damage in damaged_runs.DAMAGES_IN_FULL]
    names = list(DAMAGES)
    few = {"evaluate": 1, "resume": 1, "report": 1}
    trials = [("status", damage) for damage in names]
    for command, count in few.items():
        trials += [(command, names[(number + step * 3) % len(names)]) for step in range(count)]
    return trials


CASES = [(base, pattern) for base, patterns in FILES.items() for pattern in patterns]


@pytest.mark.parametrize(("base", "pattern"), CASES, ids=lambda each: each)
def test_works_or_names_the_file(base, pattern, runs, healthy, tmp_path, monkeypatch, request):
    damaged_runs.no_figures(monkeypatch)
    whole = request.config.getoption("robust_full")
    mine = {command: answer for (of, command), answer in healthy.items() if of == base}
    found = resolved(runs[base], pattern)
    assert found
    said = {}
    for file in found:
        trials = trials_of(CASES.index((base, pattern)), whole)
        said |= {(file, *key): fault for key, fault in faults(runs[base], file, trials, mine, tmp_path).items()}
    assert not said, "\n".join(f"{' '.join(key)}: {fault}" for key, fault in said.items())


def test_every_kind_of_file_is_damaged(runs):
    """Of a checkpoint, one component stands for all, whose checksums one function compares."""
    for base, run in runs.items():
        listed = {file for of, pattern in CASES if of in (base, "stopped") for file in resolved(run, pattern)}
        others = [file for file in files_of(run) if file not in listed and not file.startswith("checkpoints/")]
        assert not others


def test_a_link_to_a_file_does_not_name_its_damage():
    """A report links to files of the run, whether they are damaged or not."""
    link = "<a href=events.jsonl>events.jsonl</a>"
    healthy = Answer("written", 0, [1], link)
    told = "events.jsonl is damaged: "
    for answer, fault in (
        (Answer("written", 0, [2], link), True),
        (Answer("written", 0, [2], told + link), False),
        (Answer(told + "written", 0, [2], link), False),
        (Answer(told, 2, None), False),
        (Answer("", 2, None), True),
    ):
        assert (fault_of(answer, healthy, "events.jsonl", "truncated") is not None) == fault
