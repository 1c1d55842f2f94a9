"""Help tells what a run without words does, in 80 columns, at once."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.choices import default_choices, group_choices
from pwm_torchrl.cli.command_line import OPTIONS, with_preset
from pwm_torchrl.cli.compose import compose_unchecked
from pwm_torchrl.cli.help import help_text
from pwm_torchrl.cli.validate import value_of

SCRIPTS = [script for script in OPTIONS if script != "doctor"]  # which has a help of its own


@pytest.mark.parametrize("script", SCRIPTS)
def test_keys_are_shown_with_the_values_that_they_have(script):
    config = compose_unchecked(with_preset(script, []))
    shown = dict(re.findall(r"^  ([\w.]+)=(\S+)  ", help_text(script), re.MULTILINE))
    assert {"seed", "training.epochs", "algorithm.horizon", "model.dynamics.substeps"} <= shown.keys()
    for key, value in shown.items():
        if not value.isupper():  # PATH stands for what has no default
            assert value == str(value_of(config, key)).lower()


@pytest.mark.parametrize("script", SCRIPTS)
def test_groups_are_shown_with_their_defaults(script):
    text = " ".join(help_text(script).split())
    for group, choice in default_choices().items():
        assert re.search(rf" {group} [^()]*(\([^d][^()]*\)[^()]*)?\(default {choice}\)", text), group
    assert ("(default pretrain)" in text) == (script == "pretrain")


def test_the_defaults_of_the_groups_are_what_is_composed():
    choices, config = default_choices(), compose_unchecked([])
    assert choices.keys() <= group_choices().keys()
    assert (choices["model"], choices["size"]) == (config.model.name, config.size.name)
    assert (choices["env"], choices["cluster"]) == (config.env["name"], config.cluster.kind)
    assert (choices["logger"], choices["memory"]) == (config.logger.kind, config.memory.kind)


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_fit_a_terminal(script, monkeypatch):
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", "/site")
    assert max(map(len, help_text(script).splitlines())) <= 80


def test_an_epoch_is_defined():
    assert "an epoch collects 16 agent steps in each of 8 environments (128)" in " ".join(help_text("submit").split())
    assert "an epoch is 100 updates" in " ".join(help_text("pretrain").split())
