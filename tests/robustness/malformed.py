"""Command lines and cluster profiles that nobody meant to write, over every key of the schema.

A case is drawn from its number alone, so that a failing one can be repeated.
"""

from __future__ import annotations

import random
import typing
from typing import Any, NamedTuple

from pwm_torchrl.choices import group_choices, schema_choices, schema_keys

#: What most cases begin with: what a run of seconds needs, or another mode of running.
BASES: tuple[tuple[str, ...], ...] = (
    ("size=tiny", "model=mlp", "env=pendulum", "training.video=false", "device=cpu"),
    ("size=tiny", "env=gymnasium", "env.id=Pendulum-v1", "training.video=false"),
    ("algorithm=shac", "env=pendulum_torchrl", "size=tiny", "training.video=false"),
    ("algorithm=pwm_paper", "model=flow_v2", "env=pendulum", "training.video=false"),
    ("experiment=extract", "task=walker-walk"),
    ("experiment=pretrain",),
    ("cluster=l40s",),
    ("logger=tensorboard",),
    (),
)

NUMBERS = (
    "0", "-1", "1", "0.5", "-0.0", "1e309", "-inf", "inf", "nan", ".nan", "1e-320", "1e6", "2.5e3", "1_000", "0x10",
    "007", "9223372036854775808", "1" + "0" * 40, "1e40", "+3", "\uff11\uff12", "1,5", "1 000", "1e", "--1", "3.",
    "1/2", "50%",
)  # fmt: skip
WORDS = (
    "", "null", "None", "true", "False", "yes", "???", "auto", "none", "~", "x", "all", "-", "--", "'", '"', "''",
    "'a", "\\", "\\n", "a b", "a=b", "a:b", "a: b", "%s", "%(x)s", "{0}", "!!python/object:os.system", "&a", "*a",
    "@x", "#x", "$x", "`x`", "|", ">", "ä", "日本", "🤖", "\u200b", "\udcff", "\x00", "\t", "a\nb", "\r\n", "x" * 5000,
    "../..", "/dev/null", "/proc/self/mem", "/nonexistent/x", "~nobody/x", "file:///x", "a,b", ",", "a,,b",
    "2026-11-29", "12:30:00", "1e3d", "0b1", "math.pi", "os.path", "json.loads", "nonexistent.module", "a..b", ".a",
    "a.", "__main__.x", "torch.nn.Linear", "sys.exit",
)  # fmt: skip
TREES = (
    "[]", "[1]", "[0]", "[-1]", "[1,2]", "[1,[2]]", "[null]", "[true]", "[a,b]", "['']", "[1.5,2]", "[nan]",
    "[1,2,3,4,5,6,7,8,9]", "[", "]", "[1", "1]", "{}", "{a:1}", "{a:{b:1}}", "{", "}", "{a", "{1:2}", "{a:1,a:2}",
    "[{a:1}]", "{'':1}", "{kind:mlp}", "{null:1}", "[[[[[[1]]]]]]", "()", "(1,2)", "{a:[}",
)  # fmt: skip
REFERENCES = (
    "${seed}", "${nope}", "${seed", "$${seed}", "${}", "${size}", "${model.name}", "${.name}", "${..seed}",
    "${oc.env:HOME}", "${oc.env:PWM_NOPE}", "${oc.env:PWM_NOPE,3}", "${nope:1}", "${hydra:job.name}", "[${seed}]",
    "${size.units}", "a${seed}", "${size.units.0}", "${oc.decode:'{'}", "${now:%Y}", "${env}", "${cluster.setup}",
    "${${seed}}", "${oc.create:{a:1}}", "${oc.select:nope}", "${oc.deprecated:seed}",
)  # fmt: skip
SWEEPS = (
    "1,2", "range(1,3)", "range(3)", "range(0)", "range(1,3,0)", "glob(*)", "glob(nope)", "choice(a,b)", "choice()",
    "interval(0,1)", "shuffle(1,2)", "sort(2,1)", "tag(a,1)", "int(3.7)", "int(x)", "float(1)", "str(1)", "bool(x)",
    "json_str({a:1})", "extend_list(1)", "sort(1,a)", "nope(1)", "range(1,1e9)", "glob([a,*b])", "glob(*,exclude=*)",
)  # fmt: skip
VALUES = (*NUMBERS, *WORDS, *TREES, *REFERENCES, *SWEEPS)

ENV_KEYS = (
    "env.num_envs", "env.action_repeat", "env.episode_length", "env.id", "env.domain", "env.task", "env._target_",
    "env.name", "env.terminates", "env.observation_keys", "env.device", "env.seed", "env.colour",
)  # fmt: skip

#: Lines of a profile that are no key of it.
ODD_LINES = (
    "", "", "colour: red", "kind: slurm", "defaults: [nope]", "- a", "\tx: 1", "cluster: {}", ": :", "a: b: c", "---",
    "# @package _global_", "# @package nope", "defaults: [{model: mlp}]", "<<: 1", "kind: [", "name: &x *x",
)  # fmt: skip


