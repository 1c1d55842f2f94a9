from __future__ import annotations

import numpy as np
import pytest
import torch
from episode_cases import chunk, tasks
from test_shifts import linear_system

from pwm_torchrl.data.episodes import EpisodeRows, import_episodes, inspect_source, inspect_store
from pwm_torchrl.data.episodes.inspection import describe_shifts
from pwm_torchrl.errors import ConfigurationError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """30 episodes of cup-catch from a linear system whose rewards are stored a row late, and 2 of pendulum."""
    folder = tmp_path_factory.mktemp("inspect")
    for number, each in enumerate(linear_system("random", "reached", episodes=30, length=60, o=8)):
        values = {"action": each.action[1:], "observation": each.observation, "reward": np.roll(each.reward, 1)[1:]}
        np.savez(folder / f"{number}.npz", task="cup-catch", **values)
    torch.save(chunk(2, 9, [0, 0]), folder / "chunk.pt")
    return folder


@pytest.fixture(scope="module", params=["source", "store"])
def found(request, source, tmp_path_factory):
    if request.param == "source":
        return inspect_source(source, tasks())
    store = import_episodes(source, tmp_path_factory.mktemp("inspected") / "store", tasks())
    assert isinstance(store.episode_rows(0), EpisodeRows)
    return inspect_store(store)


def test_the_summary_of_each_task(found, source):
    pendulum, cup = found.tasks
    assert found.absent == ("cartpole-swingup",)
    assert not found.problems
    assert (pendulum.name, pendulum.episodes, pendulum.transitions, pendulum.lengths) == (
        "pendulum-swingup",
        2,
        16,
        (8, 8),
    )
    assert (cup.name, cup.episodes, cup.transitions, cup.lengths) == ("cup-catch", 30, 1800, (60, 60))
    assert (cup.observation_used, cup.observation_dim, cup.action_used, cup.action_dim) == (8, 8, 2, 2)
    returns = [np.load(source / f"{n}.npz")["reward"].sum() for n in range(30)]
    np.testing.assert_allclose(cup.return_quantiles, np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-4)


def test_shifts_are_described(found):
    pendulum, cup = found.tasks
    assert cup.action_shift.verdict == "aligned"
    assert cup.reward_shift.verdict == "late"
    assert describe_shifts(cup)[0].startswith("cup-catch: rewards are stored one row too late")
    assert describe_shifts(pendulum)[0].startswith("pendulum-swingup: cannot determine whether actions")
    assert describe_shifts(pendulum)[0].endswith("too few transitions")


def test_bad_sources_are_listed_and_the_others_inspected(tmp_path):
    torch.save(chunk(2, 9, [0, 0]), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    found = inspect_source(tmp_path, tasks())
    assert found.problems.keys() == {"b.pt"}
    assert found.tasks[0].episodes == 2
    with pytest.raises(ConfigurationError, match="is not an episode store"):
        inspect_store(tmp_path)
