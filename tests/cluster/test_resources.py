"""What a run asks SLURM for, options of sbatch besides, and what a cluster could never run."""

from __future__ import annotations

import dataclasses

import pytest
from slurm_texts import SITE

from pwm_torchrl.cli import prepare
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.prepare import ComposedRun, group_by_cluster
from pwm_torchrl.cli.sweeps import expand
from pwm_torchrl.cluster.resources import (
    DEFAULT_CPUS,
    JobRequest,
    Resources,
    resources_for,
    sbatch_options,
    sbatch_parameters,
    take_variables,
    why_impossible,
)
from pwm_torchrl.config import ClusterConfig, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.claims import ALIVE, ENDED, UNKNOWN, own_job


def config(threads: int | None, cpus: int | None) -> Config:
    """With everything given that would otherwise be planned."""
    cfg = Config()
    cfg.training.threads, cfg.cluster.cpus = threads, cpus
    cfg.cluster.mem_gib, cfg.cluster.time_min = 1.5, 30
    return cfg


@pytest.mark.parametrize(
    ("threads", "cpus", "asked"), [(None, None, DEFAULT_CPUS), (6, None, 6), (None, 4, 4), (2, 4, 4), (4, 4, 4)]
)
def test_as_many_cpus_as_threads(threads, cpus, asked):
    resources = resources_for(config(threads, cpus), plan=None)
    assert (resources.cpus, resources.mem_mb, resources.time_min) == (asked, 1536, 30)


def test_more_threads_than_cpus_are_refused():
    with pytest.raises(ConfigurationError, match=r"training\.threads=8 .* cluster\.cpus=4"):
        resources_for(config(8, 4), plan=None)


def test_more_memory_than_a_node_has_is_refused():
    cfg = config(None, None)
    cfg.cluster.host_gib = 1
    with pytest.raises(ConfigurationError, match=r"cluster\.mem_gib=1\.5 .* cluster\.host_gib=1"):
        resources_for(cfg, plan=None)


# Options of sbatch that no key of ours stands for, and those that the user's shell sets -------------------------------


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
            ("job_name", "x", "a run sets it itself"), ("--array", "1-3", "a run sets it itself"),
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
        prepare.fill_from_shell(cfg)
        assert cfg.cluster.partition == partition


class TestJobOfThisProcess:
    @pytest.mark.parametrize(("state", "expected"), [(ALIVE, "7"), (UNKNOWN, "7"), (ENDED, None)])
    def test_one_that_slurm_says_has_ended_is_none(self, state, expected, capsys):
        environ = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "100", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/x"}
        assert own_job(environ, lambda job: state) == expected
        kept = {"SLURM_CONF", "HOME"} | (set() if expected is None else {"SLURM_JOB_ID", "SLURM_MEM_PER_NODE"})
        assert environ.keys() == kept
        assert ("SLURM_JOB_ID=7" in capsys.readouterr().err) == (expected is None)

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
        runs = [ComposedRun(compose(each), each) for each in words]
        groups = group_by_cluster(runs, list(range(4)))
        assert [[run.config.cluster.account for run in group] for group, _ in groups] == [["a", "a"], ["b", "b"]]
        assert [known for _, known in groups] == [[0, 1], [2, 3]]


# What a cluster could never run ---------------------------------------------------------------------------------------


def l40s(count: int) -> tuple[tuple[str, int], ...]:
    return (("l40s", count),)


@pytest.mark.parametrize(
    "demand",
    [
        JobRequest(),
        JobRequest(cpus=4, memory_mb=6000, minutes=1440, nodes=2),
        JobRequest(partition="gpu", tasks=4, cpus=12, memory_mb=400000, minutes=10**6, gpus=l40s(4), nodes=2),
        JobRequest(partition="gpu", gpus=(("", 8),)),
        JobRequest(partition="gpu", gpus=(("nvidia_h100_80gb_hbm3", 8),), constraint="h100&ib"),
        JobRequest(partition="main,gpu", memory_mb=100_000),
        JobRequest(partition="gpu", constraint="[rack1|rack2]"),
    ],
    ids=str,
)
def test_what_fits(demand):
    assert why_impossible(demand, SITE) is None


