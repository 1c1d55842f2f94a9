"""``task=all`` without a world model: a pre-training first, then a policy for every task in what it made."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.cli.compose import EVERY_TASK, compose, compose_unchecked, values_of
from pwm_torchrl.cli.modes import of_world_model
from pwm_torchrl.cli.prepare import Prepared, compose_all
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError

__all__ = ["Chain", "composed", "lacks_world_model"]

#: What concerns both stages; what belongs to a world model goes to its pre-training, the rest to the policies.
SHARED = ("tasks", "data", "cluster", "logger", "memory", "runs_dir", "device")
#: Begins a word that is for the pre-training alone.
PREFIX = "pretraining."


@dataclass
class Chain:
    """Runs of one command, the first of which makes the world model of the others.

    Attributes:
        pretraining (Prepared): makes the world model.
        policies (list of Prepared): need it.
        folder (Path): describes the world model, until the pre-training has a directory of its own.
    """

    pretraining: Prepared
    policies: list[Prepared]
    folder: Path

    def place(self, run_dir: Path) -> None:
        """The pre-training has its directory: that is where the policies find their world model."""
        for each in self.policies:
            each.config.world_model = str(run_dir)
            each.words[:] = [
                f"world_model={run_dir}" if word.startswith("world_model=") else word for word in each.words
            ]

    @property
    def description(self) -> str:
        """What the command does, in a line."""
        count = len(self.policies)
        what = "a policy for its task" if count == 1 else f"{count} policies in it"
        return f"no world_model is given: {self.pretraining.words[0]} makes one first, then come {what}"


def lacks_world_model(words: Sequence[str]) -> bool:
    """Whether the words ask for a policy per task without saying in which world model, and can be given one."""
    if EVERY_TASK not in words:
        return False
    config = _first(words)
    return config.mode == "extract" and config.world_model is None and config.pretraining is not None


@contextlib.contextmanager
def composed(words: Sequence[str]) -> Iterator[Chain]:
    """Both stages, composed and checked before anything is written to where runs go.

    Raises:
        ConfigurationError: for whatever cannot work in either.
    """
    from pwm_torchrl.run.validation import announce

    own = [f"experiment={_first(words).pretraining}", *_of_pretraining(words)]
    try:
        pretraining = Prepared(compose(own), own)
    except ConfigurationError as error:
        raise ConfigurationError(f"in the pre-training: {error}") from error
    with tempfile.TemporaryDirectory(prefix="pwm_torchrl_") as name:
        folder = Path(name) / "world_model_to_come"
        announce(pretraining.config, folder)
        rest = [word for word in words if not word.startswith(PREFIX) and not of_world_model(_key(word))]
        yield Chain(pretraining, compose_all([*rest, f"world_model={folder}"]), folder)


def _first(words: Sequence[str]) -> Config:
    kept = [word for word in words if word != EVERY_TASK and not word.startswith(PREFIX)]
    return compose_unchecked([values_of(word)[0] for word in kept])


def _of_pretraining(words: Sequence[str]) -> list[str]:
    """Those of the words that concern the pre-training.

    Raises:
        ConfigurationError: if one of them has several values: there is one pre-training.
    """
    keys = {word: _key(word) for word in words}
    chosen = [word for word, key in keys.items() if key.partition(".")[0] in SHARED or of_world_model(key)]
    chosen += [word.removeprefix(PREFIX) for word in words if word.startswith(PREFIX)]
    for word in chosen:
        if len(values_of(word)) > 1:
            raise ConfigurationError(
                f"{word} would need several pre-trainings; pre-train each by itself, then give {EVERY_TASK} a "
                "world_model=DIRECTORY"
            )
    return chosen


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
