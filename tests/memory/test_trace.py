"""Counting of live storages, for real and fake tensors."""

from __future__ import annotations

import gc
import math
import random
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from training_cases import config

from pwm_torchrl.algorithm.build import Facts
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.config import NETWORKS
from pwm_torchrl.envs.differentiable import make_torchrl_pendulum
from pwm_torchrl.memory import plan, trace
from pwm_torchrl.memory.readings import read_process
from pwm_torchrl.memory.trace import FakeTensors, RealTensors, StorageCounter, UpdateTracer, is_small

FACTS = Facts(3, 1, terminates=True)


@contextmanager
def counting(fake: bool):
    with FakeTensors() if fake else StorageCounter() as counter:
        yield counter


@contextmanager
def address_space(beyond: int):
    """Limit the address space to ``beyond`` bytes more than those in use."""
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (read_process().virtual + beyond, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
class TestCounting:
    def test_views_and_in_place_operations_add_nothing(self, fake):
        with counting(fake) as counter:
            x = torch.zeros(10, 100)
            views = x[2:], x.t(), x.view(-1), x.expand(3, 10, 100), x.detach(), *x.split(5)
            x.add_(1).clamp_(min=0)
            x[3] = 2.0
            assert counter.live == 4000
            assert counter.peak == 4000 + 4  # the number that is written
            del x
            assert counter.live == 4000  # a view keeps all of it
            del views
            assert counter.live == 0

    def test_temporaries_count_while_they_live(self, fake):
        with counting(fake) as counter:
            x = torch.zeros(1000)
            y = (x + 1) * 2  # x + 1 is alive together with x and y, then freed
            assert (counter.live, counter.peak) == (8000, 12000)
            assert counter.begin() == 8000 == counter.peak
            del y
            counter.next_phase()
            z = x + 1
            counter.next_phase()
            del x, z
            assert counter.peaks == [8000, 8000, 8000]
            assert counter.live == 0

    def test_every_result_of_an_operation_counts(self, fake):
        with counting(fake) as counter:
            values, indices = torch.zeros(5, 100).sort(-1)
            assert counter.live == 500 * 4 + 500 * 8
            chunks = values.unbind(0)
            assert counter.live == 500 * 12
            del values, indices
            assert counter.live == 2000
            assert len(chunks) == 5

    def test_saved_tensors_live_until_the_backward_pass(self, fake):
        with counting(fake) as counter:
            w = torch.zeros(100, requires_grad=True)
            out = (w.exp() * 2).sin().sum()  # saves exp's result and the product; the sine is gone
            assert counter.live == 3 * 400 + 4
            out.backward()
            assert counter.live == 2 * 400 + 4  # the parameter, its gradient and the result
            del out
            assert counter.live == 800

    def test_recomputed_tensors_are_not_saved(self, fake):
        def chain(x):
            for _ in range(5):
                x = x.sin()
            return x

        with counting(fake) as counter:
            w = torch.zeros(100, requires_grad=True)
            out = checkpoint(chain, w, use_reentrant=False)
            assert counter.live == 800
            counter.begin()
            out.sum().backward()
            assert counter.peak >= 800 + 5 * 400


def test_earlier_storages_do_not_count():
    x = torch.zeros(1000)
    with StorageCounter() as counter:
        y = x + 1
        assert counter.live == 4000
    del y  # storages freed outside are subtracted
    assert counter.live == 0


class TestFakeTensors:
    def test_can_be_entered_again(self):
        fake = FakeTensors()
        with fake:
            x = torch.zeros(1000, requires_grad=True)
        assert _get_current_dispatch_mode() is None
        with fake as counter:
            y = (2 * x).sum()
            y.backward()
            assert x.grad.shape == (1000,)
            assert counter.live == 8004
            del y
        del x
        assert fake.counter.live == 0

    def test_an_error_inside_leaves_real_tensors_outside(self):
        with pytest.raises(ValueError, match="of a test"), FakeTensors():
            raise ValueError("of a test")
        assert _get_current_dispatch_mode() is None
        assert torch.ones(2).sum().item() == 2

    @pytest.mark.parametrize("limit", [0.0, math.inf], ids=["fake", "real"])
    def test_has_no_side_effects(self, limit, monkeypatch):
        """Seeds are set before a run is planned."""
        monkeypatch.setattr(trace, "SMALL_OPERATIONS", limit)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        threads, modes = threading.enumerate(), torch.is_grad_enabled()
        UpdateTracer._persistent.clear()
        UpdateTracer._transient.clear()
        tracer = UpdateTracer(config({"algorithm.horizon": 2}), FACTS)
        assert tracer.persistent.total > 0
        assert all(tracer.transient(update, size).peak > 0 for update in NETWORKS for size in (None, 3))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
        assert (threading.enumerate(), torch.is_grad_enabled()) == (threads, modes)
        assert _get_current_dispatch_mode() is None

    def test_compiling_works_afterwards(self):
        with FakeTensors():
            torch.zeros(3).sin()
        compiled = torch.compile(lambda x: x.sin() * 2, fullgraph=True, backend="eager")
        x = torch.rand(3)
        assert torch.equal(compiled(x), x.sin() * 2)


def test_nothing_is_allocated():
    """Trace several GB in a process whose address space allows less than one."""
    cfg = config({"size.units": [8192, 8192], "size.latent_dim": 512, "algorithm.model_batch": 2048})
    with address_space(beyond=2**29):
        tracer = UpdateTracer(cfg, FACTS)
        before = read_process().rss
        assert tracer.persistent.total > 2e9
        assert tracer.transient("model").peak > 4e9
        assert read_process().rss - before < 2**28
        with pytest.raises(RuntimeError, match="memory"):
            torch.zeros(2**28)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dynamics.kind": "mlp"},
        {"model.dynamics.kind": "residual"},
        {},
        {"model.dynamics.checkpoint_substeps": True},
        {"model.dynamics.solver": "euler", "algorithm.detach": False, "algorithm.normalize_observations": True},
    ],
    ids=["mlp", "residual", "flow", "recomputed", "attached"],
)
def test_real_and_fake_tensors_have_the_same_bytes(changes, monkeypatch):
    """In each phase of each update, whole and in micro-batches."""
    cfg = config({"algorithm.horizon": 3, "algorithm.model_batch": 6, "algorithm.actor_batch": 6, **changes})
    real = UpdateTracer(cfg, FACTS)
    monkeypatch.setattr(trace, "SMALL_OPERATIONS", 0.0)
    fake = UpdateTracer(cfg, FACTS)
    assert (type(real._tensors), type(fake._tensors)) == (RealTensors, FakeTensors)
    UpdateTracer._persistent.clear()
    kept = real.persistent
    UpdateTracer._persistent.clear()
    assert kept == fake.persistent
    for update in NETWORKS:
        batch = real.batches[update]
        for size in (batch, 2):
            assert real._trace(update, batch, size, 3) == fake._trace(update, batch, size, 3)


