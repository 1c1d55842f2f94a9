"""What a cluster profile may say."""

from __future__ import annotations

import pytest

pytest.importorskip("hydra")

from refusals import assert_refused

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.errors import ConfigurationError


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cluster.time=86400"], ["cluster.time=86400", '"24:00:00"', "cluster.time_min"]),
        (["cluster.time=tomorrow"], ["cluster.time=tomorrow is not a time limit"]),
        (["cluster.time=UNLIMITED"], ["cluster.time=UNLIMITED is not a time limit"]),
        (["cluster.time=1:00:00", "cluster.time_min=61"], ['cluster.time="1:00:00"', "cluster.time_min=61", "differ"]),
        (["cluster.time_min=2"], ["cluster.signal_delay_s=120 is not shorter than a job, 2 min"]),
        (["cluster.time_min=60", "cluster.max_time_min=1"], ["not shorter than a job, 1 min"]),
        (["cluster.partition='a b'"], ["cluster.partition='a b'"]),
        (["cluster.account="], ["cluster.account=''", "or null"]),
        (["cluster.constraint=' '"], ["cluster.constraint=' '"]),
        (
            ["cluster.mem_gib=120"],
            ["cluster.mem_gib=120", "cluster.host_gib=119"],
        ),
        (["cluster.mem_gib=0"], ["cluster.mem_gib=0", "above 0"]),
        (["cluster.gpus=-1"], ["cluster.gpus=-1", "at least 0"]),
        (["cluster.gpus=0"], ["cluster.gpus=0 requests no GPU", "cluster.gpu=l40s"]),
        (["cluster.gpu=null"], ["cluster.gpus=1 needs the type of GPU"]),
        (["cluster.gres=tmpfs:10G"], ["cluster.gres=tmpfs:10G requests no GPU", "gpu:TYPE:NUMBER"]),
        (["cluster.nodes=0"], ["cluster.nodes=0", "at least 1"]),
        (["cluster.cpus=0"], ["cluster.cpus=0", "at least 1"]),
        (["cluster.setup=module"], ["cluster.setup=module", "a list of texts"]),
        (["cluster.partion=gpu"], ["nearest: cluster.partition"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_bad_profiles_are_one_clear_sentence(words, parts):
    assert_refused(["cluster=l40s", *words], parts)


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.gres='gpu:l40s:1'", "cluster.gpus=0"],
        ["cluster.gpus=0", "cluster.gpu=null"],
        ["cluster.partition='short,long'", "cluster.account=a.b-c_d@e"],
        ["cluster.constraint='l40s&ib'"],
        ["cluster.setup=['module load cuda', 'ulimit -c 0']"],
        ["cluster.mem_gib=119"],
        ["cluster.time_min=1", "cluster.signal_delay_s=30"],
    ],
    ids=lambda v: " ".join(v),
)
def test_what_sites_write_is_accepted(words):
    compose(["cluster=l40s", *words])


@pytest.mark.parametrize(("text", "minutes"), [("24:00:00", 1440), ("1-12", 2160), ("90:30", 91), ("1-00:00:01", 1441)])
def test_a_time_limit_becomes_minutes(text, minutes):
    cluster = compose(["cluster=l40s", f"cluster.time={text}"]).cluster
    assert (cluster.time, cluster.time_min) == (None, minutes)
    assert compose(["cluster=l40s", f"cluster.time={text}", f"cluster.time_min={minutes}"]).cluster == cluster


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time: tomorrow\n", []),
        ("partition: a b\n", []),
        ("mem_gib: 0\n", []),
        ("kind: slurm\ngpus: 1\n", []),
        ("kind: local\npartition: gpu\n", []),
        ("kind: local\n", ["cluster.partition=gpu"]),
        ("sbatch: {output: x}\n", []),
        ("gpu: ${nope}\n", []),
        ("nodes: many\n", []),
        ("color: red\n", []),
        ("gpu: [\n", []),
        ("- a\n", []),
        ("defaults: [nope]\n", []),
        ("# @package _global_\nseed: x\n", []),
        ("# @package _global_\ncluster: {kind: slurm, gpus: 1}\n", []),
        ("gpu: \x00\n", []),
        ("defaults: [mine]\n", []),
        ("defaults: 5\n", []),
        ("defaults: [{/env: nope}]\n", []),
        ("sbatch: {nice: 3}\nkind: local\n", []),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_what_is_wrong_with_a_profile_of_ones_own_names_its_file(text, words, tmp_path, monkeypatch):
    file = own(text, tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError) as caught:
        compose(["cluster=mine", *words])
    assert str(caught.value).count(str(file)) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("partition: ???\n", "cluster.partition"),
        ("gpus: ???\n", "cluster.gpus"),
        ("kind: ???\n", "cluster.kind"),
        ("setup: ???\n", "cluster.setup"),
        ("setup: [module load cuda, '???']\n", "cluster.setup"),
        ("sbatch: ???\n", "cluster.sbatch"),
        ("sbatch:\n  nice: ???\n", "cluster.sbatch.nice"),
        ("account: ${cluster.partition}\npartition: ???\n", "cluster.partition"),
        ("defaults: [l40s, _self_]\ngpus: ???\n", "cluster.gpus"),
        ("# @package _global_\nseed: ???\n", "seed"),
        ("\n# @package _global_\nenv:\n  num_envs: ???\n", "env.num_envs"),
    ],
)
def test_a_value_that_a_profile_leaves_open_is_asked_for(text, key, tmp_path, monkeypatch):
    """Merged, it would let the default stand without a word."""
    file = own(text, tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError) as caught:
        compose(["cluster=mine"])
    assert str(caught.value) == f"{file}: {key} has no value; write one there, or set {key}=..."


