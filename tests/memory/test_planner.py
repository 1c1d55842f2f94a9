"""Plans: they fit the budget or state a sufficient one, and the fastest settings come first."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from plan_cases import FACTS, PLENTY, USABLE, automatic, budgets, plan

from pwm_torchrl.config import NETWORKS
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory import plan as plan_module
from pwm_torchrl.memory import predict as predict_module
from pwm_torchrl.memory.plan import MIN_MICRO_BATCH, PlanOptions, halvings, make_plan
from pwm_torchrl.memory.predict import DEVICE, DISK, HOST, Choices
from pwm_torchrl.memory.readings import GIB, MIB
from pwm_torchrl.memory.storage import replay_bytes

MLP = {"model.dynamics.kind": "mlp"}
#: A model whose steps need much memory.
DEEP = {
    "size.units": [256],
    "model.dynamics.substeps": 8,
    "algorithm.model_batch": 128,
    "algorithm.actor_batch": 64,
}


@pytest.fixture(autouse=True, scope="module")
def _small_base():
    """A small, constant base, so that a plan depends on the budget alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "framework_bytes", lambda: (MIB, "of a test"))
        patch.setattr(predict_module, "LIBRARY_BYTES", MIB)
        yield


def need(changes=None, device=None) -> int:
    """Bytes of the fastest plan in the place of the networks."""
    found = plan(PLENTY, device, changes)
    return found.prediction.total(found.prediction.compute)


def named(error: ConfigurationError, place: str) -> float | None:
    """The budget in GiB that an error states."""
    found = re.search(rf"{place}_gib=([0-9.e+]+)\)", str(error))
    return None if found is None else float(found[1])


class TestAnyBudget:
    @drawn(share=st.floats(0.02, 1.4), written=st.sampled_from([{}, MLP, {"memory.model_micro_batch": 100}]))
    @settings(max_examples=12)
    def test_fits_or_states_a_sufficient_budget(self, share, written):
        host = need(written) * share
        try:
            found = plan(host, changes=written)
        except ConfigurationError as error:
            least = named(error, HOST)
            assert host < least * 2**30
            enough = plan(least * 2**30, changes=written)
            assert not enough.shortages()
            # A smaller one does not fit, up to the difference between processes and the rounding.
            with pytest.raises(ConfigurationError):
                plan(least * 2**30 - (16 * MIB + 2**30 / 100 + 1), changes=written)
        else:
            assert not found.shortages()
            assert found.prediction.total(HOST) <= USABLE * host
            assert found.automatic
            assert found.larger is None or found.larger.bytes > found.prediction.total(HOST)
            assert found.cheaper is None or found.cheaper.bytes < found.prediction.total(HOST)

    @drawn(host=st.floats(0.5, 8).map(lambda x: x * GIB), share=st.floats(0.01, 1.4))
    @settings(max_examples=10)
    def test_with_a_gpu(self, host, share):
        device = need(device=PLENTY) * share
        try:
            found = plan(host, device)
        except ConfigurationError as error:
            least = {place: named(error, place) or PLENTY / 2**30 for place in (HOST, DEVICE)}
            assert not plan(least[HOST] * 2**30, least[DEVICE] * 2**30).shortages()
        else:
            assert found.prediction.total(HOST) <= USABLE * host
            assert found.prediction.total(DEVICE) <= 0.9 * device

    def test_both_shortages_are_named(self):
        with pytest.raises(ConfigurationError) as error:
            plan(MIB, MIB)
        assert named(error.value, HOST)
        assert named(error.value, DEVICE)
        assert "flow_v1 test does not fit" in str(error.value)

    def test_the_key_of_a_cluster_is_named_for_a_cluster(self):
        from_profile = {HOST: replace(budgets(MIB)[HOST], candidates=(budgets(MIB)[HOST].candidates[0],))}
        candidate = replace(from_profile[HOST].candidates[0], source="cluster=tiny")
        with pytest.raises(ConfigurationError, match=r"\(cluster\.host_gib="):
            make_plan(automatic(), FACTS, {HOST: replace(from_profile[HOST], candidates=(candidate,))})

    def test_error_suggests_a_smaller_replay(self):
        in_memory = {"training.replay_capacity": 10**8, "training.replay_storage": "memory"}
        with pytest.raises(ConfigurationError, match=r"replay_storage=disk .*replay_capacity=100000000"):
            plan(GIB, changes=in_memory)
        with pytest.raises(ConfigurationError) as error:
            plan(MIB)
        assert "replay_capacity" not in str(error.value)
        assert plan(GIB, changes={**in_memory, "training.replay_storage": "disk"}).choices.replay_storage == "disk"