class TestRealTensors:
    def test_start_no_threads(self):
        """A pool of threads would not survive a fork, and environments are forked after planning."""
        script = (
            "import os, numpy, torch\n"
            "from pwm_torchrl.memory.trace import RealTensors\n"
            "torch.set_num_threads(2)\n"
            "x = torch.from_numpy(numpy.ones((2000, 2000)))\n"
            "before = len(os.listdir('/proc/self/task'))\n"
            "with RealTensors():\n"
            "    x + 1\n"
            "assert torch.get_num_threads() == 2\n"
            "assert len(os.listdir('/proc/self/task')) == before\n"
            "x + 1\n"
            "assert len(os.listdir('/proc/self/task')) > before  # as the block would have done\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

    def test_a_tracer_leaves_nothing(self):
        UpdateTracer._persistent.clear()
        UpdateTracer._transient.clear()
        tracer = UpdateTracer(config({"algorithm.horizon": 2}), FACTS)
        counter, kept = tracer._tensors.counter, tracer.persistent
        assert tracer.transient("model").peak > 0
        assert tracer.transient("actor").peak > 0
        assert tracer.allocated == counter.live >= kept.total > 0
        gc.disable()
        try:
            del tracer
            assert counter.live <= kept.parameters  # TorchRL's modules refer to each other
            gc.collect()
            assert counter.live == 0
        finally:
            gc.enable()

    def test_the_base_of_a_plan_does_not_contain_them(self, monkeypatch):
        monkeypatch.setattr(plan, "framework_bytes", lambda: (10**9, "of a test"))
        options = plan.PlanOptions(config({}), make_torchrl_pendulum(2).pwm_info, "host")
        base = options.predict(options.fastest).items[0].bytes
        held = options.tracer(False).allocated
        assert held > 0
        assert base == 10**9 - held


def test_which_configurations_are_small():
    """The smallest size, even with the most expensive dynamics; not the next one, even with the cheapest."""
    for algorithm in ("pwm", "pwm_paper"):
        assert is_small(compose([f"algorithm={algorithm}", "model=flow_v3", "size=tiny", "env=pendulum"]), FACTS)
        assert not is_small(compose([f"algorithm={algorithm}", "model=mlp", "size=5m", "env=pendulum"]), FACTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm.model_batch": 10**6},
        {"size.encoder_units": [20_000]},
        {"size.num_critics": 10_000},
        {"model.dynamics.kind": "my_package.Dynamics"},
        {"algorithm.name": "my_package.Algorithm"},
    ],
)
def test_which_are_not(changes):
    assert is_small(config({}), FACTS)
    assert not is_small(config(changes), FACTS)


def test_nor_what_a_configuration_does_not_show():
    """The width of observations, a simulator, a model from a file."""
    cfg = config({})
    assert not is_small(cfg, replace(FACTS, observation_dim=84 * 84 * 4))
    assert not is_small(compose(["algorithm=shac", "env=pendulum_torchrl"]), FACTS)
    cfg.mode = "extract"
    assert not is_small(cfg, FACTS)
