"""Options of sbatch that no key of ours stands for, and those that the user's shell sets."""

from __future__ import annotations

import pytest

from pwm_torchrl.cli import prepare
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.prepare import Prepared, by_cluster
from pwm_torchrl.cli.sweeps import expand
from pwm_torchrl.cluster.resources import Resources, sbatch_options, sbatch_parameters, take_variables
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.claims import ALIVE, ENDED, UNKNOWN, own_job

RESOURCES = Resources(2000, 2, 0, 1, 60)


def parameters(**profile):
    cfg = Config()
    cfg.cluster = ClusterConfig(kind="slurm", **profile)
    return sbatch_parameters(cfg, RESOURCES, "name")


class TestOptions:
    def test_they_reach_sbatch(self):
        extra = parameters(sbatch={"reservation": "course", "exclude": "node[1-3]", "exclusive": True, "nice": 100})
        found = extra["additional_parameters"]
        assert (found["reservation"], found["exclude"], found["exclusive"], found["nice"]) == (
            "course", "node[1-3]", True, 100
        )  # fmt: skip
        assert found["requeue"] is True
        assert extra["mem"] == "2000M"

    def test_memory_per_cpu_takes_the_place_of_memory(self):
        found = parameters(sbatch={"mem_per_cpu": "4G"})
        assert "mem" not in found
        assert found["additional_parameters"]["mem-per-cpu"] == "4G"

    def test_what_is_null_or_false_asks_for_nothing(self):
        assert sbatch_options(ClusterConfig(sbatch={"exclusive": False, "reservation": None})) == {}

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("partition", "gpu", "cluster.partition"), ("mem", "4G", "cluster.mem_gib"), ("time", 5, "cluster.time"),
            ("job_name", "x", "a run sets that itself"), ("--array", "1-3", "a run sets that itself"),
            ("Not an option", 1, "long name"), ("exclude", ["a"], "one line"), ("comment", "x", "cluster.comment"),
            ("exclude", "a\nb", "one line"),
        ],
    )  # fmt: skip
    def test_what_is_set_elsewhere_or_is_none_is_refused(self, key, value, said):
        with pytest.raises(ConfigurationError, match=r"cluster\.sbatch\.") as caught:
            sbatch_options(ClusterConfig(sbatch={key: value}))
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        "words",
        [
            ["cluster.sbatch={reservation: course, mem-per-cpu: 4G}"],
            ["cluster.sbatch.reservation=course", "+cluster.sbatch.mem-per-cpu=4G"],
        ],
    )
    def test_on_the_command_line(self, words):
        assert compose(["cluster=l40s", *words]).cluster.sbatch == {"reservation": "course", "mem-per-cpu": "4G"}

    def test_a_bad_one_stops_there(self):
        with pytest.raises(ConfigurationError, match=r"cluster\.partition"):
            compose(["cluster=l40s", "cluster.sbatch.partition=gpu"])


class TestShell:
    def test_what_the_profile_leaves_open_is_taken(self):
        profile = ClusterConfig(kind="slurm", account="typed")
        said = {"PARTITION": "gpu,main", "ACCOUNT": "theirs", "TIMELIMIT": "1-0", "RESERVATION": "course",
                "EXCLUSIVE": "1", "MEM_PER_NODE": "9G"}  # fmt: skip
        environ = {"HOME": "/x", **{f"SBATCH_{name}": value for name, value in said.items()}}
        assert take_variables(profile, environ) == ["SBATCH_MEM_PER_NODE"]
        assert (profile.partition, profile.account, profile.time_min) == ("gpu,main", "typed", 24 * 60)
        assert profile.sbatch == {"exclusive": True, "reservation": "course"}

    def test_an_option_that_is_set_wins(self):
        profile = ClusterConfig(sbatch={"reservation": "typed"})
        take_variables(profile, {"SBATCH_RESERVATION": "theirs"})
        assert profile.sbatch == {"reservation": "typed"}

    def test_a_time_that_is_none_is_named(self):
        with pytest.raises(ConfigurationError, match=r"SBATCH_TIMELIMIT=soon"):
            take_variables(ClusterConfig(), {"SBATCH_TIMELIMIT": "soon"})

    @pytest.mark.parametrize(("inside", "partition"), [(False, "gpu"), (True, None)])
    def test_in_a_job_they_are_the_jobs(self, inside, partition, monkeypatch):
        monkeypatch.setenv("SBATCH_PARTITION", "gpu")
        monkeypatch.setattr(prepare, "own_job", lambda: "7" if inside else None)
        cfg = Config()
        prepare.fill_in_shell(cfg)
        assert cfg.cluster.partition == partition


class TestJobOfThisProcess:
    @pytest.mark.parametrize(("state", "expected"), [(ALIVE, "7"), (UNKNOWN, "7"), (ENDED, None)])
    def test_one_that_slurm_says_has_ended_is_none(self, state, expected, capsys):
        environ = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "100", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/x"}
        assert own_job(environ, lambda job: state) == expected
        kept = {"SLURM_CONF", "HOME"} | (set() if expected is None else {"SLURM_JOB_ID", "SLURM_MEM_PER_NODE"})
        assert environ.keys() == kept
        assert ("job 7" in capsys.readouterr().err) == (expected is None)

    def test_without_an_id_nobody_is_asked(self):
        assert own_job({}, lambda job: pytest.fail("asked")) is None


class TestLists:
    @pytest.mark.parametrize("word", ["cluster.partition=main,gpu", "cluster.gres=gpu:l40s:1,tmp:5G"])
    def test_slurms_own_lists_are_one_run(self, word):
        assert expand([word]) == [[word]]
        cluster = compose(["cluster=l40s", word]).cluster
        assert getattr(cluster, word.partition("=")[0].partition(".")[2]) == word.partition("=")[2]

    def test_runs_for_each_can_be_asked_for(self):
        assert expand(["cluster.partition=choice(main,gpu)"]) == [["cluster.partition=main"], ["cluster.partition=gpu"]]
        assert len(expand(["cluster.account=a,b"])) == 2

    def test_runs_of_different_profiles_are_arrays_of_their_own(self):
        words = expand(["cluster=l40s", "cluster.account=a,b", "seed=1,2"])
        runs = [Prepared(compose(each), each) for each in words]
        groups = by_cluster(runs, list(range(4)))
        assert [[run.config.cluster.account for run in group] for group, _ in groups] == [["a", "a"], ["b", "b"]]
        assert [known for _, known in groups] == [[0, 1], [2, 3]]
