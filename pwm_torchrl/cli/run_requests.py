"""Requests of the commands that take settings: parses, composes and checks their words without torch.

Typos are reported and help is printed here, before the modules that do the work are imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import DRAFT, FORCE, CommandLine, parse_command_line, with_preset
from pwm_torchrl.cli.compose import as_yaml, compose, compose_unchecked
from pwm_torchrl.cli.derived_settings import is_world_model_key, known_action_repeat
from pwm_torchrl.cli.help import doctor_help, help_text
from pwm_torchrl.cli.sweeps import EVERY_TASK, PRETRAINING_PREFIX, expand, values_of
from pwm_torchrl.cli.validate import require_runnable
from pwm_torchrl.cluster.job import require_submitit
from pwm_torchrl.commands import named
from pwm_torchrl.config import Config
from pwm_torchrl.distributed.rendezvous import is_replica
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "ComposedRun",
    "RunRequest",
    "lacks_world_model",
    "parse",
    "refuse_shared_directories",
    "split_stages",
]

#: Keys of both stages. Keys of the world model apply to the pre-training, all others to the policies.
SHARED_KEYS = ("tasks", "data", "cluster", "logger", "memory", "runs_dir", "device")
#: Keys in these sections that only one of the two stages uses.
PRETRAINING_KEYS = ("data.balanced", "data.validation_fraction", "data.validation_slices")
POLICY_KEYS = ("memory.actor_micro_batch", "memory.critic_micro_batch")


@dataclass(frozen=True)
class ComposedRun:
    """A run that can be submitted.

    Attributes:
        config (Config): the whole run.
        words (list of str): the words from which it was composed.
    """

    config: Config
    words: list[str]


@dataclass(frozen=True)
class RunRequest:
    """The request of a command line.

    Attributes:
        script (str): the command.
        line (CommandLine): the parsed command line.
        runs (list of ComposedRun): composed runs, which are to be completed; empty on ranks other than 0. For
            ``task=all``, they are those of a single task.
    """

    script: str
    line: CommandLine
    runs: list[ComposedRun] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The settings of the command line."""
        return self.line.settings


def parse(script: str, words: Sequence[str]) -> RunRequest | int:
    """Parses a command line; prints the help, or a configuration that is already complete, if requested.

    Args:
        script (str): the command, a key of :data:`~pwm_torchrl.cli.command_line.OPTIONS`.
        words (sequence of str): the words after it.

    Returns:
        RunRequest or int: the request, or the exit code if nothing is left to do.

    Raises:
        ConfigurationError: for invalid words.
    """
    line = parse_command_line(script, words)
    if line.help:
        console.say(doctor_help() if script == "doctor" else help_text(script))
        return console.OK
    if script in ("train", "pretrain") and is_replica() and not line.shows_config:
        return RunRequest(script, line)
    if FORCE in line.options and DRAFT not in line.options:
        raise ConfigurationError(f"{FORCE} overwrites a draft; give {DRAFT} NAME too")
    request = RunRequest(script, line, _composed(script, line.settings))
    if line.shows_config:
        return _shown(request)
    if script in ("train", "pretrain"):
        _check_here(script, request.runs[0].config)
    if script == "submit":
        require_submitit()
    return request


def _composed(script: str, settings: Sequence[str]) -> list[ComposedRun]:
    """The composed runs of the settings; only ``submit`` accepts several."""
    if script != "submit":
        words = with_preset(script, settings)
        return [ComposedRun(compose(words), words)]
    if lacks_world_model(settings):
        own, settings = split_stages(settings)
        compose_pretraining(own)
    runs = [ComposedRun(compose(each), each) for each in expand(settings)]
    refuse_shared_directories(runs)
    return runs


def refuse_shared_directories(runs: Sequence[ComposedRun]) -> None:
    """Rejects several runs in one directory.

    Raises:
        ConfigurationError: if two of the runs have the same ``run_dir``.
    """
    folders = Counter(run.config.run_dir for run in runs if run.config.run_dir is not None)
    for folder, count in folders.items():
        if count > 1:
            raise ConfigurationError(
                f"run_dir={folder} is one directory, but this command starts {count} runs; give runs_dir=..., or a "
                "run_dir for each run, such as run_dir='runs/${model.name}_s${seed}' in quotes"
            )


def _check_here(script: str, config: Config) -> None:
    if script == "pretrain" and config.mode != "pretrain":
        raise ConfigurationError(
            f"{named(script)} pre-trains world models, but this is mode={config.mode}; use {named('train')}"
        )
    require_runnable(config)


def _shown(request: RunRequest) -> RunRequest | int:
    """Prints the configuration and returns the exit code, or returns the request if it must be completed first."""
    if len(request.runs) > 1:
        console.say(f"# the first of {len(request.runs)} runs: {' '.join(request.runs[0].words)}")
    config = request.runs[0].config
    counted = config.training.steps is None or known_action_repeat(config) is not None
    if config.mode == "online" and counted and "." not in config.model.dynamics.kind:
        console.say(as_yaml(config))
        return console.OK
    return request


# ``task=all`` without a world model: a pre-training, then a policy for every task -------------------------------------


def lacks_world_model(words: Sequence[str]) -> bool:
    """Whether the words contain ``task=all`` without a world model, but with a preset for a pre-training."""
    if EVERY_TASK not in words:
        return False
    config = _first(words)
    return config.mode == "extract" and config.world_model is None and config.pretraining is not None


def split_stages(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the pre-training, and those of the policies, without ``world_model``.

    Raises:
        ConfigurationError: if a word sweeps over a key of the pre-training, of which there is only one.
    """
    own = [f"experiment={_first(words).pretraining}", *_of_pretraining(words)]
    policies = [
        word for word in words if not word.startswith(PRETRAINING_PREFIX) and not is_world_model_key(_key(word))
    ]
    return own, [word for word in policies if _key(word) not in ("pretraining", *PRETRAINING_KEYS)]


def compose_pretraining(words: list[str]) -> ComposedRun:
    """Compose the pre-training.

    Raises:
        ConfigurationError: for invalid words.
    """
    try:
        return ComposedRun(compose(words), words)
    except ConfigurationError as error:
        raise ConfigurationError(f"in the pre-training: {error}") from error


def _first(words: Sequence[str]) -> Config:
    kept = [word for word in words if word != EVERY_TASK and not word.startswith(PRETRAINING_PREFIX)]
    return compose_unchecked([values_of(word)[0] for word in kept])


def _of_pretraining(words: Sequence[str]) -> list[str]:
    """The words that apply to the pre-training."""
    keys = {word: _key(word) for word in words}
    chosen = [word for word, key in keys.items() if key.partition(".")[0] in SHARED_KEYS or is_world_model_key(key)]
    chosen = [word for word in chosen if keys[word] not in POLICY_KEYS]
    if any(
        word.startswith(f"{PRETRAINING_PREFIX}run_dir=") for word in words
    ):  # runs_dir then applies only to the policies
        chosen = [word for word in chosen if keys[word] != "runs_dir"]
    chosen += [word.removeprefix(PRETRAINING_PREFIX) for word in words if word.startswith(PRETRAINING_PREFIX)]
    for word in chosen:
        if len(values_of(word)) > 1:
            raise ConfigurationError(
                f"{word} would need several pre-trainings; run each by itself, then set {EVERY_TASK} with its "
                "world_model=DIRECTORY"
            )
    return chosen


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
