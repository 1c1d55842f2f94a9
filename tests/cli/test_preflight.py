"""What is missing is found before anything is written: one sentence with its key, exit code 2, no run directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")
pytest.importorskip("submitit")

from slurm_texts import SITE
from stored_cases import write_store
from training_stub import BAD_INPUT, BUG

from pwm_torchrl.cli import prepare, submit
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.prepare import HERE, LOCAL, SLURM, compose_all, preflight
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run import claims
from pwm_torchrl.run.claims import Identity
from pwm_torchrl.run.directory import load_config, prepare_run_dir, save_config

pytestmark = pytest.mark.usefixtures("stub_training", "workdir")

#: Environments of a user's own; each of them is wrong in its way.
ROBOTS = '''
import sys

from torchrl.envs import EnvBase, GymEnv, ParallelEnv


class Bare(EnvBase):
    """Has none of the specs."""

    def _reset(self, tensordict=None, **kwargs): ...
    def _step(self, tensordict): ...
    def _set_seed(self, seed): ...


class Broken(Bare):
    @property
    def action_keys(self):
        raise RuntimeError("the action spec is not there yet")


def raises():
    raise KeyError("no such robot")


def exits():
    sys.exit("no licence")


def a_number():
    return 3


def pendulum():
    return GymEnv("Pendulum-v1")


def four():
    return ParallelEnv(4, pendulum)
'''

#: Of a command: what is missing, where it says so.
CASES = {
    "simulator": (["env=gymnasium", "env.id=Walker2d-v5"], "mujoco", "env.id=Walker2d-v5 needs mujoco"),
    "dm_control": (["env=cartpole_swingup"], "dm_control.suite", "env.domain=cartpole needs dm_control"),
    "dflex": (["env=dflex_ant"], "dflex", "env.name=dflex_ant needs dflex"),
    "rewarped": (["env=rewarped_ant"], "rewarped", "env.name=rewarped_ant needs rewarped"),
    "brax": (["env=brax", "env.id=ant"], "brax", "env.id=ant needs"),
    "id": (["env=gymnasium", "env.id=Walkr2d-v5"], None, "env.id='Walkr2d-v5' is not a gymnasium environment"),
    "maker": (["env._target_=robots.pendulm"], None, "env._target_='robots.pendulm': robots has no"),
    "module": (["env._target_=half.make"], None, "env._target_='half.make': importing half raised SyntaxError: "),
    "raises": (
        ["env._target_=robots.raises"],
        None,
        "env._target_=robots.raises raised KeyError: 'no such robot' (robots.py, line 22)",
    ),
    "exits": (["env._target_=robots.exits"], None, "env._target_=robots.exits raised SystemExit: no licence"),
    "a number": (["env._target_=robots.a_number"], None, "env._target_=robots.a_number returned a int"),
    "specs": (["env._target_=robots.Bare"], None, "env._target_=robots.Bare has the action entries []"),
    "specs that raise": (
        ["env._target_=robots.Broken"],
        None,
        "env._target_=robots.Broken made an environment that raised RuntimeError: the action spec is not there yet",
    ),
    "batch": (["env._target_=robots.four"], None, "made a batch of [4] instead of env.num_envs=8"),
    "batch of evaluation": (
        ["env._target_=robots.four", "env.num_envs=4", "training.eval_episodes=3"],
        None,
        "made a batch of [4] instead of training.eval_episodes=3",
    ),
    "slice": (["env.episode_length=null", "algorithm.slice_steps=300"], None, "algorithm.slice_steps=300 is longer"),
    "tensorboard": (["logger=tensorboard"], "tensorboard", "logger=tensorboard needs the tensorboard library"),
    "W&B": (["logger=wandb"], "wandb", "logger=wandb needs the wandb library"),
    "key of W&B": (["logger=wandb", "logger.mode=online"], None, "logger.mode=online needs a W&B key"),
    "video": ([], "imageio_ffmpeg", "training.video=true needs imageio-ffmpeg"),
    "data": (["experiment=pretrain", "data.path=nowhere"], None, "nowhere"),
    "slices": (["experiment=pretrain", "data.path=store", "algorithm.slice_steps=400"], None, "algorithm.slice_steps"),
    "folder": (["runs_dir=robots.py/runs"], None, "runs_dir="),
    "folder of the run": (["run_dir=robots.py/run"], None, "run_dir="),
}
#: What is found otherwise, or does not matter, where a job runs elsewhere.
HERE_ONLY = {
    "GPU": (["device=cuda:99"], None, "device='cuda:99' does not exist"),
    "GPU of the simulator": (["+env.device=cuda:99"], None, "env.device='cuda:99' does not exist"),
    "node's disk": (
        ["experiment=pretrain", "data.path=store", "data.stage=scratch"], None, "data.stage=scratch needs a directory"
    ),
    "world model": (
        ["experiment=extract", "data.path=store", "world_model=unfinished", "task=cup-catch"],
        None,
        "world_model=unfinished",
    ),
}  # fmt: skip
SLURM_ONLY = {
    "GPU of the node": (["device=cuda"], None, "device=cuda needs a GPU, and cluster=cpu has none"),
    "GPU of the simulator": (["+env.device=cuda"], None, "env.device=cuda needs a GPU, and cluster=cpu has none"),
}


@pytest.fixture(autouse=True)
def user(workdir, monkeypatch):
    """A user's folder, and no account at W&B."""
    (workdir / "robots.py").write_text(ROBOTS)
    (workdir / "half.py").write_text("def make(:\n")
    monkeypatch.setattr("pwm_torchrl.run.loggers.has_wandb_key", lambda: False)
    for name in ("SLURM_TMPDIR", "TMPDIR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    yield workdir
    sys.modules.pop("robots", None)


@pytest.fixture
def login_node(monkeypatch):
    """SLURM is found, nothing may be submitted to it, and what would be is noted."""
    submitted = []

    def refuse(runs, *args):
        submitted.extend(runs)
        raise ConfigurationError("SLURM refused the job: no")

    monkeypatch.setattr(prepare, "slurm_available", lambda: True)
    monkeypatch.setattr(prepare, "site", lambda: SITE)
    monkeypatch.setattr(submit, "submit_runs", refuse)
    return submitted


def hide(monkeypatch, library):
    if library is not None:
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, library.partition(".")[0], None)