@pytest.mark.parametrize(
    ("text", "word", "key", "value"),
    [
        ("partition: ???\n", "cluster.partition=gpu", "partition", "gpu"),
        ("sbatch: ???\n", "cluster.sbatch.nice=3", "sbatch", {"nice": 3}),
        ("sbatch:\n  nice: ???\n", "cluster.sbatch={nice: 3}", "sbatch", {"nice": 3}),
    ],
)
def test_it_may_be_given_beside_it(text, word, key, value, tmp_path, monkeypatch):
    own(f"kind: slurm\n{text}", tmp_path, monkeypatch)
    assert getattr(compose(["cluster=mine", word]).cluster, key) == value


@pytest.mark.parametrize("entry", ["site", "/cluster/site", "{/cluster: site}", "{/env: site}"])
def test_so_is_what_a_file_leaves_open_that_a_profile_builds_on(entry, tmp_path, monkeypatch):
    group, key = ("env", "num_envs") if "env" in entry else ("cluster", "partition")
    mine = own(f"defaults: [{entry}, _self_]\nkind: slurm\n", tmp_path, monkeypatch)
    site = tmp_path / group / "site.yaml"
    site.parent.mkdir(exist_ok=True)
    site.write_text(f"# @package {group}\n{key}: ???\n")
    with pytest.raises(ConfigurationError, match=f"{group}.{key} has no value") as caught:
        compose(["cluster=mine"])
    assert str(site) in str(caught.value)
    if group == "cluster":
        mine.write_text(f"defaults: [{entry}, _self_]\nkind: slurm\npartition: gpu\n")
        assert compose(["cluster=mine"]).cluster.partition == "gpu"


def test_of_two_files_the_one_is_named_that_says_it(tmp_path, monkeypatch):
    mine = own("defaults: [site, _self_]\nkind: slurm\n", tmp_path, monkeypatch)
    (tmp_path / "cluster" / "site.yaml").write_text("time: tomorrow\n")
    with pytest.raises(ConfigurationError, match="time=tomorrow is not a time limit") as caught:
        compose(["cluster=mine"])
    assert str(tmp_path / "cluster" / "site.yaml") in str(caught.value)
    assert str(mine) not in str(caught.value)


def test_what_is_no_fault_of_the_profile_does_not(tmp_path, monkeypatch):
    file = own("partition: gpu\n", tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError) as caught:
        compose(["cluster=mine", "training.epochs=-1"])
    assert str(file) not in str(caught.value)


def own(text, folder, monkeypatch):
    file = folder / "cluster" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(text)
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(folder))
    return file


def test_so_does_what_is_found_out_when_it_is_planned(tmp_path, monkeypatch, capsys):
    file = own("kind: slurm\nmem_gib: 0.1\n", tmp_path, monkeypatch)
    assert run_command("plan", ["cluster=mine", "device=cpu"]) == 2
    said = capsys.readouterr().err
    assert "cluster.mem_gib" in said
    assert said.count(str(file)) == 1
    assert run_command("plan", ["cluster=mine", "device=cpu", "cluster.mem_gib=0.2"]) == 2
    assert str(file) not in capsys.readouterr().err
