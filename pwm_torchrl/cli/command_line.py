"""Parses the options of a command line, and reports unknown options and settings that have no effect."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pwm_torchrl.algorithm.declarations import declarations
from pwm_torchrl.choices import (
    CONFIG_DIR_VARIABLE,
    choice_file,
    group_choices,
    schema_choices,
    schema_keys,
)
from pwm_torchrl.cli.validate import value_of
from pwm_torchrl.commands import named, typed
from pwm_torchrl.config import ALGORITHMS, Config
from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "USAGE_RULES",
    "CommandLine",
    "UsageRule",
    "check_no_slurm_keys",
    "check_settings_used",
    "hydra_key_hint",
    "is_used",
    "option_hint",
    "parse_command_line",
    "unknown_option",
    "with_preset",
]

DRY_RUN, JSON, DRAFT, FORCE, CONFIG = "--dry-run", "--json", "--draft", "--force", "--cfg"

#: Options of each command, beside ``--help`` and ``--cfg job``, with the name of their value; "": no value.
OPTIONS: dict[str, dict[str, str]] = {
    "submit": {DRY_RUN: ""},
    "train": {},
    "pretrain": {},
    "plan": {JSON: "FILE"},
    "check_env": {},
    "doctor": {DRAFT: "NAME", FORCE: ""},
}
#: Preset of a command, unless the settings choose another one.
PRESET = {"pretrain": "pretrain"}
_EXAMPLES = {JSON: "plan.json", DRAFT: "my_cluster"}
HELP = frozenset(("-h", "--help", "help"))
_MULTIRUN = ("--multirun", "-m")
_CFG = (CONFIG, "-c")

#: Options of Hydra that are not supported here, and what to type instead.
_HYDRAS_OPTIONS: dict[tuple[str, ...], Callable[[], str]] = {
    ("--run", "-r"): lambda: "leave it out: settings alone start a run",
    ("--config-name", "-cn"): lambda: "there is one configuration; experiment=NAME chooses a preset of its settings",
    ("--config-path", "-cp"): lambda: f"the configuration is the package's own; {_own_files()}",
    ("--config-dir", "-cd"): lambda: _own_files(),
    ("--info", "-i"): lambda: f"{CONFIG} job prints the composed configuration, --help lists the choices",
    ("--package", "-p"): lambda: f"{CONFIG} job prints the whole configuration",
    ("--hydra-help",): lambda: "--help lists groups, keys and options",
    ("--shell-completion", "-sc"): lambda: "there is no shell completion; --help lists groups, choices and keys",
    ("--experimental-rerun",): lambda: f"{typed('resume')} RUN continues an unfinished run",
    ("--version",): lambda: "write python -c 'import pwm_torchrl; print(pwm_torchrl.__version__)'",
}

#: Prefixes of Hydra's own keys, and what to set instead; the first that matches is used.
_HYDRAS_KEYS: dict[str, Callable[[], str]] = {
    "hydra.run": lambda: "run_dir=PATH names the directory of a run, runs_dir=PATH where new ones are created",
    "hydra.sweep.": lambda: "runs_dir=PATH sets where the directories of several runs are created",
    "hydra.output_subdir": lambda: "run_dir=PATH names the directory of a run, which holds its config.yaml",
    "hydra.job.chdir": lambda: "runs never change the current folder; run_dir=PATH names the directory of a run",
    "hydra.job.env_set": lambda: "set the variable in the shell, or on nodes with cluster.setup=['export NAME=VALUE']",
    "hydra/launcher": lambda: "cluster=NAME sets where a run is trained",
    "hydra.launcher": lambda: "cluster=NAME and its keys, such as cluster.partition=gpu, set where a run is trained",
    "hydra/sweeper": lambda: f"{typed('submit')} KEY=A,B,C starts a run for each value",
    "hydra.sweeper": lambda: f"{typed('submit')} KEY=A,B,C starts a run for each value",
    "hydra.mode": lambda: f"{typed('submit')} KEY=A,B,C starts a run for each value",
    "hydra.searchpath": lambda: _own_files(),
    "hydra": lambda: f"--help lists the settings, {CONFIG} job prints their values",
}


def _own_files() -> str:
    return f"{CONFIG_DIR_VARIABLE}=FOLDER in the shell adds the cluster profiles FOLDER/cluster/*.yaml"


@dataclass
class CommandLine:
    """A parsed command line.

    Attributes:
        settings (list of str): words for the configuration, in their order.
        options (dict): values by option; ``""`` for an option without a value.
        help (bool): whether help is requested, in any position.
    """

    settings: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    help: bool = False

    @property
    def shows_config(self) -> bool:
        """Whether ``--cfg job`` requests the configuration instead of a run."""
        return CONFIG in self.options


def parse_command_line(script: str, words: Sequence[str]) -> CommandLine:
    """Separates the options of a command line from its settings.

    Long options ignore case, dashes and underscores: ``--dry-run``, ``--dry_run`` and ``--dryrun`` are the same.

    Args:
        script (str): the command, a key of :data:`OPTIONS`.
        words (sequence of str): the words after it.

    Raises:
        ConfigurationError: for an option that the command does not have, or one without its value; not if help is
            requested.
    """
    line = CommandLine(help=any(word in HELP for word in words))
    if line.help:
        return line
    known = {CONFIG: "job", "--resolve": "", "--multirun": "", **OPTIONS[script]}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            line.settings.append(word)
            continue
        written, equal, value = word.partition("=")
        option = _option(written, known)
        if option is None or (option == "--multirun" and script != "submit"):
            following = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else ""
            raise unknown_option(word, script, following)
        if known[option] and not equal:
            value = rest.pop(0) if rest else ""
        if known[option] and not value:
            raise ConfigurationError(_needs_value(option, known[option]))
        if equal and not known[option]:
            raise ConfigurationError(f"{word}: {option} takes no value; write {option}")
        line.options[option] = value
    return _checked(line)


def _checked(line: CommandLine) -> CommandLine:
    shown = line.options.get(CONFIG)
    if shown not in (None, "job"):
        raise ConfigurationError(
            f"{CONFIG} {shown}: only the configuration of the run can be printed; write {CONFIG} job"
        )
    if "--resolve" in line.options and shown is None:
        raise ConfigurationError(f"--resolve belongs to {CONFIG} job, which prints resolved values with or without it")
    return line


def _needs_value(option: str, what: str) -> str:
    if option == CONFIG:
        return f"{CONFIG} needs a value; write {CONFIG} job"
    name = {"FILE": "the name of a file", "NAME": "a name for the profile"}[what]
    return f"{option} needs {name}, as in {option} {_EXAMPLES[option]}"


def _option(written: str, known: Iterable[str]) -> str | None:
    """The option of a command that a word stands for; ``None`` if there is none."""
    if written in _MULTIRUN:
        return "--multirun"
    if written in _CFG:
        return CONFIG
    return next((each for each in known if _bare(each) == _bare(written)), None) if written[:2] == "--" else None


def _bare(option: str) -> str:
    return option.lower().replace("-", "").replace("_", "")


def unknown_option(word: str, script: str | None = None, following: str = "") -> ConfigurationError:
    """The error for an unknown option, with what to type instead.

    Args:
        word (str): the option as it was typed.
        script (str, optional): the command.
        following (str): the next word, which may be intended as its value. Defaults to ``""``.
    """
    written, _, value = word.partition("=")
    asked = f"unknown option {word}"
    for names, instead in _HYDRAS_OPTIONS.items():
        if written in names:
            return ConfigurationError(f"{asked}, which belongs to Hydra; {instead()}")
    if written in _MULTIRUN:
        return ConfigurationError(f"{asked}: this command starts one run; {typed('submit')} KEY=A,B,C starts several")
    elsewhere = next((other for other, options in OPTIONS.items() if _option(written, options)), None)
    if elsewhere not in (None, script):
        option = _option(written, OPTIONS[str(elsewhere)])
        what = OPTIONS[str(elsewhere)][str(option)]
        return ConfigurationError(f"{asked}; it is one of {typed(str(elsewhere))}: {f'{option} {what}'.strip()}")
    key = written.lstrip("-")
    if key.replace("-", "_") in {**schema_keys(), **group_choices()}:
        return ConfigurationError(
            f"{asked}; settings are written without dashes: {key.replace('-', '_')}={value or following or 'VALUE'}"
        )
    mine = ["--help", f"{CONFIG} job", *OPTIONS.get(script or "", {})]
    close = difflib.get_close_matches(written, mine, n=1, cutoff=0.5)
    near = f"; nearest: {close[0]}" if close else ""
    where = "" if script is None else f" of {named(script)}"
    return ConfigurationError(f"{asked}{near}; options{where}: {', '.join(mine)}; settings are written key=value")


def with_preset(script: str, words: Sequence[str]) -> list[str]:
    """The words, preceded by the command's preset unless they choose one."""
    chosen = any(word.partition("=")[0] == "experiment" for word in words)
    return list(words) if chosen or script not in PRESET else [f"experiment={PRESET[script]}", *words]