@pytest.mark.parametrize(
    ("demand", "parts"),
    [
        (JobRequest(partition="gpus"), ["cluster.partition=gpus does not exist", "main, gpu, old"]),
        (JobRequest(partition="old"), ["partition old accepts no jobs"]),
        (JobRequest(minutes=1441), ["1441 min", "partition main", "cluster.max_time_min=1440"]),
        (JobRequest(memory_mb=6001), ["6001 MiB", "6000 MiB", "cluster.mem_gib=5.85 or less", "cluster.host_gib=5.85"]),
        (JobRequest(partition="gpu", memory_mb=400_001), ["400000 MiB", "cluster.mem_gib=390.62 or less"]),
        (JobRequest(cpus=5), ["5 CPUs", "partition main has, 4", "cluster.cpus"]),
        (JobRequest(partition="gpu", tasks=8, cpus=7), ["8 tasks with 7 CPUs each", "allows on a node, 48"]),
        (JobRequest(partition="gpu", nodes=3), ["cluster.nodes=3", "allows, 2"]),
        (JobRequest(nodes=3), ["cluster.nodes=3", "only 2 of the 2 nodes"]),
        (JobRequest(gpus=(("", 1),)), ["1 GPU per node", "partition main has none"]),
        (JobRequest(partition="gpu", gpus=l40s(5)), ["5 GPUs of type l40s per node", "at most 4"]),
        (JobRequest(partition="gpu", gpus=(("a100", 1),)), ["1 GPU of type a100 per node", "has none"]),
        (JobRequest(partition="gpu", constraint="v100"), ["cluster.constraint=v100", "h100, ib, l40s"]),
        (JobRequest(partition="gpu", gpus=(("", 8),), constraint="l40s"), ["only 0 of the 3 nodes", "at once"]),
        (JobRequest(partition="main,gpu", memory_mb=600_000), ["partition main"]),
    ],
    ids=str,
)
def test_what_could_never_run(demand, parts):
    sentence = why_impossible(demand, SITE)
    assert sentence is not None
    assert len(sentence.splitlines()) == 1
    for part in parts:
        assert part in sentence, sentence


def test_a_cluster_without_a_default_partition():
    partitions = tuple(dataclasses.replace(each, default=False) for each in SITE.partitions)
    site = dataclasses.replace(SITE, partitions=partitions)
    assert "set cluster.partition, one of main, gpu, old" in why_impossible(JobRequest(), site)


def test_a_limit_for_the_whole_cluster():
    site = dataclasses.replace(SITE, config=dataclasses.replace(SITE.config, max_memory_mb=1000))
    assert "1000 MiB" in why_impossible(JobRequest(memory_mb=2000), site)


def test_the_suggested_memory_fits():
    assert why_impossible(JobRequest(memory_mb=round(5.85 * 1024)), SITE) is None


def test_the_demand_of_a_profile():
    profile = ClusterConfig(kind="slurm", partition="gpu", gpu="l40s", gpus=2, time_min=3000, max_time_min=1440)
    assert JobRequest.of(profile) == JobRequest("gpu", tasks=2, gpus=(("", 2),), minutes=1440)
    profile = ClusterConfig(kind="slurm", gres="gpu:l40s:1,tmpfs:1", cpus=3, mem_gib=1.5, nodes=2)
    assert JobRequest.of(profile) == JobRequest(nodes=2, cpus=3, memory_mb=1536, gpus=l40s(1))


def test_what_a_run_asks_for_rules():
    profile = ClusterConfig(kind="slurm", partition="gpu", gpus=2, mem_gib=1, cpus=9, constraint="ib")
    request = Resources(mem_mb=9000, cpus=4, gpus=1, nodes=1, time_min=7)
    assert JobRequest.of(profile, request) == JobRequest(
        "gpu", cpus=4, memory_mb=9000, gpus=(("", 1),), minutes=7, constraint="ib"
    )
