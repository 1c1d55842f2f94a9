"""Which runs are chosen and compared, what is refused, and what is advised where a comparison is ambiguous."""

from __future__ import annotations

import re
import shlex

import pytest

pytest.importorskip("hydra")

from report_cases import report

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import RunReport
from pwm_torchrl.report.select import (
    Ambiguous,
    Condition,
    covered_keys,
    newest,
    pair_or_advise,
    pair_runs,
    select,
    value_of,
)


def names(runs: list[RunReport]) -> list[str]:
    return [run.name for run in runs]


def chosen(runs: list[RunReport], *where: str, only_newest: bool = False) -> list[str]:
    return names(select(runs, map(Condition.parse, where), only_newest))


def advised(runs: list[RunReport], key: str = "model") -> tuple[str, list[RunReport]]:
    """The error of an ambiguous comparison, and the runs that are left with the words that it says to add."""
    with pytest.raises(ConfigurationError) as raised:
        pair_or_advise(runs, key, None, False)
    told = re.search(r"add (.*) \(leaves (\d+) of", str(raised.value))
    assert told is not None, raised.value
    words = shlex.split(told[1])
    where = [words[i + 1] for i, word in enumerate(words) if word == "--where"]
    left = select(runs, map(Condition.parse, where), "--newest" in words)
    assert len(left) == int(told[2])
    return str(raised.value), left


@pytest.fixture
def runs() -> list[RunReport]:
    return [
        report("model=mlp", name="a"),
        report("model=mlp", "algorithm.horizon=8", "seed=1", name="b", status="failed"),
        report("model=residual", "algorithm.model_lr=0.001", "seed=2", name="c"),
        report("model=flow_v2", "env=hopper", "size=5m", name="d", status="died"),
    ]


class TestWhere:
    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            (["model=mlp"], "ab"),
            (["model=mlp,residual"], "abc"),
            (["model=mlp", "model=residual"], "abc"),
            (["model=mlp", "seed=0"], "a"),
            (["model!=mlp"], "cd"),
            (["status!=failed,died"], "ac"),
            (["status!=failed", "status!=died"], "ac"),
            (["env=hopper"], "d"),
            (["size=5m"], "d"),
            (["algorithm.horizon=8"], "b"),
            (["algorithm.model_lr=1e-3", "algorithm.horizon!=8", "seed=2"], "c"),
            (["env.id=Hopper-v5"], "d"),
            (["size.units=[128,128]", "status=finished"], "ac"),
            (["training.video=false"], ""),
            (["world_model=null", "env=pendulum"], "abc"),
        ],
    )
    def test_keys_and_values(self, where, expected, runs):
        if expected:
            assert chosen(runs, *where) == list(expected)
        else:
            with pytest.raises(ConfigurationError, match=r"--where training.video=false: .* the runs have true"):
                chosen(runs, *where)

    @pytest.mark.parametrize(
        ("where", "words"),
        [
            (["modle=mlp"], ["modle", "unknown key; nearest: ", "model"]),
            (["algorithm.horizn=8"], ["nearest: algorithm.horizon"]),
            (["env.idd=x"], ["nearest: env.id"]),
            (["model=flow_v3"], ["model=flow_v3", "flow_v2, mlp, residual", "nearest: flow_v2"]),
            (["algorithm=pwm"], ["algorithm is a section", "algorithm.name"]),
            (["model"], ["--where model", "KEY=VALUE"]),
            (["=mlp"], ["KEY=VALUE"]),
            (["model="], ["KEY=VALUE"]),
            (["model=mlp", "env=hopper"], ["none of the 4 runs matches", "--where model=mlp --where env=hopper"]),
        ],
    )
    def test_refused(self, where, words, runs):
        with pytest.raises(ConfigurationError) as raised:
            chosen(runs, *where)
        assert all(word in str(raised.value) for word in words), raised.value

    def test_a_run_without_a_configuration_has_what_its_summary_says(self, runs):
        runs[0].config = None
        assert chosen(runs, "model=mlp") == ["a", "b"]
        assert chosen(runs, "algorithm.horizon=3") == ["c", "d"]


