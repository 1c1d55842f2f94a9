"""Which runs are compared, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("hydra")

from report_cases import report

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.select import Ambiguous, covered_keys, pair_runs, value_of


def seeds(words, *numbers, **known):
    return [report(*words, f"seed={n}", **known) for n in numbers]


def test_runs_are_paired_by_seed():
    runs = [*seeds(["model=mlp"], 0, 1, 2), *seeds(["model=flow_v2"], 2, 1, 7, status="failed")]
    pairs = pair_runs(runs, "model")
    assert pairs.arms == ["flow_v2", "mlp"]
    assert {arm: list(found) for arm, found in pairs.runs["pendulum"].items()} == {"flow_v2": [1, 2], "mlp": [1, 2]}
    assert pairs.notes == [
        "pendulum: left out, for there is no run of the same seed to compare with: pendulum_mlp_0 (finished), "
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
    with pytest.raises(ConfigurationError, match="--baseline flow is no value of model here; there are mlp, residual"):
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
