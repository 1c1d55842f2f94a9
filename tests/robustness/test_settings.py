"""Settings that nobody meant to write end in one sentence, or compose and come back from a file as they were."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hydra")

import malformed

from pwm_torchrl.cli.finalize import finalize
from pwm_torchrl.cli.prepare import HERE, preflight
from pwm_torchrl.cli.run_requests import parse
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config, save_config

#: How much a sentence may say beside what it quotes: what is wrong, and the choices that there are.
MOST_LINES, MOST_CHARACTERS = 4, 1500
#: Runs of a sweep that are looked at.
RUNS = 2


def attempt(case: malformed.Case, folder: Path) -> ConfigurationError | None:
    """What the command would do up to where it writes the first file; the sentence with which it is refused."""
    profiles = folder / "profiles" / "cluster"
    profiles.mkdir(parents=True, exist_ok=True)
    file = profiles / "mine.yaml"
    file.unlink(missing_ok=True)
    if case.profile is not None:
        file.write_text(case.profile, encoding="utf-8", errors="surrogateescape")
    try:
        request = parse(case.script, case.words)
        assert isinstance(request, int) or request.runs, "a command without a run"
        for run in [] if isinstance(request, int) else request.runs[:RUNS]:
            save_config(run.config, folder)
            assert _known(load_config(folder)) == _known(dataclasses.replace(run.config, run_dir=None))
            if case.script == "train":
                preflight([finalize(run.config, run.words)], HERE)
    except ConfigurationError as error:
        return error
    return None


def _known(tree: Any) -> Any:
    """A configuration as something that equals its copy, also where it holds NaN."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = dataclasses.asdict(tree)
    if isinstance(tree, dict):
        return {key: _known(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_known(value) for value in tree]
    return "nan" if isinstance(tree, float) and math.isnan(tree) else tree


def fault_of(case: malformed.Case, folder: Path) -> str | None:
    """What is wrong with how a case ends, if anything is."""
    try:
        refusal = attempt(case, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    if refusal is None:
        return None
    text = str(refusal)
    if not text.strip() or len(text.splitlines()) > MOST_LINES or "Traceback" in text or " object at 0x" in text:
        return f"no sentence: {text[:500]!r}"
    most = MOST_CHARACTERS + 3 * sum(map(len, case.words))
    return f"{len(text)} characters: {text[:300]}..." if len(text) > most else None


def test_each_ends_in_one_sentence_or_composes(
    settings_numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path / "profiles"))
    faults = {}
    for number in settings_numbers:
        case = malformed.case(number)
        fault = fault_of(case, tmp_path)
        if fault is not None:
            faults[number] = f"{case.script} {case.words} {case.profile!r}: {fault}"
    assert not faults, "\n".join(f"case {number}: {fault}" for number, fault in faults.items())