class TestNewest:
    def test_a_finished_run_is_preferred_to_a_newer_one(self):
        again = [report(name=name, status=status, started=time) for name, status, time in
                 (("first", "finished", 1), ("second", "finished", 2), ("third", "running", 3))]  # fmt: skip
        assert names(newest(again)) == ["second"]
        assert names(newest(again[::2])) == ["first"]
        for run in again:
            run.status = "failed"
        assert names(newest(again)) == ["third"]

    def test_where_a_run_lies_and_logs_makes_no_other_settings(self):
        runs = [report("run_dir=/x", name="old"), report("logger=tensorboard", name="new", started=1.0)]
        assert names(newest(runs)) == ["new"]
        runs += [report("seed=1", name="seed"), report("algorithm.horizon=8", name="horizon")]
        assert names(newest(runs)) == ["new", "seed", "horizon"]

    def test_what_cannot_be_compared_is_kept(self):
        runs = [report(name="a"), report(name="b")]
        for run in runs:
            run.config = None
        assert names(newest(runs)) == ["a", "b"]


class TestAdvice:
    def test_repeats(self):
        runs = [report("model=mlp", name="old"), report("model=mlp", name="new", started=1.0), report("model=residual")]
        text, left = advised(runs)
        assert "runs/old and runs/new are both model=mlp" in text
        assert "add --newest (leaves 2 of 3 runs)" in text
        assert names(left) == ["new", "pendulum_residual_0"]

    def test_what_did_not_finish_goes_first(self):
        runs = [report("model=mlp", "training.epochs=7", name="bad", status="failed"), report("model=mlp", name="good")]
        text, left = advised([*runs, report("model=residual")])
        assert "add --where status=finished (" in text
        assert names(left) == ["good", "pendulum_residual_0"]

    def test_the_settings_that_leave_most_to_compare(self):
        """One seed has both models with the horizon 8, two have them with 3."""
        runs = [report(f"model={m}", f"seed={s}", name=f"{m}{s}") for m in ("mlp", "residual") for s in (0, 1)]
        runs += [report(f"model={m}", "algorithm.horizon=8", name=f"{m}8") for m in ("mlp", "residual")]
        text, left = advised(runs)
        assert "differ in algorithm.horizon" in text
        assert names(left) == ["mlp0", "mlp1", "residual0", "residual1"]

    def test_everything_at_once(self):
        """Repeats, failed runs, other settings and a configuration that cannot be read."""
        runs = [report(f"model={m}", f"seed={s}", name=f"{m}{s}") for m in ("mlp", "residual") for s in (0, 1)]
        runs += [report("model=mlp", name="again", started=1.0), report("size=5m", "model=mlp", name="5m")]
        runs += [report("model=mlp", "seed=1", "algorithm.model_lr=1.0", name="nan", status="failed")]
        runs += [report("model=residual", "env=hopper", name="elsewhere"), report(name="torn", status="died")]
        runs[-1].config = None
        _, left = advised(runs)
        pairs = pair_or_advise(left, "model", None, False)
        assert {arm: names(list(seeds.values())) for arm, seeds in pairs.runs["pendulum"].items()} == {
            "mlp": ["again", "mlp1"],
            "residual": ["residual0", "residual1"],
        }

    def test_models_that_are_not_compared(self):
        runs = [report("size=tiny", "model=mlp"), report("size=tiny", "model=residual"), report("size=5m", "model=mlp")]
        assert "add --where model=mlp (" in advised(runs, "size")[0]

    def test_other_differences_may_be_accepted_too(self):
        runs = [report("model=mlp", name="a"), report("model=residual", "algorithm.horizon=8", name="b")]
        with pytest.raises(ConfigurationError, match=r"differ in algorithm\.horizon .*--allow-differences"):
            pair_or_advise(runs, "model", None, False)
        assert pair_or_advise(runs, "model", None, True).notes == [
            "runs also differ in algorithm.horizon (3 in a, 8 in b)"
        ]

    @pytest.mark.parametrize(
        "words", [[], ["training.epochs=7", "size.units=[8,16]", "algorithm.normalize_rewards=true"]]
    )
    def test_a_model_alone_gets_the_command_that_trains_another(self, words):
        """The run that the command trains can be compared with the one that is there."""
        run = report("model=flow_v2", *words, name="only")
        with pytest.raises(ConfigurationError, match="every run has model=flow_v2") as raised:
            pair_or_advise([run], "model", None, False, compose)
        told = str(raised.value).partition("submit.py ")[2] or str(raised.value).partition("pwm submit ")[2]
        assert told.startswith("model=mlp ")
        other = report(name="other")
        other.config = compose(shlex.split(told))
        other.model = other.config.model.name
        assert list(pair_or_advise([run, other], "model", None, False).runs["pendulum"]) == ["flow_v2", "mlp"]


