"""Small runs, the ways in which their files are damaged, and what the commands then say of them, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from training_cases import config, rows_of, run_with, stop_after

from pwm_torchrl.cli import console
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.resume import RunsToResume, find_runs_to_resume
from pwm_torchrl.report import document
from pwm_torchrl.run.checkpoints import SEAL_FILE, CheckpointStore
from pwm_torchrl.training import train

#: An id that no process has: whoever trained the run is gone.
NO_PROCESS = 2**22 + 1
SMALL = {
    "training.epochs": 4,
    "training.eval_every": 1,
    "training.eval_episodes": 1,
    "training.checkpoint_every": 1,
    "training.check_graphs": False,
    "training.gradient_profile_every": 0,
    "training.replay_capacity": 200,
    "env.episode_length": 10,
    "algorithm.model_updates": 1,
    "algorithm.first_model_updates": 1,
    "algorithm.critic_passes": 1,
    "memory.kind": "auto",
}
#: Runs that are damaged, by what is special about them.
BASES = ("stopped", "died", "on_disk")


def make(base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of four epochs that was stopped after three, and was submitted as a job of this machine."""
    changes = {**SMALL, "training.replay_storage": "disk"} if base == "on_disk" else SMALL
    run_with(monkeypatch, config(changes), folder, after_epoch=stop_after(3))
    claim = folder / "attempts" / "000001.json"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": NO_PROCESS}, indent=2))
    (folder / "job.json").write_text(json.dumps({"job_ids": [], "code": "code", "mem_mb": 1000, "gpus": 0}))
    if base == "died":
        (folder / "attempts" / "000001.outcome.json").unlink()
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "status": "running"}, indent=2))


def files_of(folder: Path) -> list[str]:
    """Every file of a run, relative to it."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# Damage ---------------------------------------------------------------------------------------------------------------


def _flipped(content: bytes, bit: int, seed: int) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[random.Random(seed).randrange(len(changed))] ^= bit
    return bytes(changed)


def _foreign(content: bytes) -> bytes:
    """What a program of another version might have written: of the same form, with other things in it."""
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
        return b"".join(json.dumps({key: ["x"] for key in line}).encode() + b"\n" for line in lines)
    except (ValueError, AttributeError, TypeError):
        pass
    try:
        return json.dumps({key: ["x"] for key in json.loads(content)}).encode()
    except (ValueError, TypeError):
        return b"a: [1, 2]\nb: c\n"


#: Ways in which a file's content is damaged. The high bit makes text no text; the lowest one may make another valid
#: text of it, as an editor could, which nothing can notice in a file without a checksum.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "duplicated": lambda content: content + content,
    "flipped_high": lambda content: _flipped(content, 0x80, 0),
    "flipped_low": lambda content: _flipped(content, 0x01, 1),
    "foreign": _foreign,
}
#: Further flips of the full product.
DAMAGES_IN_FULL = {
    **DAMAGES,
    "cut_by_one": lambda content: content[:-1],
    **{
        f"flipped_{bit:02x}_{seed}": lambda content, bit=bit, seed=seed: _flipped(content, bit, seed)
        for bit in (0x01, 0x10, 0x80)
        for seed in range(2, 5)
    },
}


# Commands -------------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a command said, and the numbers that it gave, if it gave any; of a report also its page."""

    text: str
    code: int
    numbers: Any
    page: str = ""

    def names(self, names: list[str], healthy: Answer) -> bool:
        """Whether it speaks of a file more often than of a healthy one, to which a page links, too."""
        return any(
            mine.count(name) > usual.count(name)
            for name in names
            for mine, usual in ((self.text, healthy.text), (self.page, healthy.page))
        )