def option_hint(key: str) -> str:
    """Addition to the error about an unknown key that is the name of an option, such as ``dry_run=true``; or empty."""
    for script, options in OPTIONS.items():
        for option, what in options.items():
            if _bare(option) == _bare(key):
                return f"; it is an option: {typed(script)} {option} {what}".rstrip()
    if _bare(key) in ("help", "cfg", "multirun"):
        return f"; it is an option: --{_bare(key)}" + (" job" if _bare(key) == "cfg" else "")
    return ""


def hydra_key_hint(key: str) -> str:
    """What to set instead of one of Hydra's own keys."""
    return next(instead() for beginning, instead in _HYDRAS_KEYS.items() if key.startswith(beginning))


_KIND, _FORM = "model.dynamics.kind", "model.dynamics.parameterization"


def _covered(key: str, keys: Iterable[str]) -> bool:
    """Whether a key is among some that may end in a dot, see :class:`UsageRule`."""
    return any(key == each or (each.endswith(".") and key.startswith(each)) for each in keys)


@dataclass(frozen=True)
class UsageRule:
    """Keys that have an effect only with certain values of another key.

    Attributes:
        keys (tuple of str): dotted keys; one that ends in a dot stands for its whole section.
        depends_on (str): the key that decides, or several numeric keys separated by commas, one of which must be above
            0.
        values (tuple): the values of ``depends_on`` with which the keys are used; empty: any number above 0;
            ``("*",)``: any value but null.
        except_value (str, optional): the only value of ``depends_on`` with which they are not used; replaces
            ``values``.
        only_if (tuple, optional): another key and its value; the rule applies only with that value.
    """

    keys: tuple[str, ...]
    depends_on: str
    values: tuple[Any, ...] = ()
    except_value: str | None = None
    only_if: tuple[str, str] | None = None

    def covers(self, key: str) -> bool:
        """Whether the rule applies to a key."""
        return _covered(key, self.keys)

    def allows(self, config: Config) -> bool:
        """Whether the keys are used with this configuration; unknown choices are reported elsewhere."""
        if self.only_if is not None and value_of(config, self.only_if[0]) != self.only_if[1]:
            return True
        if self.except_value is not None:
            return value_of(config, self.depends_on) != self.except_value
        if self.depends_on == "logger.kind" and set(self.values) & set(config.logger.also):
            return True  # one of several loggers
        if not self.values:
            return any(value_of(config, each) > 0 for each in self.depends_on.split(", "))
        value = value_of(config, self.depends_on)
        if self.values == ANY:
            return value is not None
        choices = schema_choices().get(self.depends_on)
        known = choices is None or value in choices or (self.depends_on == _KIND and "." in value)
        return value in self.values or not known


