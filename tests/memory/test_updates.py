"""Memory of a run's updates: extrapolated traces against whole ones, and sums over real networks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from training_cases import config

from pwm_torchrl.algorithm.build import Facts, build_losses, build_networks, build_optimizers
from pwm_torchrl.config import NETWORKS
from pwm_torchrl.memory import trace as updates
from pwm_torchrl.memory.trace import Transient, UpdateTracer

FACTS = Facts(5, 2, terminates=True)
MODELS = {
    "mlp": {"model.dynamics.kind": "mlp"},
    "residual": {"model.dynamics.kind": "residual"},
    "flow_v1": {},
    "flow_v2": {"model.dynamics.substeps": 4},
    "flow_v3": {"model.dynamics.substeps": 8, "model.dynamics.solver": "euler"},
    "flow_v1_recomputed": {"model.dynamics.checkpoint_substeps": True},
    "flow_v3_recomputed": {
        "model.dynamics.substeps": 8,
        "model.dynamics.solver": "euler",
        "model.dynamics.checkpoint_substeps": True,
    },
}
BATCHES = {"algorithm.model_batch": 64, "algorithm.actor_batch": 64, "algorithm.horizon": 6}
#: Models whose long horizon is traced in the fast tests, too.
FAST = ("mlp", "flow_v1_recomputed")


def whole_trace(tracer: UpdateTracer, update: str, size: int | None = None) -> Transient:
    """A trace at the full horizon."""
    batch = tracer.batches[update]
    return tracer._trace(update, batch, size or batch, tracer.cfg.algorithm.horizon)


def in_parts(tracer: UpdateTracer, update: str, size: int) -> int:
    """Peak of an update that runs all of its micro-batches."""
    batch = tracer.batches[update]
    with tracer._tensors:
        made = tracer._updates()
        losses = {"model": made.losses.model, "actor": made.losses.actor, "critic": made.losses.critic}[update]
        backward = losses.backward
        losses.__dict__["backward"] = lambda data: backward(data, size)
        try:
            return made.measure(update, batch, batch, tracer.cfg.algorithm.horizon).peak
        finally:
            del losses.__dict__["backward"]


class TestShortHorizons:
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
            for name in MODELS
            if not name.startswith(("flow_v2", "flow_v3"))  # like flow_v1, with more evaluations
        ],
    )
    def test_extrapolation_to_a_long_one(self, name):
        """Beyond 16 steps, memory is linear in the horizon to 1 %."""
        tracer = UpdateTracer(config({**BATCHES, "algorithm.horizon": 20, **MODELS[name]}), FACTS)
        for update in ("model", "actor"):
            for size in (16,) if name in FAST else (None, 16):
                whole = whole_trace(tracer, update, size)
                assert tracer.transient(update, size).peak == pytest.approx(whole.peak, rel=0.01)
                assert tracer.transient(update, size).data == whole.data

    def test_a_short_horizon_is_traced_as_it_is(self):
        tracer = UpdateTracer(config({**BATCHES, "algorithm.horizon": 3}), FACTS)
        assert tracer.transient("actor") == whole_trace(tracer, "actor")


class TestMicroBatches:
    @pytest.mark.parametrize(
        ("update", "name"),
        [
            *((update, name) for update in ("model", "actor") for name in ("mlp", "flow_v1_recomputed")),
            ("critic", "mlp"),
        ],
    )
    def test_the_last_one_has_the_peak_of_all(self, update, name):
        sizes = {"algorithm.model_batch": 12, "algorithm.actor_batch": 12, "algorithm.horizon": 3}
        tracer = UpdateTracer(config({**sizes, **MODELS[name]}), FACTS)
        batch = tracer.batches[update]
        for size in (3, batch // 2):
            peak = tracer.transient(update, size).peak
            # Up to the running sums of losses and returns, some bytes per micro-batch.
            assert peak == pytest.approx(in_parts(tracer, update, size), abs=64 * batch // size + 256)

    def test_a_smaller_last_one_is_traced_at_full_size(self):
        sizes = {"algorithm.model_batch": 12, "algorithm.actor_batch": 12, "algorithm.horizon": 3}
        tracer = UpdateTracer(config(sizes), FACTS)
        for update in NETWORKS:
            size = tracer.batches[update] * 2 // 3 + 1
            assert tracer.transient(update, size).peak >= in_parts(tracer, update, size)

    def test_need_less_the_smaller_they_are(self):
        tracer = UpdateTracer(config({**BATCHES, "algorithm.model_batch": 512}), FACTS)
        peaks = [tracer.transient("model", size).peak for size in (None, 128, 32, 8)]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[-1] < 0.1 * peaks[0]

    def test_one_as_large_as_the_batch_equals_no_split(self):
        tracer = UpdateTracer(config(BATCHES), FACTS)
        assert tracer.transient("actor", 64) == tracer.transient("actor", 1000) == tracer.transient("actor")


class TestParts:
    def test_persistent_bytes_are_those_of_the_networks(self):
        cfg = config({"algorithm.normalize_observations": True, "model.reward_head": "two_hot"})
        kept = UpdateTracer(cfg, FACTS).persistent
        networks = build_networks(cfg, FACTS)
        build_losses(cfg, networks)
        tensors = [t for _, network in networks.items() for t in (*network.parameters(), *network.buffers())]
        assert kept.parameters == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        learned = [p for made in build_optimizers(cfg, networks).values() for p in made.parameters]
        weights, steps = sum(p.nbytes for p in learned), 4 * len(learned)
        assert kept.optimizer == 2 * weights + steps
        copies = weights + kept.optimizer
        assert copies <= kept.undo <= copies + 200  # and the return statistics
        assert kept.total == kept.parameters + kept.optimizer + kept.undo

    def test_gradients_and_data_are_parts_of_the_peak(self):
        cfg = config(BATCHES)
        tracer, networks = UpdateTracer(cfg, FACTS), dict(build_networks(cfg, FACTS).items())
        for update in NETWORKS:
            taken = tracer.transient(update)
            assert taken.gradients == sum(p.nbytes for p in networks[update].parameters())
            assert taken.activations + taken.gradients + taken.data == taken.peak
            assert taken.activations > 0
        a = cfg.algorithm
        step = 4 * (2 * FACTS.observation_dim + FACTS.action_dim + 1) + 2
        # As the loss reads it, with the mask of valid steps.
        assert tracer.transient("model").data >= a.model_batch * a.horizon * (step + 1)
        assert tracer.transient("model").data < a.model_batch * a.horizon * (step + 32)
        assert tracer.transient("actor").data == a.actor_batch * 4 * FACTS.observation_dim
        rollout = a.actor_batch * a.horizon * 4 * cfg.size.latent_dim
        assert rollout < tracer.transient("critic").data < 4 * rollout

    def test_activations_are_never_negative(self):
        assert Transient(phases=(10, 20), gradients=15, data=15).activations == 0

    def test_extrapolates_each_phase(self):
        long = Transient((10, 20), 7, 3).extended(Transient((20, 21), 7, 4), 10)
        assert long == Transient((110, 30), 7, 13)
        assert long.peak == 110


@pytest.mark.parametrize(
    "changes",
    [
        {"model.reward_head": "two_hot"},
        {"model.termination_head": True},
        {"model.termination_head": False},
        {"algorithm.normalize_observations": True},
        {"algorithm.normalize_returns": False},
        {"algorithm.detach": False},
        {"model.loss.flow_matching_weight": 1.0, "model.loss.flow_matching_source": "attached"},
        {"model.loss.self_consistency_weight": 1.0, "model.dynamics.condition_on_step_size": True},
        {"model.dynamics.parameterization": "tangent", "model.dynamics.time_features": 2},
        {"model.dynamics.parameterization": "simnorm_velocity", "model.loss.form": "tdmpc2"},
        {"model.reward_head": "two_hot", "model.termination_head": True, "algorithm.normalize_observations": True},
    ],
    ids=lambda changes: "+".join(f"{key.rsplit('.')[-1]}={value}" for key, value in changes.items()),
)
def test_every_kind_of_model_can_be_traced(changes):
    tracer = UpdateTracer(config({"algorithm.horizon": 2, **changes}), FACTS)
    assert tracer.persistent.total > 0
    assert all(tracer.transient(update, 2).peak > 0 for update in NETWORKS)


def test_a_compiled_loss_is_traced_as_the_eager_one():
    cfg = config({"algorithm.horizon": 2})
    compiled = copy.deepcopy(cfg)
    compiled.algorithm.compile = True
    assert UpdateTracer(compiled, FACTS).transient("actor") == UpdateTracer(cfg, FACTS).transient("actor")
    assert compiled.algorithm.compile


def test_traces_are_cached_in_the_process(monkeypatch):
    cfg = config({"algorithm.horizon": 2, "algorithm.model_batch": 11})
    first = UpdateTracer(cfg, FACTS)
    known = first.persistent, first.transient("model"), first.transient("actor", 2)
    other = replace(FACTS, observation_dim=FACTS.observation_dim + 1)

    def refuse(*args):
        raise AssertionError("traced once more")

    monkeypatch.setattr(updates, "_Updates", refuse)
    again = UpdateTracer(copy.deepcopy(cfg), replace(FACTS))
    assert (again.persistent, again.transient("model"), again.transient("actor", 2)) == known
    with pytest.raises(AssertionError, match="once more"):
        UpdateTracer(cfg, other).transient("model")