@contextlib.contextmanager
def _heard() -> Iterator[io.StringIO]:
    """Both streams, and warnings as they would be printed."""
    heard = io.StringIO()
    with (
        contextlib.redirect_stdout(heard),
        contextlib.redirect_stderr(heard),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        yield heard
    heard.write("\n".join(str(each.message) for each in told))


def _status(run: Path, out: Path) -> tuple[int, Any]:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        code = run_command("status", [str(run)])
    print(heard.getvalue())
    return code, re.sub(r"\(-?\d+ min ago\)", "", heard.getvalue())


def _report(run: Path, out: Path) -> tuple[int, Any]:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        code = run_command("report", [str(run), "--out", str(out)])
    print(heard.getvalue())
    page = out / "report.html"
    return code, heard.getvalue() + (_without_times(page.read_text()) if page.exists() else "")


def _without_times(page: str) -> str:
    """A report's page as it would be of the same run at the same moment in the same folder."""
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", "", page)


def _evaluate(run: Path, out: Path) -> tuple[int, Any]:
    file = out / "result.json"
    code = run_command("evaluate", [str(run), "--episodes", "1", "--json", str(file)])
    (result,) = json.loads(file.read_text())
    print(result["error"])
    return code, [result[key] for key in ("epoch", "returns", "seed")]


def _resume(run: Path, out: Path) -> tuple[int, Any]:
    """As ``resume`` finds it; the job would then do what is done here."""
    found = find_runs_to_resume(Namespace(runs=[str(run)], failed=False))
    if not isinstance(found, RunsToResume):
        return found, None
    ((folder, cfg),) = found.runs
    try:
        summary = train(cfg, folder, resume=True)
    except Exception as error:
        if not console.is_ours(error):
            raise
        print(error)
        return console.FAILED, None
    told = [summary[key] for key in ("status", "epochs_done", "final_return", "peak_return", "random_return")]
    # That of a replay on disk names its writer, another one each time.
    trained = TRAINED[:-1] if cfg.training.replay_storage == "disk" else TRAINED
    return console.OK, [told, rows_of(folder), learned(folder, trained)]


#: What an online run trains, and what it collects.
TRAINED = ("actor", "critic", "model", "replay")


def learned(run: Path, trained: Sequence[str] = TRAINED) -> dict[str, int]:
    """Checksums of all that training changed, from the newest checkpoint, which has every part of it."""
    newest = CheckpointStore(run).latest()
    assert newest is not None
    listed = json.loads((newest / SEAL_FILE).read_text())["files"]
    found: dict[str, int] = {}
    for each in trained:
        part = {name: facts["crc32"] for name, facts in listed.items() if f"-{each}/" in name}
        assert part, f"{newest} holds no {each}"
        found |= part
    return found


COMMANDS = {"status": _status, "report": _report, "evaluate": _evaluate, "resume": _resume}


def ask(command: str, run: Path, out: Path) -> Answer:
    """What a command answers; its exit code 2 and its sentence where it refuses.

    Raises:
        Exception: whatever is no sentence of the package.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with _heard() as heard:
        code, numbers = _guarded(command, run, out)
    page = out / "report.html"
    return Answer(heard.getvalue(), code, _elsewhere(numbers, run.parent), page.read_text() if page.exists() else "")


def _elsewhere(numbers: Any, folder: Path) -> Any:
    """Text without the folder of the run, which differs."""
    return numbers.replace(str(folder), "") if isinstance(numbers, str) else numbers


def _guarded(command: str, run: Path, out: Path) -> tuple[int, Any]:
    numbers: list[Any] = []

    def main(argv: Any) -> int:
        code, found = COMMANDS[command](run, out)
        numbers.append(found)
        return code

    code = console.command(main)([])
    return code, numbers[0] if numbers else None


def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures, which take longer than all the rest."""
    monkeypatch.setattr(document, "_figures", lambda groups, comparison, notes: {})


def names_of(file: str) -> list[str]:
    """What a sentence may call a file: by its name, or, of one in a checkpoint, as damaged together with that."""
    parts = Path(file).parts
    names = [parts[-1]]
    names += [part for part in parts[:-1] if part.startswith("checkpoint-")]
    return names