# Which runs are compared ----------------------------------------------------------------------------------------------


def seeds(words, *numbers, **known):
    return [report(*words, f"seed={n}", **known) for n in numbers]


def test_runs_are_paired_by_seed():
    runs = [*seeds(["model=mlp"], 0, 1, 2), *seeds(["model=flow_v2"], 2, 1, 7, status="failed")]
    pairs = pair_runs(runs, "model")
    assert pairs.arms == ["flow_v2", "mlp"]
    assert {arm: list(found) for arm, found in pairs.runs["pendulum"].items()} == {"flow_v2": [1, 2], "mlp": [1, 2]}
    assert pairs.notes == [
        "pendulum: left out, because there is no run of the same seed to compare with: pendulum_mlp_0 (finished), "
        "pendulum_flow_v2_7 (failed)"
    ]


def test_environments_are_paired_apart():
    """Each has settings of its own, and one that only one value has run on is said to be missing."""
    runs = [
        *seeds(["model=mlp"], 0),
        *seeds(["model=residual"], 0),
        *seeds(["model=mlp", "env=cartpole_swingup"], 0, 1),
    ]
    runs += [*seeds(["model=residual", "env=cartpole_swingup"], 1), *seeds(["model=mlp", "env=hopper"], 0)]
    pairs = pair_runs(runs, "model")
    assert {env: sorted(next(iter(arms.values()))) for env, arms in pairs.runs.items()} == {
        "cartpole_swingup": [1],
        "pendulum": [0],
    }
    notes = " ".join(pairs.notes)
    assert "hopper_mlp_0" in notes
    assert "cartpole_swingup_mlp_0" in notes


def test_a_value_that_one_environment_lacks():
    runs = [*seeds(["model=mlp"], 0), *seeds(["model=residual"], 0), *seeds(["model=flow_v1"], 0)]
    runs += [report(f"model={model}", "env=hopper") for model in ("mlp", "residual")]
    pairs = pair_runs(runs, "model")
    assert list(pairs.runs["hopper"]) == ["mlp", "residual"]
    assert pairs.notes == ["hopper has no run with model=flow_v1"]


def test_the_baseline_comes_first():
    runs = [report(f"model={model}") for model in ("residual", "mlp", "flow_v1")]
    assert pair_runs(runs, "model").arms == ["flow_v1", "mlp", "residual"]
    pairs = pair_runs(runs, "model", baseline="mlp")
    assert pairs.arms == list(pairs.runs["pendulum"]) == ["mlp", "flow_v1", "residual"]


def test_values_are_in_the_order_of_numbers():
    runs = [report(f"algorithm.horizon={horizon}") for horizon in (16, 8, 4)]
    assert pair_runs(runs, "algorithm.horizon").arms == ["4", "8", "16"]


def test_other_differences_are_refused_by_name():
    runs = [report("model=mlp", name="a"), report("model=residual", "algorithm.horizon=8", name="b")]
    with pytest.raises(ConfigurationError, match=r"differ in algorithm\.horizon \(3 in a, 8 in b\)"):
        pair_runs(runs, "model", baseline="mlp")
    pairs = pair_runs(runs, "model", baseline="mlp", allow_differences=True)
    assert pairs.notes == ["runs also differ in algorithm.horizon (3 in a, 8 in b)"]
    assert list(pairs.runs["pendulum"]) == ["mlp", "residual"]