ANY = ("*",)


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


_ALGORITHM = "algorithm.name"
_OF_REPLAY = ("training.replay_capacity", "training.replay_storage", "memory.disk_above_gib")
#: What an algorithm that steps a differentiable environment has no use for, beside what its class ignores.
_OF_MODEL_AND_REPLAY = (
    "model",
    "model.dynamics.",
    "model.loss.",
    *_keys("model", "reward_head num_bins vmin vmax reward_space termination_head"),
    *_keys("size", "latent_dim units encoder_units simnorm_dim"),
    "memory.model_micro_batch",
    *_OF_REPLAY,
)
#: Cluster keys that only SLURM jobs use.
SLURM_KEYS = _keys(
    "cluster",
    "partition account qos constraint gres mem_gib host_gib nodes gpu gpus cpus time time_min max_time_min "
    "signal_delay_s setup array_parallelism comment sbatch",
)

#: The options of each kind of dynamics are defined by the signatures in :mod:`pwm_torchrl.modules.dynamics`. They are
#: repeated here because importing those takes seconds (torch); a test compares the two.
USAGE_RULES = (
    UsageRule(
        tuple(
            f"model.dynamics.{option}"
            for option in (
                "parameterization",
                "solver",
                "substeps",
                "condition_on_start",
                "time_features",
                "condition_on_step_size",
                "checkpoint_substeps",
                "imagination_substeps",
            )
        ),
        _KIND,
        ("flow",),
    ),
    UsageRule(
        ("model.dynamics.condition_on_start", "model.dynamics.time_features"), _FORM, ("residual_endpoint", "tangent")
    ),
    UsageRule(
        ("model.dynamics.condition_on_step_size", "model.dynamics.imagination_substeps"), _FORM, ("residual_endpoint",)
    ),
    UsageRule(
        ("model.loss.flow_matching_weight", "model.loss.flow_matching_source", "model.loss.self_consistency_weight"),
        _KIND,
        ("flow",),
    ),
    UsageRule(("model.loss.self_consistency_weight",), _FORM, ("residual_endpoint",)),
    UsageRule(
        ("model.loss.few_step_weight", "model.loss.few_step_rollout"), "model.dynamics.imagination_substeps", ANY
    ),
    UsageRule(
        ("model.loss.flow_matching_source",), "model.loss.flow_matching_weight, model.loss.self_consistency_weight"
    ),
    UsageRule(("model.num_bins", "model.vmin", "model.vmax", "model.reward_space"), "model.reward_head", ("two_hot",)),
    UsageRule(
        tuple(
            f"logger.{key}" for key in ("project", "entity", "group", "mode", "job_type", "tags", "notes", "artifacts")
        ),
        "logger.kind",
        ("wandb",),
    ),
    UsageRule(("data.",), "mode", ("pretrain", "extract")),
    UsageRule(("init_from_parts",), "init_from", ANY),
    UsageRule(("data.scratch_dir",), "data.stage", ("scratch",)),
    UsageRule((*SLURM_KEYS, "cluster.sbatch."), "cluster.kind", ("slurm", "auto")),
    # Keys that only some modes use.
    UsageRule(("task", "world_model", "world_model_sha256", "pretraining", "finetune"), "mode", ("extract",)),
    # Only task=all reads these keys; the runs that it expands to do not.
    UsageRule(("pretraining",), "world_model", (None,), only_if=("mode", "extract")),
    UsageRule(("tasks", "pretraining"), "task", ("all",), only_if=("mode", "extract")),
    UsageRule(
        (
            *_keys("algorithm", "collect_steps random_steps normalize_rewards first_model_updates updates_per_step"),
            "algorithm.exploration_noise",
            *_OF_REPLAY,
        ),
        "mode",
        ("online",),
    ),
    UsageRule(_keys("algorithm", "normalize_observations"), "mode", ("online", "pretrain")),
    # A pre-training uses the horizon only as length of the slices, and only if slice_steps does not set that.
    UsageRule(("algorithm.horizon",), "algorithm.slice_steps", (None,), only_if=("mode", "pretrain")),
    UsageRule(
        ("size.task_dim", *_keys("data", "balanced validation_fraction validation_slices")), "mode", ("pretrain",)
    ),
    UsageRule(
        (
            *_keys("size", "actor_units critic_units num_critics"),
            *_keys("algorithm", "lmbda detach max_updates critic_batch critic_steps target_rate"),
            *_keys(
                "algorithm",
                "temperature temperature_lr target_entropy state_std entropy_weight normalize_returns actor_starts",
            ),
            *_keys("algorithm", "actor_lr critic_lr actor_betas critic_betas actor_grad_norm critic_grad_norm"),
            *_keys("algorithm", "actor_batch actor_updates critic_passes critic_minibatches log_std_init log_std_min"),
            *_keys("memory", "actor_micro_batch critic_micro_batch"),
            "training.eval_episodes",
        ),
        "mode",
        ("online", "extract"),
    ),
    UsageRule(
        _keys("algorithm", "model_lr model_betas model_grad_norm model_updates"),
        "finetune",
        (True,),
        only_if=("mode", "extract"),
    ),
    UsageRule(("memory.device_gib",), "device", except_value="cpu"),
    UsageRule(("runs_dir",), "run_dir", (None,)),
)


