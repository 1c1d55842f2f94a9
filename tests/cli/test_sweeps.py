"""Several runs from one command."""

from __future__ import annotations

import pytest

from pwm_torchrl.cli import prepare
from pwm_torchrl.cli.prepare import compose_all, place_of
from pwm_torchrl.cli.sweeps import expand
from pwm_torchrl.errors import ConfigurationError


class TestExpand:
    def test_every_combination(self):
        assert expand(["seed=1,2", "model=mlp", "size=tiny,5m"]) == [
            ["seed=1", "model=mlp", "size=tiny"],
            ["seed=1", "model=mlp", "size=5m"],
            ["seed=2", "model=mlp", "size=tiny"],
            ["seed=2", "model=mlp", "size=5m"],
        ]

    @pytest.mark.parametrize(
        ("word", "values"),
        [
            ("seed=range(1,4)", "1 2 3"),
            ("seed=range(2)", "0 1"),
            ("seed=range(5,1,-2)", "5 3"),
            ("model=choice(mlp,flow_v1)", "mlp flow_v1"),
            ("seed=sort(3,1,2)", "1 2 3"),
            ("model=glob(flow_*)", "flow_v1 flow_v2 flow_v3"),
            ("model=glob(*,exclude=flow_*)", "few_step mlp residual"),
            ("algorithm.collect_steps=${algorithm.horizon},4", "${algorithm.horizon} 4"),
            ("size.units=[8,8],[16]", "[8,8] [16]"),
        ],
    )
    def test_hydras_sweeps(self, word, values):
        key = word.partition("=")[0]
        assert expand([word]) == [[f"{key}={value}"] for value in values.split()]

    @pytest.mark.parametrize("word", ["model=glob(x*)", "seed=glob(*)"])
    def test_a_glob_that_matches_nothing(self, word):
        with pytest.raises(ConfigurationError, match="matches nothing"):
            expand([word])

    @pytest.mark.parametrize("word", ["size.units=[8,8]", "run_dir=a,b", "runs_dir=/x,y", "--help", "seed", "a=b=c("])
    def test_what_is_no_sweep_stays(self, word):
        assert expand([word]) == [[word]]

    def test_an_interval_is_no_list(self):
        with pytest.raises(ConfigurationError, match="is an interval, not a list of values"):
            expand(["algorithm.model_lr=interval(0,1)"])

    @pytest.mark.parametrize(
        ("word", "told"),
        [
            ("seed=range(1,3,0)", "never ends"),
            ("algorithm.gamma=range(0.1,inf)", "never ends"),
            ("algorithm.gamma=range(0.1,0.9,nan)", "never ends"),
            ("algorithm.gamma=range(0.0,1.0,0.0)", "never ends"),
            ("seed=range(1,1e12)", ": 999999999999 runs"),
            ("seed=shuffle(range(1,1000000000))", ": 999999999 runs"),
            ("seed=range(3,3)", "gives seed no value"),
            ("seed=range(1,3,-1)", "gives seed no value"),
        ],
    )
    def test_a_range_without_an_end_or_without_a_value(self, word, told):
        with pytest.raises(ConfigurationError) as caught:
            expand([word])
        assert told in str(caught.value)
        assert word in str(caught.value)

    def test_too_many(self):
        with pytest.raises(ConfigurationError, match="12000 runs in one command are more than 10000"):
            expand(["seed=range(0,12000)"])


class TestComposed:
    def test_each_run_has_its_own_words(self):
        runs = compose_all(["seed=1,2", "model=mlp,residual"])
        assert [(run.config.seed, run.config.model.name) for run in runs] == [
            (1, "mlp"), (1, "residual"), (2, "mlp"), (2, "residual")
        ]  # fmt: skip
        assert runs[1].words == ["seed=1", "model=residual"]

    def test_one_directory_is_not_for_several_runs(self):
        with pytest.raises(ConfigurationError, match=r"run_dir=x is one directory, but .* 2 runs"):
            compose_all(["seed=1,2", "run_dir=x"])

    def test_a_directory_for_each_of_several_runs(self):
        runs = compose_all(["run_dir=x/${model.name}_s${seed}", "seed=1,2", "model=mlp"])
        assert [run.config.run_dir for run in runs] == ["x/mlp_s1", "x/mlp_s2"]
        with pytest.raises(ConfigurationError, match=r"run_dir=x/s1 is one directory"):
            compose_all(["run_dir=x/s${seed}", "seed=1,2", "model=mlp,flow_v1"])

    def test_the_first_mistake_stops_all(self):
        with pytest.raises(ConfigurationError, match="'flwo' is not a choice of model"):
            compose_all(["model=mlp,flwo"])

    def test_online_logging_needs_a_key(self, monkeypatch):
        monkeypatch.setattr("pwm_torchrl.run.loggers.has_wandb_key", lambda: False)
        with pytest.raises(ConfigurationError, match=r"logger\.mode=online needs a W&B key, and there is none"):
            compose_all(["logger=wandb", "logger.mode=online"])
        compose_all(["logger=wandb", "logger.mode=auto"])


class TestPlace:
    @pytest.mark.parametrize(
        ("words", "slurm", "inside", "expected"),
        [
            ([], False, False, "local"),
            ([], True, False, "slurm"),
            (["cluster=local"], True, False, "local"),
            (["cluster=l40s"], True, False, "slurm"),
            (["cluster=debug"], True, True, "debug"),
            ([], True, True, "here"),
            (["cluster=l40s"], False, True, "here"),
            (["cluster=l40s"], True, True, "slurm"),
        ],
    )
    def test_where_a_run_goes(self, words, slurm, inside, expected, monkeypatch):
        monkeypatch.setattr(prepare, "slurm_available", lambda: slurm)
        if inside:
            monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert place_of(compose_all(words)[0].config) == expected