def fill(words, folder):
    """What the case refers to."""
    if "data.path=store" in words:
        write_store(folder / "store", ("cup-catch", "pendulum-swingup"))
    if "world_model=unfinished" in words:
        begun = compose(["experiment=pretrain", "data.path=store", "model=mlp", "size=tiny", "run_dir=unfinished"])
        from pwm_torchrl.run.validation import write_model_description

        write_model_description(begun, prepare_run_dir(begun).path)


def refusal(command, words, capsys):
    """The sentence of a command that ends with exit code 2 and leaves the folder as it was."""
    before = sorted(Path().rglob("*"))
    assert run_command(command, words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.out + shown.err
    assert [each for each in sorted(Path().rglob("*")) if "__pycache__" not in each.parts] == [
        each for each in before if "__pycache__" not in each.parts
    ]
    assert not multiprocessing.active_children()
    return shown.err


@pytest.mark.parametrize("case", {**CASES, **HERE_ONLY})
@pytest.mark.parametrize("command", ["train", "submit"])
def test_on_this_machine(command, case, user, monkeypatch, capsys):
    words, library, sentence = {**CASES, **HERE_ONLY}[case]
    fill(words, user)
    hide(monkeypatch, library)
    assert sentence in refusal(command, [*words, "cluster=local"], capsys)


@pytest.mark.parametrize("case", {**CASES, **SLURM_ONLY})
def test_on_a_login_node(case, user, login_node, monkeypatch, capsys):
    words, library, sentence = {**CASES, **SLURM_ONLY}[case]
    fill(words, user)
    hide(monkeypatch, library)
    assert sentence in refusal("submit", [*words, "cluster=cpu"], capsys)
    assert not login_node


@pytest.mark.parametrize("case", ["data", "slices", "folder", "W&B", "key of W&B"])
def test_of_a_pretraining(case, user, monkeypatch, capsys):
    words, library, sentence = CASES[case]
    words = [word for word in words if not word.startswith("experiment=")]
    if "data.path=nowhere" not in words:
        words = list(dict.fromkeys([*words, "data.path=store"]))
    fill(words, user)
    hide(monkeypatch, library)
    assert sentence in refusal("pretrain", words, capsys)


@pytest.mark.parametrize("slurm", [False, True])
def test_without_submitit(slurm, request, monkeypatch, capsys):
    if slurm:
        request.getfixturevalue("login_node")
    hide(monkeypatch, "submitit")
    assert "pip install 'pwm-torchrl[launch]'" in refusal("submit", ["cluster=cpu" if slurm else "seed=1"], capsys)


@pytest.mark.parametrize("slurm", [False, True])
def test_every_run_of_a_sweep_comes_before_the_first_directory(slurm, request, capsys):
    if slurm:
        request.getfixturevalue("login_node")
    words = ["env=gymnasium", "env.id=Pendulum-v1,Nothing-v0", "cluster=cpu" if slurm else "cluster=local"]
    assert "env.id='Nothing-v0'" in refusal("submit", words, capsys)


def test_runs_that_share_an_environment_make_it_once(monkeypatch):
    from pwm_torchrl.envs import facts

    made, probe = [], facts.probe_env
    monkeypatch.setattr(facts, "probe_env", lambda *args, **named: made.append(args) or probe(*args, **named))
    runs = [compose([f"seed={seed}", f"env.num_envs={count}"]) for seed, count in ((1, 8), (2, 8), (3, 4))]
    assert [info.num_envs for info in preflight(runs, LOCAL)] == [8, 8, 4]
    assert len(made) == 2


def test_the_memory_plan_takes_the_facts(login_node, monkeypatch, capsys):
    def again(config):
        raise AssertionError("the environment was made a second time")

    monkeypatch.setattr(prepare, "run_facts", again)
    assert run_command("submit", ["cluster=cpu", "model=mlp", "algorithm.horizon=3"]) == 2
    assert "SLURM refused" in capsys.readouterr().err
    assert len(login_node) == 1  # it was planned, and would have been submitted


def test_a_simulator_with_a_gpu_is_not_made_for_a_job(monkeypatch):
    """Its maker and its library are looked up, and that is all."""
    config = compose(["env._target_=robots.raises", "env.device=cuda", "cluster=l40s"])
    assert preflight([config], SLURM) == [None]
    config.env["_target_"] = "robots.nothing"
    with pytest.raises(ConfigurationError, match=r"env\._target_='robots\.nothing'"):
        preflight([config], SLURM)
    hide(monkeypatch, "dflex")
    config = compose(["env=dflex_ant", "+env.device=cuda", "cluster=l40s"])
    with pytest.raises(MissingLibraryError, match=r"env.name=dflex_ant needs dflex.*env=rewarped_ant"):
        preflight([config], SLURM)
    hide(monkeypatch, "warp")
    config = compose(["env=rewarped_ant", "+env.device=cuda", "cluster=l40s"])
    with pytest.raises(MissingLibraryError, match=r"env.name=rewarped_ant needs .*pwm-torchrl\[rewarped\]"):
        preflight([config], SLURM)


def test_what_a_profile_sets_up_need_not_be_here(monkeypatch):
    hide(monkeypatch, "tensorboard")
    config = compose(["logger=tensorboard", "cluster=cpu"])
    with pytest.raises(MissingLibraryError, match="logger=tensorboard"):
        preflight([config], SLURM)
    config.cluster.setup = ["module load tensorboard"]
    (facts,) = preflight([config], SLURM)
    assert (facts.observation_dim, facts.num_envs) == (3, 8)


def test_nor_when_the_words_are_read(monkeypatch):
    hide(monkeypatch, "tensorboard")
    monkeypatch.setattr(prepare, "slurm_available", lambda: True)
    words = ["logger=tensorboard", "cluster=cpu"]
    with pytest.raises(MissingLibraryError, match="logger=tensorboard"):
        compose_all(words)
    (run,) = compose_all([*words, "cluster.setup=['module load tensorboard']"])
    assert run.config.cluster.setup == ["module load tensorboard"]


def test_jobs_choose_their_own_graphics(monkeypatch):
    """A login node without EGL would otherwise keep its jobs from drawing."""
    pytest.importorskip("mujoco")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    preflight([compose(["env=halfcheetah"])], SLURM)
    assert "MUJOCO_GL" not in os.environ


class TestRefusedInTraining:
    """A run directory that a command has made does not stay where its run was refused before it trained."""

    def test_is_removed(self, capsys):
        assert "algorithm.horizon=9 is longer" in refusal("train", [f"seed={BAD_INPUT}", "runs_dir=a/b"], capsys)
        assert "run directory" not in refusal("train", [f"seed={BAD_INPUT}", "run_dir=c/d"], capsys)

    def test_other_runs_stay(self, capsys):
        assert run_command("train", ["seed=1", "training.epochs=1", "runs_dir=runs"]) == 0
        capsys.readouterr()
        refusal("train", [f"seed={BAD_INPUT}", "runs_dir=runs"], capsys)

    def test_a_directory_that_was_there_stays(self, capsys):
        Path("mine").mkdir()
        assert run_command("train", [f"seed={BAD_INPUT}", "run_dir=mine"]) == 2
        assert f"run directory: {Path('mine').absolute()}" in capsys.readouterr().err
        assert Path("mine/config.yaml").is_file()

    def test_what_has_trained_stays(self, stub_training, monkeypatch, capsys):
        def refused_later(config, run_dir, **options):
            (run_dir / "metrics.csv").write_text("epoch\n1\n")
            raise ConfigurationError("training.epochs=3 is refused in the middle")

        monkeypatch.setattr(stub_training, "train", refused_later)
        assert run_command("train", ["run_dir=run"]) == 2
        assert Path("run/metrics.csv").is_file()
        assert "run directory: " in capsys.readouterr().err

    def test_a_bug_leaves_its_traces(self):
        with pytest.raises(KeyError):
            run_command("train", ["run_dir=run", f"seed={BUG}"])
        assert Path("run/config.yaml").is_file()

    def test_what_slurm_refuses(self, login_node, capsys):
        words = ["cluster=cpu", "model=mlp", "algorithm.horizon=3", "seed=1,2", "runs_dir=queued"]
        assert run_command("submit", words) == 2
        assert "SLURM refused the job" in capsys.readouterr().err
        assert len(login_node) == 2
        assert [each.name for each in Path("queued").iterdir()] == [".code"]  # of all jobs that have this code


class TestRunsThatAreThere:
    @pytest.fixture
    def run(self, user):
        """A run of the user's own environment that has stopped."""
        config = compose(["env._target_=robots.pendulum", "run_dir=run", "env.num_envs=2"])
        path = prepare_run_dir(config).path
        (path / "summary.json").write_text(json.dumps({"status": "stopped"}))
        return path

    def test_resuming_where_the_environment_is_not_found(self, run, tmp_path, monkeypatch, capsys):
        """The run stays as it was: it is this folder that is wrong, not the run."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(run.parent))])
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        assert run_command("resume", [str(run)]) == 1
        assert "env._target_='robots.pendulum': there is no module 'robots'" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    def test_a_job_that_comes_back_has_its_own_copy(self, run):
        config = load_config(run)
        config.env["_target_"] = "robots.moved"
        with pytest.raises(ConfigurationError, match=r"robots\.moved"):
            preflight([config], LOCAL, again=True)
        assert preflight([config], SLURM, again=True) == [None]

    @pytest.mark.parametrize("command", ["train", "submit"])
    def test_one_in_use_keeps_its_configuration(self, command, run, capsys):
        """``train.py`` runs in another terminal, and the same is typed again with another setting."""
        (run / claims.FOLDER).mkdir()
        claim = claims.Claim(1, Identity.here({})).as_dict()
        (run / claims.FOLDER / "000001.json").write_text(json.dumps(claim))
        before = (run / "config.yaml").read_bytes()
        words = ["env._target_=robots.pendulum", "env.num_envs=2", "run_dir=run", "training.progress=false"]
        assert re.search(r"run_dir=\S+ is in use by process \d+", refusal(command, words, capsys))
        assert (run / "config.yaml").read_bytes() == before

    def test_the_configuration_is_left_to_whoever_claims_it(self, run):
        changed = compose(["env._target_=robots.pendulum", "env.num_envs=2", "run_dir=run", "training.progress=false"])
        before = (run / "config.yaml").read_bytes()
        assert prepare_run_dir(changed, here=True).resume
        assert (run / "config.yaml").read_bytes() == before
        save_config(changed, run)
        assert not load_config(run).training.progress


def test_here_is_what_is_right(capsys):
    (facts,) = preflight([compose()], HERE)
    assert (facts.name, facts.observation_dim, facts.action_dim, facts.num_envs) == ("pendulum", 3, 1, 8)
    assert list(Path().glob("runs*")) == []