class TestOrderOfPreference:
    def test_a_large_budget_gets_the_fastest_plan(self):
        found = plan()
        assert found.choices == Choices(None, None, None, False, "memory")
        assert found.larger is None

    def test_first_the_replay_goes_to_disk(self):
        """A replay that does not fit together with the largest update goes to disk; updates are not split."""
        large = {"training.replay_capacity": 10**6}
        size = replay_bytes(3, 1, 10**6, 2)
        found = plan((need(large) - size / 2) / USABLE, changes=large)
        assert found.choices == Choices(None, None, None, False, "disk")
        assert found.larger.change == "the replay in host memory"

    def test_then_updates_are_split_no_more_than_needed(self):
        full = need()
        sizes = [plan(full * share / USABLE).choices.model_micro_batch for share in (1.001, 0.99, 0.85, 0.75, 0.7)]
        assert sizes[0] is None
        assert sizes[1] == 8192
        assert sizes[1:] == sorted(sizes[1:], reverse=True)
        assert set(sizes[1:]) <= set(halvings(16384))
        found = plan(full * 0.8 / USABLE)
        twice = found.choices.with_micro_batch("model", 2 * found.choices.model_micro_batch)
        options = PlanOptions(automatic(), FACTS, HOST)
        assert options.bytes_needed(twice) > USABLE * full * 0.8 / USABLE

    def test_then_substeps_are_recomputed(self):
        found = plan((self.efficient(recompute=False) - 1) / USABLE, changes=DEEP)
        assert found.choices.checkpoint_substeps
        for update in NETWORKS:
            size = found.choices.micro_batch(update)
            assert size is None or size >= MIN_MICRO_BATCH[update]

    def test_small_micro_batches_come_last(self):
        found = plan((self.efficient(recompute=True) - 1) / USABLE, changes=DEEP)
        assert found.choices.checkpoint_substeps
        sizes = {update: found.choices.micro_batch(update) for update in NETWORKS}
        assert any(size is not None and size < MIN_MICRO_BATCH[update] for update, size in sizes.items())

    def efficient(self, recompute: bool) -> int:
        """Bytes of a plan with the smallest efficient micro-batches."""
        options = PlanOptions(automatic(DEEP), FACTS, HOST)
        choices = Choices(checkpoint_substeps=recompute, replay_storage="disk")
        for update in NETWORKS:
            choices = choices.with_micro_batch(update, min(MIN_MICRO_BATCH[update], options.batch(update)))
        return options.bytes_needed(choices)

    def test_an_mlp_is_never_recomputed(self):
        options = PlanOptions(automatic(MLP), FACTS, HOST)
        assert options.recomputes == [False]
        assert not plan(
            options.bytes_needed(options.smallest) * 1.001 / USABLE, changes=MLP
        ).choices.checkpoint_substeps


class TestReplay:
    def test_goes_to_the_gpu_if_it_fits(self):
        found = plan(PLENTY, PLENTY)
        assert found.choices.replay_storage == "device"
        assert [item.place for item in found.prediction.items if item.what == "replay"] == [DEVICE]

    def test_goes_to_host_memory_if_the_gpu_is_full(self):
        large = {"training.replay_capacity": 10**6}
        found = plan(PLENTY, (need(large, PLENTY) - MIB) / 0.9, large)
        assert found.choices == Choices(None, None, None, False, "memory")
        assert found.larger.change == "the replay on the GPU"

    def test_goes_to_disk_above_a_size(self):
        for device in (None, PLENTY):
            found = plan(PLENTY, device, {"training.replay_capacity": 3 * 10**8})
            assert found.choices.replay_storage == "disk"
            assert found.prediction.total(DISK) > 8e9
            assert found.larger is None
        higher = {"training.replay_capacity": 3 * 10**8, "memory.disk_above_gib": 100}
        assert plan(changes=higher).choices.replay_storage == "memory"

    def test_goes_to_disk_if_host_memory_is_short(self):
        large = {"training.replay_capacity": 10**7}
        assert plan((need(large) - MIB) / USABLE, changes=large).choices.replay_storage == "disk"
        assert plan(4 * GIB, 0.99 * need(large, PLENTY), large).choices.replay_storage == "memory"

    @pytest.mark.parametrize("storage", ["memory", "device", "disk"])
    def test_configured_location_is_kept(self, storage):
        for device in (None, PLENTY):
            assert plan(PLENTY, device, {"training.replay_storage": storage}).choices.replay_storage == storage


