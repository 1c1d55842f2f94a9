"""Keys that are used only beside certain other choices: typed beside another choice, they are refused, not ignored.

Which options a kind of dynamics takes is read from its class's signature; the other dependences are declared here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch.groups import choice_file, group_choices
from pwm_torchrl.launch.validate import CHOICES, value_of

__all__ = ["RULES", "Rule", "check_meaning", "dynamics_rules"]

_DYNAMICS, _KIND, _FORM = "model.dynamics.", "model.dynamics.kind", "model.dynamics.parameterization"


@dataclass(frozen=True)
class Rule:
    """Keys, and what has to be chosen for them to be used.

    Attributes:
        keys (tuple of str): dotted keys; one that ends in a dot stands for its whole section.
        by (str): the key that decides; of several with commas between, which are numbers, one has to be above 0.
        values (tuple of str): its values beside which the keys are used; empty: any above 0.
    """

    keys: tuple[str, ...]
    by: str
    values: tuple[str, ...] = ()

    def covers(self, key: str) -> bool:
        """Whether the rule is about a key."""
        return any(key == each or (each.endswith(".") and key.startswith(each)) for each in self.keys)

    def allows(self, config: Config) -> bool:
        """Whether the keys are used beside what is chosen; of a choice that does not exist something else is said."""
        if not self.values:
            return any(value_of(config, each) > 0 for each in self.by.split(", "))
        value = value_of(config, self.by)
        known = value in CHOICES.get(self.by, ()) or (self.by == _KIND and "." in value)
        return value in self.values or not known


#: What is not told by signatures.
RULES = (
    Rule(
        ("model.loss.flow_matching_weight", "model.loss.flow_matching_source", "model.loss.self_consistency_weight"),
        _KIND,
        ("flow",),
    ),
    Rule(("model.loss.self_consistency_weight",), _FORM, ("residual_endpoint",)),
    Rule(("model.loss.flow_matching_source",), "model.loss.flow_matching_weight, model.loss.self_consistency_weight"),
    Rule(("model.num_bins", "model.vmin", "model.vmax", "model.reward_space"), "model.reward_head", ("two_hot",)),
    Rule(("logger.project", "logger.entity", "logger.group", "logger.mode"), "logger.kind", ("wandb",)),
    Rule(("data.",), "mode", ("pretrain", "extract")),
    Rule(
        tuple(f"cluster.{key}" for key in ("partition", "account", "qos", "constraint", "gres", "mem_gb", "nodes")),
        "cluster.kind",
        ("slurm", "auto"),
    ),
)


def dynamics_rules() -> list[Rule]:
    """A rule for each option of latent dynamics: of the kinds that take it, and of the parameterisations of a flow."""
    from pwm_torchrl.modules.dynamics.factory import CLASSES, options_of

    takes: dict[str, list[tuple[str, str | None]]] = {}
    for kind, form in CLASSES:
        for option in options_of(kind, form):
            takes.setdefault(option, []).append((kind, form))
    rules = []
    for option, places in takes.items():
        rules.append(Rule((_DYNAMICS + option,), _KIND, tuple(dict.fromkeys(kind for kind, _ in places))))
        if forms := tuple(form for _, form in places if form is not None):
            rules.append(Rule((_DYNAMICS + option,), _FORM, forms))
    return rules


def check_meaning(config: Config, typed: Mapping[str, Any]) -> None:
    """Checks what was typed against what is chosen.

    Args:
        config (Config): what was composed.
        typed (Mapping): the keys of the command line with their values; null, false and a weight of 0 ask for nothing.

    Raises:
        ConfigurationError: for the first key that is not used.
    """
    rules = list(RULES)
    if any(key.startswith(_DYNAMICS) for key in typed):
        rules += dynamics_rules()
    for key, value in typed.items():
        if value is None or value is False or (key.endswith("_weight") and value == 0):
            continue
        for rule in rules:
            if rule.covers(key) and not rule.allows(config):
                raise _refusal(config, key, value, rule)


def _refusal(config: Config, key: str, value: Any, rule: Rule) -> ConfigurationError:
    shown = str(value).lower() if isinstance(value, bool) else value
    if not rule.values:
        needed = rule.by.replace(", ", " or ")
        return ConfigurationError(f"{key}={shown} means nothing without a weight: set {needed}, or leave {key} out")
    return ConfigurationError(
        f"{key}={shown} means nothing with {rule.by}={value_of(config, rule.by)}: choose "
        f"{rule.by}={_any_of(rule.values)}{_presets(rule)}, or leave {key} out"
    )


def _any_of(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _presets(rule: Rule) -> str:
    """Choices of the deciding key's group that set it so, in brackets, if there are any."""
    section, _, rest = rule.by.rpartition(".")
    group = section.partition(".")[0] or "experiment"
    path = rule.by.split(".")[1:] if section else [rest]
    found = []
    for choice in group_choices()[group]:
        value: Any = yaml.safe_load(choice_file(group, choice).read_text(encoding="utf-8"))
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value in rule.values:
            found.append(choice)
    return f" ({group}={_any_of(found)})" if found else ""