def test_seeds_of_one_value_must_be_alike_in_what_a_model_sets_too():
    runs = [*seeds(["model=flow_v2"], 0), *seeds(["model=flow_v2", "model.loss.rollout_weight=2.0"], 1)]
    runs += seeds(["model=mlp"], 0, 1)
    with pytest.raises(ConfigurationError, match=r"model\.loss\.rollout_weight \(1\.0 in \S+, 2\.0 in"):
        pair_runs(runs, "model")


def test_where_a_run_logs_and_how_it_fits_may_differ():
    runs = [report("model=mlp", "logger=tensorboard"), report("model=residual", "memory.model_micro_batch=8")]
    assert pair_runs(runs, "model").notes == []


def test_a_size_comes_with_settings_of_its_own():
    """``size=tiny`` sets a batch too: those are no other difference, the horizon is."""
    runs = [report("size=tiny", name="a"), report("size=5m", name="b")]
    assert pair_runs(runs, "size").arms == ["5m", "tiny"]
    assert "algorithm.model_batch" in covered_keys("size", ["5m", "tiny"])
    assert covered_keys("model", ["mlp"]) == {"model"}
    with pytest.raises(ConfigurationError, match=r"algorithm\.horizon"):
        pair_runs([runs[0], report("size=5m", "algorithm.horizon=4")], "size")


def test_two_runs_of_one_seed_are_refused():
    runs = [report("model=mlp", name="first"), report("model=mlp", name="again", status="failed"), report()]
    with pytest.raises(
        Ambiguous, match=r"runs/first and runs/again are both model=mlp on pendulum with seed 0"
    ) as raised:
        pair_runs(runs, "model")
    assert (raised.value.keys, raised.value.runs) == ([], runs[:2])


def test_runs_that_only_look_like_repeats_are_told_from_them():
    runs = [report("size=tiny", "model=mlp"), report("size=tiny", "model=residual"), report("size=5m", "model=mlp")]
    with pytest.raises(
        ConfigurationError, match=r"both size=tiny on pendulum with seed 0 and differ in model\.name, model"
    ):
        pair_runs(runs, "size")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("seed", "paired by environment and seed"),
        ("env", "paired by environment and seed"),
        ("modle", "unknown key; nearest: mode, model"),
        ("algorithm.horizn", r"unknown key; nearest: algorithm\.horizon"),
        ("algorithm", "every run has algorithm=pwm"),
        ("size", "every run has size=tiny"),
    ],
)
def test_keys_that_cannot_be_compared(key, sentence):
    with pytest.raises(ConfigurationError, match=f"^--compare {key}: .*{sentence}"):
        pair_runs([report("model=mlp"), report("model=residual")], key)


def test_other_refusals():
    runs = [report("model=mlp", "seed=0"), report("model=residual", "seed=1")]
    with pytest.raises(
        ConfigurationError, match=r"model=mlp on pendulum with seed 0, model=residual on pendulum with seed 1"
    ):
        pair_runs(runs, "model")
    with pytest.raises(
        ConfigurationError, match="--baseline flow is not a value of model in these runs; choose one of mlp, residual"
    ):
        pair_runs(runs, "model", baseline="flow")
    for run in runs:
        run.config = None
    with pytest.raises(ConfigurationError, match="no run has a readable configuration"):
        pair_runs(runs, "model")


def test_a_run_without_a_readable_configuration_is_left_out_and_named():
    runs = [report("model=mlp"), report("model=residual"), report("model=mlp", name="torn")]
    runs[-1].config = None
    pairs = pair_runs(runs, "model")
    assert list(pairs.runs["pendulum"]) == ["mlp", "residual"]
    assert any("torn" in note for note in pairs.notes)


def test_values_in_words():
    cfg = report("model=mlp").config
    assert cfg is not None
    assert [value_of(cfg, key) for key in ("model", "size.units", "env.num_envs", "device", "memory", "env.wind")] == [
        "mlp", "[128, 128]", "8", "auto", "auto", "None",
    ]  # fmt: skip