#: Suffixes of numeric keys whose value 0 means that nothing is done.
_COUNTS = ("_weight", "_steps", "_episodes", "_fraction", ".gpus")


def turns_off(key: str, value: Any) -> bool:
    """Whether a value turns its key off: null, false, an empty list, or 0 for a key such as a weight or a number."""
    if isinstance(value, (bool, str)) or value is None:
        return value is None or value is False
    if isinstance(value, (int, float)):
        return value == 0 and key.endswith(_COUNTS)
    return not value


def check_settings_used(config: Config, typed: Mapping[str, Any], *, model_is_known: bool = True) -> None:
    """Checks that every key of the command line has an effect with this configuration.

    Args:
        config (Config): the composed configuration.
        typed (Mapping): the keys of the command line with their values; those that turn a key off are accepted.
        model_is_known (bool): whether the configuration describes the world model. In an extraction it does only after
            the world model's file was read; until then, rules about the model are skipped. Defaults to ``True``.

    Raises:
        ConfigurationError: for the first key without an effect.
    """
    rules = [rule for rule in USAGE_RULES if model_is_known or not rule.depends_on.startswith("model.")]
    for key, value in typed.items():
        if turns_off(key, value):
            continue
        if not is_used(key, config.algorithm.name, config.mode):
            raise _of_other_algorithms(config, key, value)
        for rule in rules:
            if rule.covers(key) and not rule.allows(config):
                raise _refusal(config, key, value, rule)
    counts_sets = all(is_used(key, config.algorithm.name, config.mode) for key in _OF_SETS)
    if "algorithm.updates_per_step" in typed and counts_sets:
        _check_sets(config)


