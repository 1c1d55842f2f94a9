"""``task=all`` without a world model: a pre-training first, then a policy for every task in what it made."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.cli.complete import complete
from pwm_torchrl.cli.prepare import compose_all
from pwm_torchrl.cli.requests import Prepared, both_stages, compose_pretraining
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.validation import announce

__all__ = ["Chain", "composed"]


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


@contextlib.contextmanager
def composed(words: Sequence[str]) -> Iterator[Chain]:
    """Both stages, composed and checked before anything is written to where runs go.

    Raises:
        ConfigurationError: for whatever cannot work in either.
    """
    own, rest = both_stages(words)
    pretraining = compose_pretraining(own)
    try:
        complete(pretraining.config, own)
    except ConfigurationError as error:
        raise ConfigurationError(f"in the pre-training: {error}") from error
    with tempfile.TemporaryDirectory(prefix="pwm_torchrl_") as name:
        folder = Path(name) / "world_model_to_come"
        announce(pretraining.config, folder)
        yield Chain(pretraining, compose_all([*rest, f"world_model={folder}"]), folder)
