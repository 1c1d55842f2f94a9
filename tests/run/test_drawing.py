"""curves.png, and the style that it shares with the report."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.run.artifacts import write_summary
from pwm_torchrl.run.drawing import format_steps, moving_mean, run_figure, write_curves
from pwm_torchrl.run.metrics import CsvMetrics


class TestCurves:
    def fill(self, run_dir, epochs):
        with CsvMetrics(run_dir / "metrics.csv") as metrics:
            for epoch in range(1, epochs + 1):
                row = {"epoch": epoch, "env_steps": 128 * epoch, "train/return": -1000.0 + epoch}
                row |= {"loss/model": 1 / epoch, "loss/actor": -0.1 * epoch, "loss/critic": 2.0, "grad_norm/actor": 0.5}
                row |= {f"grad_norm/{i}": 1.0 + i for i in range(9)}
                if epoch % 10 == 0:
                    row |= {"eval/return_mean": -900.0 + epoch, "eval/return_std": 50.0}
                metrics.write(row)

    @pytest.mark.parametrize("epochs", [1, 100])
    def test_draws_a_picture(self, tmp_path, epochs):
        image = pytest.importorskip("matplotlib.image")
        self.fill(tmp_path, epochs)
        write_summary(tmp_path, {"env": "e", "model": "m", "size": "s", "seed": 0, "random_return": -1200.0})
        picture = image.imread(write_curves(tmp_path))
        assert picture.shape[0] > 500
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.02
        assert not list(tmp_path.glob("*tmp*"))

    @pytest.mark.parametrize("validates", [True, False])
    def test_a_run_on_stored_episodes(self, validates):
        """Drawn over epochs; a pre-training shows its errors, and no panels of a policy that it does not have."""
        pytest.importorskip("matplotlib")
        metrics = {"epoch": [1, 2, 3, 4], "env_steps": [0] * 4, "loss/model": [1, 0.5, 0.3, 0.2]}
        metrics |= {"validation/loss": [0.5] * 4}
        metrics |= {"validation/reward_nmse/walk": [0.1] * 4} if validates else {"loss/actor": [1.0] * 4}
        picture = run_figure(metrics, {}, "name")
        titles = [axis.get_title(loc="left") for axis in picture.axes]
        assert ("Actor loss" in titles) is not validates
        assert ("Errors on held-out episodes, open loop" in titles) is validates
        assert {axis.get_xlabel() for axis in picture.axes} == {"epochs"}
        model = picture.axes[titles.index("Model losses")]
        assert model.lines[0].get_xdata().tolist() == [1, 2, 3, 4]

    def test_copes_with_missing_columns_and_values(self, tmp_path):
        pytest.importorskip("matplotlib")
        (tmp_path / "metrics.csv").write_text("epoch,env_steps,loss/model\n1,128,nan\n2,256,inf\n3,,1.0\n")
        assert write_curves(tmp_path).is_file()
        (tmp_path / "metrics.csv").write_text("epoch\n")
        assert write_curves(tmp_path).is_file()

    def test_leaves_pyplot_alone(self, tmp_path):
        matplotlib = pytest.importorskip("matplotlib")
        before = dict(matplotlib.rcParams)
        self.fill(tmp_path, 2)
        write_curves(tmp_path)
        assert dict(matplotlib.rcParams) == before

    def test_missing_matplotlib_names_its_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingLibraryError, match=r"pwm-torchrl\[plot\]"):
            write_curves(tmp_path)


def test_a_moving_mean_is_shorter_at_the_ends():
    assert moving_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3).tolist() == [1.5, 3.0, 6.0, 7.5]
    assert moving_mean(np.array([1.0, 3.0]), 99).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("steps", "text"), [(0, "0"), (999, "999"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")])
def test_ticks_of_a_step_axis(steps, text):
    assert format_steps(steps) == text