_OF_SETS = _keys("algorithm", "updates_per_step max_updates")


def is_used(key: str, algorithm: str, mode: str) -> bool:
    """Whether an algorithm uses a key, as its class declares.

    Args:
        key (str): a dotted key.
        algorithm (str): ``algorithm.name``.
        mode (str): the mode of the run.
    """
    declared = declarations(algorithm)
    if declared.simulates and _covered(key, _OF_MODEL_AND_REPLAY):
        return False
    section, _, name = key.partition(".")
    return section != "algorithm" or not declared.ignores(name, mode)


def _of_other_algorithms(config: Config, key: str, value: Any) -> ConfigurationError:
    name = config.algorithm.name
    users = tuple(sorted(each for each in ALGORITHMS if is_used(key, each, config.mode)))
    refusal = _refusal(config, key, value, UsageRule((key,), _ALGORITHM, users))
    if name in {*ALGORITHMS, *ALGORITHMS.values()} or not key.startswith("algorithm."):
        return refusal
    return ConfigurationError(f"{refusal}; if {name} uses it, its attribute `ignored` must not contain it")


def _check_sets(config: Config) -> None:
    """The sets of updates that were asked for are not more than an epoch may have."""
    a = config.algorithm
    steps = a.steps_per_env * int(config.env.get("num_envs") or 1)
    sets = a.wanted_sets(steps)
    if sets > a.max_updates:
        raise ConfigurationError(
            f"algorithm.updates_per_step={a.updates_per_step:g} asks for {sets} sets of updates after the "
            f"{steps} agent steps of an epoch, more than algorithm.max_updates={a.max_updates} allows; set "
            f"algorithm.max_updates={sets}, or fewer updates per step"
        )