class TestConfiguredSettings:
    def test_are_kept(self):
        written = {
            "memory.model_micro_batch": 9000,
            "memory.actor_micro_batch": 7,
            "memory.critic_micro_batch": 9,
            "model.dynamics.checkpoint_substeps": True,
            "training.replay_storage": "disk",
        }
        for host in (PLENTY, need(written) * 1.01 / USABLE):
            found = plan(host, changes=written)
            assert found.choices == Choices(9000, 7, 9, True, "disk")
            assert (found.larger, found.cheaper) == (None, None)
        with pytest.raises(ConfigurationError):
            plan(need(written) * 0.99 / USABLE, changes=written)

    def test_are_kept_while_the_rest_is_planned(self):
        written = {"memory.actor_micro_batch": 8, "model.dynamics.checkpoint_substeps": False}
        found = plan(need(written) * 0.85 / USABLE, changes=written)
        assert found.choices.actor_micro_batch == 8
        assert found.choices.model_micro_batch < 16384
        assert not found.choices.checkpoint_substeps

    def test_fixed_changes_nothing_but_the_replay_location(self):
        fixed = {"memory.kind": "fixed", "memory.model_micro_batch": 512}
        for host in (PLENTY, MIB):
            found = plan(host, changes=fixed)
            assert found.choices == Choices(512, None, None, False, "memory" if host == PLENTY else "disk")
            assert not found.automatic
            assert (found.larger, found.cheaper) == (None, None)
        (shortage,) = found.shortages()
        assert all(part in shortage for part in ("host memory", "76% of 1 MiB", "a test's host"))
        assert not plan(changes=fixed).shortages()

    def test_margin_and_guard_reduce_the_usable_budget(self):
        assert plan(1e12, 1e12).usable(DEVICE) == int(0.9e12)
        found = plan(1e12, changes={"memory.margin": 0.25, "memory.stop_at": 0.5})
        assert found.usable(HOST) == int(1e12 * 0.75 * 0.5)


class TestEarlierChoices:
    GIVEN = Choices(64, None, 32, True, "disk")

    def test_are_kept_while_they_fit(self):
        assert plan(given=self.GIVEN).choices == self.GIVEN
        assert plan(given=self.GIVEN).larger.bytes > plan(given=self.GIVEN).prediction.total(HOST)

    def test_are_replaced_if_they_do_not_fit(self):
        whole = Choices(None, None, None, False, "memory")
        found = plan(need() * 0.9 / USABLE, given=whole)
        assert found.choices == plan(need() * 0.9 / USABLE).choices != whole

    def test_configured_settings_take_precedence(self):
        written = {
            "memory.model_micro_batch": 100,
            "model.dynamics.checkpoint_substeps": False,
            "training.replay_storage": "memory",
        }
        assert plan(changes=written, given=self.GIVEN).choices == Choices(100, None, 32, False, "memory")
        assert plan(changes={"memory.kind": "fixed"}, given=self.GIVEN).choices == Choices()

    def test_replay_moves_on_a_machine_without_gpu(self):
        on_gpu = plan(PLENTY, PLENTY).choices
        assert plan(given=on_gpu).choices == replace(on_gpu, replay_storage="memory")

    def test_a_model_without_substeps_is_not_recomputed(self):
        assert plan(changes=MLP, given=self.GIVEN).choices == replace(self.GIVEN, checkpoint_substeps=False)


class TestAlternatives:
    @pytest.mark.parametrize("share", [1.5, 0.95, 0.8, 0.65])
    def test_need_the_stated_memory(self, share):
        """A budget of the next cheaper plan's size gives a plan of at most that size."""
        found = plan(need() * share / USABLE)
        needed = found.prediction.total(HOST)
        assert found.cheaper.bytes < needed
        below = plan(found.cheaper.bytes * 1.0001 / USABLE)
        assert below.prediction.total(HOST) <= found.cheaper.bytes * 1.0001
        if found.larger is not None:
            assert found.larger.bytes > max(needed, need() * share * 0.999)  # otherwise it would have been chosen

    def test_the_smallest_plan_has_no_cheaper_one(self):
        options = PlanOptions(automatic(), FACTS, HOST)
        found = plan(given=options.smallest)
        assert found.choices == options.smallest
        assert found.cheaper is None
        assert found.larger is not None

    def test_a_change_that_saves_nothing_is_not_offered(self):
        """The split update is not the largest one, so doubling its micro-batch would not need more memory."""
        found = plan(given=Choices(None, None, 8, True, "memory"))
        assert "critic" not in found.larger.change
        assert found.larger.change == "substeps kept instead of recomputed"


def test_applied_changes_only_the_choices():
    cfg = automatic()
    before = copy.deepcopy(cfg)
    choices = TestEarlierChoices.GIVEN
    applied = plan(given=choices).applied(cfg)
    assert cfg == before
    memory = (applied.memory.model_micro_batch, applied.memory.actor_micro_batch)
    assert (*memory, applied.memory.critic_micro_batch) == (64, None, 32)
    assert applied.model.dynamics.checkpoint_substeps is True
    assert applied.training.replay_storage == "disk"
    applied.memory, applied.training.replay_storage = before.memory, before.training.replay_storage
    applied.model.dynamics.checkpoint_substeps = before.model.dynamics.checkpoint_substeps
    assert applied == before


def test_as_dict():
    saved = json.loads(json.dumps(plan(need() * 0.9 / USABLE).as_dict()))
    assert Choices(**saved["choices"]).model_micro_batch
    assert saved["budgets"][HOST]["source"] == "a test's host"
    assert saved["prediction"]["totals"][HOST] < saved["larger"]["bytes"]
    assert (saved["margin"], saved["stop_at"], saved["automatic"]) == (0.1, 0.85, True)