class Case(NamedTuple):
    """A command line, and the text of a cluster profile of the user's own, if it has one."""

    script: str
    words: list[str]
    profile: str | None


def case(number: int) -> Case:
    """The case of a number."""
    draw = random.Random(number)
    words = list(draw.choice(BASES))
    made = [word for _ in range(draw.choice((1, 1, 1, 2, 3))) for word in draw.choice(KINDS)(draw)]
    profile = None
    if draw.random() < 0.08:
        words, profile = [word for word in words if not word.startswith("cluster=")], _profile(draw)
        made = ["cluster=mine", *(made if draw.random() < 0.3 else [])]
    words += made
    if draw.random() < 0.1:
        draw.shuffle(words)
    return Case(draw.choice(("train", "train", "submit", "plan")), words, profile)


def keys() -> list[str]:
    """Every key of the schema, sections among them."""
    return list(schema_keys())


def _any_key(draw: random.Random) -> str:
    return draw.choice(ENV_KEYS) if draw.random() < 0.15 else draw.choice(keys())


def _value(draw: random.Random, key: str) -> str:
    """A value that fits the type of its key more often than not, so that it gets past the first check."""
    hint: Any = schema_keys().get(key)
    kinds = typing.get_args(hint) or (hint,)
    likely: tuple[str, ...] = VALUES
    if draw.random() < 0.5:
        if typing.get_origin(hint) in (list, dict):
            likely = TREES
        elif int in kinds or float in kinds:
            likely = NUMBERS
        elif key in schema_choices():
            likely = schema_choices()[key]
        elif str in kinds:
            likely = WORDS
    return draw.choice(likely)


def _odd_value(draw: random.Random) -> list[str]:
    key = _any_key(draw)
    return [f"{key}={_value(draw, key)}"]


def _twice(draw: random.Random) -> list[str]:
    key = _any_key(draw)
    return [f"{key}={_value(draw, key)}", f"{key}={_value(draw, key)}"]


def _of_itself(draw: random.Random) -> list[str]:
    one, other = _any_key(draw), _any_key(draw)
    return draw.choice(([f"{one}=${{{one}}}"], [f"{one}=${{{other}}}"], [f"{one}=${{{other}}}", f"{other}=${{{one}}}"]))


def _odd_key(draw: random.Random) -> list[str]:
    key = _any_key(draw)
    at = draw.randrange(len(key))
    odd = draw.choice(
        (
            key[:at] + key[at + 1 :],
            key[:at] + draw.choice("abz_.-0 ") + key[at:],
            key.upper(),
            f"+{key}",
            f"++{key}",
            f"~{key}",
            f"{key}.more",
            f"{key}[0]",
            f"{key}.",
            f".{key}",
            f"{key}@other",
            f"{key}/x",
            f" {key}",
            f"{key} ",
            key.replace(".", "/"),
            f"--{key}",
            f"hydra.{key}",
            "",
        )
    )
    return [odd if draw.random() < 0.1 else f"{odd}={_value(draw, key)}"]


def _odd_choice(draw: random.Random) -> list[str]:
    groups = group_choices()
    group = draw.choice(list(groups))
    choice = draw.choice([*groups[group], *VALUES])
    form = draw.choice(
        ("{g}={c}",) * 5 + ("+{g}={c}", "~{g}", "~{g}={c}", "{g}@x={c}", "{g}/x={c}", "override {g}={c}", "{g}")
    )
    return [form.format(g=group, c=choice)]


def _no_setting(draw: random.Random) -> list[str]:
    return [
        draw.choice(
            (*VALUES, "=", "==", "=1", "a=", "-x", "-h1", "--nope", "--dry-run=1", "train", "--multirun", "seed")
        )
    ]


def _sbatch(draw: random.Random) -> list[str]:
    name = draw.choice(
        ("reservation", "mem-per-cpu", "exclusive", "time", "array", "output", "wrap", "", "a b", "mem_per_cpu", "-N")
    )
    value = draw.choice(VALUES)
    return ["cluster=l40s", draw.choice((f"cluster.sbatch.{name}={value}", f"cluster.sbatch={{{name}:{value}}}"))]


KINDS = (
    _odd_value,
    _odd_value,
    _odd_value,
    _odd_value,
    _twice,
    _of_itself,
    _odd_key,
    _odd_choice,
    _no_setting,
    _sbatch,
)


def _profile(draw: random.Random) -> str:
    """A file of the user's own, which YAML reads before the schema sees it."""
    own = [key for key in keys() if key.startswith("cluster.")]
    lines = [f"{key.removeprefix('cluster.')}: {_value(draw, key)}" for key in draw.sample(own, 3)]
    lines.insert(draw.randrange(4), draw.choice(ODD_LINES))
    text = "\n".join(lines) + "\n"
    return draw.choice(
        (text, text, text, text[: draw.randrange(len(text))], "", "[]", "null", "\x00", "x: [", "# only a comment")
    )