def check_no_slurm_keys(typed: Mapping[str, Any], instead: str, remedy: str) -> None:
    """Checks that the command line sets no key that only SLURM jobs use, for a run that is not a SLURM job.

    Args:
        typed (Mapping): the keys of the command line with their values.
        instead (str): clause that says what happens instead of a job: ``this run trains on this machine``.
        remedy (str): clause that says what to do if a job was intended.

    Raises:
        ConfigurationError: for the first such key.
    """
    for key, value in typed.items():
        if not turns_off(key, value) and any(key == each or key.startswith(f"{each}.") for each in SLURM_KEYS):
            raise ConfigurationError(
                f"{key}={_written(value)} is for SLURM jobs, but {instead}; leave it out, or {remedy}"
            )


def _refusal(config: Config, key: str, value: Any, rule: UsageRule) -> ConfigurationError:
    shown = _written(value)
    if rule.except_value is not None:
        return ConfigurationError(
            f"{key}={shown} has no effect with {rule.depends_on}={rule.except_value}: choose another "
            f"{rule.depends_on}, or leave {key} out"
        )
    if rule.values == (None,):
        return ConfigurationError(
            f"{key}={shown} has no effect beside {rule.depends_on}={value_of(config, rule.depends_on)}: leave one of "
            f"them out, or set {rule.depends_on}=null"
        )
    if rule.values == ANY:
        return ConfigurationError(
            f"{key}={shown} has no effect without {rule.depends_on}: set that, or leave {key} out"
        )
    if not rule.values:
        needed = rule.depends_on.replace(", ", " or ")
        return ConfigurationError(f"{key}={shown} has no effect without a weight: set {needed}, or leave {key} out")
    return ConfigurationError(
        f"{key}={shown} has no effect with {rule.depends_on}={_written(value_of(config, rule.depends_on))}: choose "
        f"{rule.depends_on}={_any_of([str(_written(each)) for each in rule.values])}{_presets(rule)}, "
        f"or leave {key} out"
    )


def _written(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _any_of(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _presets(rule: UsageRule) -> str:
    """Choices of the group of ``rule.depends_on`` that set it to an accepted value, in brackets, or nothing."""
    section, _, rest = rule.depends_on.rpartition(".")
    group = section.partition(".")[0] or "experiment"
    parts = rule.depends_on.split(".")
    paths = [parts, parts[1:] if section else [rest]]  # in a file for all groups, or for one
    found = []
    for choice in group_choices().get(group, []):  # not every section is a group
        content: Any = yaml.safe_load(choice_file(group, choice).read_text(encoding="utf-8"))
        for path in paths:
            value = content
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and value in rule.values:
                found.append(choice)
                break
    return f" ({group}={_any_of(found)})" if found else ""
