"""summary.json, video.mp4 and the run's README."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pwm_torchrl.config import Config, LoggerConfig, ModelConfig, SizeConfig, TrainingConfig
from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.run.artifacts import write_run_readme, write_summary, write_video


def config(**changes):
    env = {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "name": "pendulum", "action_repeat": 2}
    return Config(model=ModelConfig(name="flow_v2"), size=SizeConfig(name="tiny"), env=env, seed=3, **changes)


class TestSummary:
    def test_replaces_the_old_one_and_writes_strict_json(self, tmp_path):
        write_summary(tmp_path, {"status": "running"})
        file = write_summary(tmp_path, {"status": "failed", "peak_return": math.nan, "list": [1, math.inf]})
        assert json.loads(file.read_text()) == {"status": "failed", "peak_return": None, "list": [1, None]}
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]

    def test_a_failed_write_keeps_the_old_one(self, tmp_path):
        file = write_summary(tmp_path, {"status": "running"})
        with pytest.raises(TypeError):
            write_summary(tmp_path, {"peak_return": torch.tensor(1.0)})
        assert json.loads(file.read_text()) == {"status": "running"}


class TestVideo:
    @pytest.mark.parametrize("shape", [(64, 48, 3), (65, 47, 3)])
    def test_can_be_read_back(self, tmp_path, shape):
        ffmpeg = pytest.importorskip("imageio_ffmpeg")
        frames = (np.full(shape, 10 * i, np.uint8) for i in range(12))
        file = write_video(tmp_path / "video.mp4", frames, fps=20)
        command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        even = (shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
        pictures = np.frombuffer(raw, np.uint8).reshape(-1, *even)
        assert len(pictures) == 12
        assert abs(pictures[-1].mean() - 110) < 6
        assert ffmpeg.count_frames_and_secs(str(file))[1] == pytest.approx(12 / 20, abs=0.01)
        assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]

    @pytest.mark.parametrize(
        ("frames", "problem"),
        [
            ([], "at least one frame"),
            ([np.zeros((8, 8), np.uint8)], r"shape \(8, 8\)"),
            ([np.zeros((8, 8, 3), np.float32)], "frame 0 is float32"),
            ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "frame 1 is uint8"),
        ],
    )
    def test_refuses_other_frames_and_leaves_nothing(self, tmp_path, frames, problem):
        pytest.importorskip("imageio_ffmpeg")
        with pytest.raises(ValueError, match=problem):
            write_video(tmp_path / "video.mp4", frames)
        assert not list(tmp_path.iterdir())

    def test_refuses_a_speed_of_zero(self, tmp_path):
        pytest.importorskip("imageio_ffmpeg")
        with pytest.raises(ValueError, match="fps=0"):
            write_video(tmp_path / "video.mp4", [], fps=0)

    def test_missing_library_names_its_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(MissingLibraryError, match=r"pip install 'pwm-torchrl\[video\]'"):
            write_video(tmp_path / "video.mp4", [])


class TestRunReadme:
    def test_explains_the_files(self, tmp_path):
        text = write_run_readme(tmp_path, config()).read_text()
        assert text.startswith("# pendulum, flow_v2, tiny, seed 3\n")
        for name in ("config.yaml", "metrics.csv", "summary.json", "checkpoints/", "curves.png", "video.mp4"):
            assert f"`{name}`" in text
        assert "(2 per decision)" in text
        assert "tensorboard" not in text
        assert str(tmp_path) not in text  # a run can be moved

    def test_mentions_what_was_chosen(self, tmp_path):
        chosen = config(
            logger=LoggerConfig(kind="tensorboard"), training=TrainingConfig(video=False, replay_storage="disk")
        )
        text = write_run_readme(tmp_path, chosen).read_text()
        assert "tensorboard --logdir" in text
        assert "`replay/`" in text
        assert "video.mp4" not in text
        assert "wandb sync" in write_run_readme(tmp_path, config(logger=LoggerConfig(kind="wandb"))).read_text()

    def test_of_a_pretraining(self, tmp_path):
        """It has no policy: nothing here asks for one."""
        text = write_run_readme(tmp_path, config(mode="pretrain")).read_text()
        assert "a world model of **pendulum**, trained on stored episodes" in text
        assert "experiment=extract task=all world_model=RUN" in text
        assert 'read_world_model("RUN")' in text
        for other in ("load_policy", "launch/evaluate.py", "video.mp4", "env_steps", "returns with"):
            assert other not in text

    def test_of_an_extraction(self, tmp_path):
        text = write_run_readme(tmp_path, config(mode="extract")).read_text()
        assert "through a world model of stored episodes" in text
        assert 'load_policy("RUN")' in text
        assert "gradient norms over epochs" in text
