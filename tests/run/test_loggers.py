"""Loggers: what is made, where it falls back, and that it never ends a run."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import time

import numpy as np
import pytest
import torch

from pwm_torchrl.config import LoggerConfig
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run import loggers
from pwm_torchrl.run.loggers import RunWandbLogger, close_logger, make_logger

CONFIG = {"seed": 0, "model": {"name": "mlp"}}


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """No key, no home with one, and a server address on this machine where nobody listens."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_csv_needs_no_logger(tmp_path):
    assert make_logger(LoggerConfig(), tmp_path, CONFIG) is None
    assert make_logger(LoggerConfig(kind="wandb", mode="disabled"), tmp_path, CONFIG) is None
    close_logger(None)


def test_unknown_choices_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"logger\.kind='tb' is unknown; choose csv, tensorboard, wandb"):
        make_logger(LoggerConfig(kind="tb"), tmp_path, CONFIG)
    with pytest.raises(ConfigurationError, match=r"logger\.mode='on' is unknown"):
        make_logger(LoggerConfig(kind="wandb", mode="on"), tmp_path, CONFIG)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=rf"pip install 'pwm-torchrl\[{kind}\]'"):
        make_logger(LoggerConfig(kind=kind), tmp_path, CONFIG)


class TestTensorboard:
    def read(self, run_dir):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run_dir / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss/model")]

    def test_writes_into_the_run_directory_and_resumes(self, tmp_path):
        pytest.importorskip("tensorboard")
        logger = make_logger(LoggerConfig(kind="tensorboard"), tmp_path, CONFIG)
        for step in range(5):
            logger.log_metrics({"loss/model": float(step)}, step=step)
        close_logger(logger)
        assert self.read(tmp_path) == [(step, float(step)) for step in range(5)]

        # A process died after step 4; its checkpoint was of step 2.
        logger = make_logger(LoggerConfig(kind="tensorboard"), tmp_path, CONFIG, first_step=3)
        logger.log_metrics({"loss/model": 30.0}, step=3)
        close_logger(logger)
        assert self.read(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.usefixtures("no_wandb_account")
class TestWandb:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("wandb")

    def test_auto_without_a_key_logs_offline_and_says_so(self, tmp_path, caplog):
        before = dict(os.environ)
        logger = make_logger(LoggerConfig(kind="wandb"), tmp_path, CONFIG)
        try:
            assert isinstance(logger, RunWandbLogger)
            assert logger.offline
            assert "offline because there is no key" in caplog.text
            # Later processes of this one must not inherit the mode.
            assert os.environ.get("WANDB_MODE") == before.get("WANDB_MODE")
            run_id = logger.experiment.id
            assert (tmp_path / "wandb_id.txt").read_text().strip() == run_id
            started = time.perf_counter()
            for step in range(20):
                logger.log_metrics({"loss/model": 0.5}, step=step)
            assert time.perf_counter() - started < 5.0  # a stall would be a timeout, tens of seconds
        finally:
            close_logger(logger)
        assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
        # A resumed run continues under the same id.
        assert loggers._stable_id(tmp_path) == run_id

    def test_auto_without_network_logs_offline(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert loggers.offline_reason() == "127.0.0.1 cannot be reached"

    def test_a_proxy_is_what_must_be_reached(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid")
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert loggers.offline_reason() is None
        assert loggers.offline_reason() == "wandb.invalid cannot be reached"

    def test_a_key_in_netrc_counts(self, monkeypatch, tmp_path):
        file = tmp_path / "netrc"
        file.write_text("machine 127.0.0.1 login user password " + "0" * 40 + "\n")
        file.chmod(0o600)
        monkeypatch.setenv("NETRC", str(file))
        assert loggers.offline_reason() == "127.0.0.1 cannot be reached"

    def test_online_without_a_server_falls_back_and_logs(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(loggers, "INIT_TIMEOUT", 1.0)
        logger = make_logger(LoggerConfig(kind="wandb", mode="online"), tmp_path, CONFIG)
        assert logger is not None
        assert logger.offline
        assert "so it logs offline" in caplog.text
        logger.log_metrics({"loss/model": 0.5}, step=0)
        close_logger(logger)
        assert list((tmp_path / "wandb").glob("offline-run-*"))

    def test_start_that_always_fails_leaves_metrics_csv(self, tmp_path, monkeypatch, caplog):
        started = []

        def start(cfg, run_dir, run_config, mode):
            started.append(mode)
            raise TimeoutError("no answer\nand a long explanation")

        monkeypatch.setattr(loggers, "_start_wandb", start)
        assert make_logger(LoggerConfig(kind="wandb", mode="online"), tmp_path, CONFIG) is None
        assert started == ["online", "offline"]
        assert len([record for record in caplog.records if record.name == loggers.__name__]) == 2
        assert "could not start online (no answer), so it logs offline" in caplog.text
        assert "long explanation" not in caplog.text

    def test_a_logger_that_breaks_is_silenced_not_raised(self, monkeypatch, caplog):
        class Experiment:
            calls = 0

            def define_metric(self, *args, **kwargs):
                pass

            def log(self, *args, **kwargs):
                self.calls += 1
                raise BrokenPipeError("service gone")

        experiment = Experiment()
        monkeypatch.setattr(RunWandbLogger, "_create_experiment", lambda self: experiment)
        logger = RunWandbLogger("name", log_env_packages=False)
        for step in range(3):
            logger.log_metrics({"x": 1.0}, step=step)
        assert experiment.calls == 1
        assert caplog.text.count("W&B stopped logging (service gone)") == 1

    def test_leaves_the_seeded_generators_alone(self, tmp_path):
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        close_logger(make_logger(LoggerConfig(kind="wandb", mode="offline"), tmp_path, CONFIG))
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class TestCloseLogger:
    class Slow:
        def shutdown(self):
            time.sleep(5)

    class Failing:
        def shutdown(self):
            raise RuntimeError("no")

    def test_does_not_wait_for_ever(self, caplog):
        started = time.perf_counter()
        close_logger(self.Slow(), timeout=0.05)
        assert time.perf_counter() - started < 4
        assert "did not finish within" in caplog.text

    def test_does_not_raise(self, caplog):
        close_logger(self.Failing())
        assert "closing Failing failed: no" in caplog.text
