"""Examples of first-order gradients and of planning, and the snippet of dynamics in TorchRL's loss: each runs, and says
what it measured.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"before: return (-?\d+) ± (\d+), after: return (-?\d+) ± (\d+)")
#: One iteration, as little as it can be.
SMALL = {
    "mppi_planning": ["--episodes", "2", "--candidates", "8", "--rounds", "1", "--horizon", "2"],
    "shac_on_pendulum": ["--episodes", "8", "--envs", "8", "--horizon", "4"],
    "foreign_world_model": ["--episodes", "2", "--steps", "40", "--model-updates", "2", "--policy-updates", "2"],
}


def load(path: Path) -> ModuleType:
    """A file as a module, without a folder of examples in ``sys.path``."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training before planning takes as few steps as it can, and draws no picture."""
    from pwm_torchrl.cli import compose as module
    from pwm_torchrl.run import train as run_module

    compose = module.compose
    few = [
        "env.episode_length=20",
        "memory=fixed",
        "training.replay_storage=memory",
        "algorithm.random_steps=0",
        "algorithm.first_model_updates=1",
    ]
    few += ["algorithm.model_batch=8", "training.eval_episodes=1"]
    monkeypatch.setattr(module, "compose", lambda words: compose([*words, *few]))
    monkeypatch.setattr(run_module, "write_curves", lambda run_dir: (run_dir / "curves.png").touch())


@pytest.mark.usefixtures("_short_runs")
@pytest.mark.parametrize("name", SMALL)
def test_an_iteration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    result = load(ROOT / "examples" / f"{name}.py").main(["--iterations", "1", "--json", str(file), *SMALL[name]])
    said = LINE.findall(capsys.readouterr().out)
    assert len(said) == 1, "one line with the result"
    assert [int(number) for number in said[0]] == [
        round(result[key]) for key in ("before", "before_std", "after", "after_std")
    ]
    assert json.loads(file.read_text(encoding="utf-8")) == result
    assert result["example"] == name
    assert -2000 < min(result["before"], result["after"]) <= max(result["before"], result["after"]) < 0


@pytest.mark.parametrize("name", SMALL)
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 200


def test_an_update_through_the_pendulum_is_that_of_its_equations() -> None:
    """The state of the example is another form of the environment's; the step itself is the environment's."""
    import torch

    example = load(ROOT / "examples" / "shac_on_pendulum.py")
    pendulum = example.Pendulum()
    angle, speed = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -7.9])
    action = torch.tensor([[0.5], [-1.0]], requires_grad=True)
    state, reward, terminated = pendulum(pendulum.state(angle, speed), action)
    torque = 2 * action.squeeze(-1)
    faster = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
    torch.testing.assert_close(state, pendulum.state(angle + 0.05 * faster, faster))
    expected = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    torch.testing.assert_close(reward.squeeze(-1), expected)
    assert not terminated.any()
    state[0, 2].backward()
    torch.testing.assert_close(action.grad.flatten(), torch.tensor([0.3 / 8, 0.0]))


def test_dynamics_in_torchrls_loss() -> None:
    first, last = load(ROOT / "docs" / "snippets" / "dynamics_in_torchrl_loss.py").main()
    assert set(last) == {"loss_reward", "loss_latent", "loss_reconstruction"}
    assert last["loss_reward"] < 0.1 * first["loss_reward"]
    assert last["loss_reconstruction"] < 0.1 * first["loss_reconstruction"]
