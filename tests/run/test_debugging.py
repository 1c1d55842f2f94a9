"""Memory stays flat: the check of live graphs, and what the loop refuses to hold. The soak: test_soak.py."""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.record.loggers.common import Logger
from training_cases import Bench, config, rows_of, run_with

from pwm_torchrl.errors import GraphLeak
from pwm_torchrl.run.debugging import GraphCheck, live_nodes, live_tensors
from pwm_torchrl.run.directory import differing_keys
from pwm_torchrl.run.loggers import RunLoggers


def graph() -> Tensor:
    """A loss of three nodes: the sum, the product and the leaf's accumulator."""
    return (2 * torch.ones(2, requires_grad=True)).sum()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Opinionated(Tensor):
    """A subclass that lets nobody look at its attributes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise TypeError("do not ask")


@pytest.fixture
def check() -> GraphCheck:
    made = GraphCheck()
    made.start()
    return made


class TestCounting:
    """Other tests' fixtures may own graphs, so everything is compared with what was there."""

    def test_distinct_nodes(self):
        before = live_nodes()
        loss = graph()
        same = [loss, loss.view(1), loss.grad_fn]
        assert live_nodes() - before == {"SumBackward0": 1, "MulBackward0": 1, "AccumulateGrad": 1, "ViewBackward0": 1}
        del loss, same
        assert live_nodes() == before

    def test_a_function_of_ones_own(self):
        before = live_nodes()
        kept = Double.apply(torch.ones(1, requires_grad=True))
        assert live_nodes() - before == {"DoubleBackward": 1, "AccumulateGrad": 1}
        del kept

    def test_a_chain_deeper_than_pythons_stack(self):
        before = live_nodes().total()
        x = torch.ones((), requires_grad=True)
        for _ in range(20_000):
            x = x + 1
        assert live_nodes().total() - before == 20_001

    def test_no_tensor_is_asked(self):
        before = live_nodes()
        kept = torch.ones(2).as_subclass(Opinionated)
        assert live_nodes() == before
        assert any(x is kept for x in live_tensors())

    def test_counting_frees_and_keeps_nothing(self):
        kept = graph()
        counts = [(len(live_tensors()), live_nodes().total()) for _ in range(3)]
        assert len(set(counts)) == 1
        kept.backward()


class TestGraphCheck:
    @pytest.mark.parametrize("hold", ["tensor", "node", "module", "tensordict"])
    def test_notices_whoever_holds_it(self, check, hold):
        kept = {
            "tensor": graph,
            "node": lambda: graph().grad_fn,
            "module": lambda: setattr(module := nn.Module(), "last_loss", graph()) or module,
            "tensordict": lambda: TensorDict({"loss": graph()}),
        }[hold]()
        with pytest.raises(GraphLeak, match=r"^epoch 1 left 3 more live autograd nodes than it found \(\d+ before"):
            check.compare("epoch 1")
        del kept
        check.compare("epoch 2")

    def test_one_sentence_names_kinds_and_holder(self, check):
        meter = {"loss/model": graph()}
        with pytest.raises(GraphLeak) as caught:
            check.compare("epoch 7")
        message = str(caught.value)
        assert "mostly 1 SumBackward0, 1 MulBackward0, 1 AccumulateGrad" in message
        assert "a tensor of shape [] made by SumBackward0 is held by the name 'loss/model'" in message
        assert "detach it" in message
        assert "\n" not in message
        del meter

    def test_follows_a_list_to_its_name(self, check):
        class Meter:
            pass

        meter = Meter()
        meter.history = [1.0, graph()]
        with pytest.raises(GraphLeak, match=r"is held by a list of 2 in (a Meter as 'history'|the name 'history');"):
            check.compare("epoch 1")

    def test_says_once_and_goes_on_from_there(self, check):
        history = [graph()]
        with pytest.raises(GraphLeak):
            check.compare("epoch 1")
        check.compare("epoch 2")
        history.append(graph())
        with pytest.raises(GraphLeak, match="left 3 more"):
            check.compare("epoch 3")

    def test_graphs_from_before_are_nobodys_fault(self):
        mine, check = graph(), GraphCheck()
        check.start()
        check.compare("epoch 1")
        mine.backward()
        check.compare("epoch 2")
        del mine
        check.compare("epoch 3")

    def test_a_waiting_generator_may_hold_one(self):
        def losses() -> Iterator[Tensor]:
            loss = graph()
            while True:
                yield loss

        source, check = losses(), GraphCheck()
        next(source)
        check.start()
        next(source)
        check.compare("epoch 1")

    def test_garbage_in_a_cycle_is_no_leak(self, check):
        gc.disable()
        try:
            cycle = [graph()]
            cycle.append(cycle)
            del cycle
            check.compare("epoch 1")
        finally:
            gc.enable()

    def test_graphs_within_an_epoch_are_its_own_business(self, check):
        for epoch in range(3):
            graph().backward()
            check.compare(f"epoch {epoch}")


class TestRun:
    """Every test's run is checked: ``config()`` switches it on."""

    @pytest.mark.parametrize("place", ["before the updates", "when it is logged"])
    @pytest.mark.parametrize("kind", ["mlp", "flow"])
    def test_a_meter_that_keeps_its_loss_ends_the_first_epoch(self, place, kind, tmp_path, monkeypatch):
        history = []

        def keep(run):
            losses = run.algorithm.losses.model(run.source.samples.sample_slices(4))
            history.append(losses["loss_reward"])

        def keep_later(run):
            log = run.loop.log
            run.loop.log = lambda numbers: (log(numbers), keep(run))

        hook = keep if place == "before the updates" else keep_later
        with pytest.raises(GraphLeak, match=r"^epoch 1 left \d+ more live autograd nodes .* held by a list of 1"):
            run_with(monkeypatch, config({"model.dynamics.kind": kind}), tmp_path, during_epoch=hook)
        assert len(history) == 1
        assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"

    def test_a_leak_in_the_updates(self, tmp_path, monkeypatch):
        """As an objective would have it that stored its last rollout."""

        def remember(run):
            if run.loop.epoch == 1:
                loss = run.algorithm.losses.actor
                imagine = loss.imagine
                loss.imagine = lambda *args: (
                    run.__dict__.setdefault("seen", []).append(found := imagine(*args)) or found
                )

        with pytest.raises(GraphLeak, match=r"^epoch 2 left"):
            run_with(monkeypatch, config(), tmp_path, after_epoch=remember)

    def test_without_the_check_nothing_is_said(self, tmp_path, monkeypatch):
        history = []
        changes = {"training.check_graphs": False, "training.epochs": 2}
        summary, run = run_with(monkeypatch, config(changes), tmp_path, after_epoch=lambda run: history.append(graph()))
        assert run.loop.graph_check is None
        assert summary["status"] == "finished"

    def test_a_run_may_be_resumed_with_or_without_it(self):
        assert differing_keys(config(), config({"training.check_graphs": False})) == {}


class TestNothingThatOutlivesAStepOwnsAGraph:
    def test_no_graph_enters_the_row_of_an_epoch(self, tmp_path, monkeypatch):
        def log(run):
            run.loop.row.set({"own/loss": graph()})

        with pytest.raises(ValueError, match="'own/loss' requires grad and would keep its autograd graph alive"):
            run_with(monkeypatch, config(), tmp_path, during_epoch=log)

    def test_loggers_get_plain_numbers(self, tmp_path, monkeypatch):
        seen = defaultdict(set)

        class Recorder(Logger):
            def __init__(self):
                super().__init__(exp_name="test", log_dir=str(tmp_path))

            def _create_experiment(self): ...
            def log_scalar(self, name, value, step=None):
                seen[name].add(type(value))

            def log_video(self, name, video, step=None, **kwargs): ...
            def log_hparams(self, cfg): ...
            def log_histogram(self, name, data, **kwargs): ...
            def __repr__(self):
                return "Recorder()"

        def attach(run):
            run.loop.record.loggers = RunLoggers([Recorder()])

        run_with(monkeypatch, config(), tmp_path, after_epoch=attach)
        assert set(rows_of(tmp_path)[-1]) <= seen.keys()
        assert set().union(*seen.values()) <= {int, float}

    def test_what_a_checkpoint_saves_owns_none(self, tmp_path, monkeypatch):
        owners, found = set(), []

        def look(run):
            for name, component in run.components.items():
                tensors = list(tensors_in(component.state_dict()))
                found.append(len(tensors))
                owners.update({name for tensor in tensors if tensor.grad_fn is not None})

        run_with(monkeypatch, config({"algorithm.normalize_rewards": True}), tmp_path, after_epoch=look)
        assert sum(found) > 200
        assert not owners

    @pytest.mark.parametrize("kind", ["mlp", "flow"])
    def test_objectives_return_a_loss_and_detached_metrics(self, kind):
        bench = Bench(config({"model.dynamics.kind": kind}))
        losses = bench.losses
        start = bench.algorithm.encode(bench.replay.sample_observations(4))
        of_actor, imagined = losses.actor.rollout_and_loss(start)
        outputs = [losses.model(bench.replay.sample_slices(4)), of_actor, losses.critic(imagined.flatten())]
        assert not any(value.requires_grad for value in imagined.values(True, True)), "critics learn from the rollout"
        for output in outputs:
            for key, value in output.items():
                assert value.requires_grad == key.startswith("loss_"), key

    def test_replay_takes_a_batch_without_its_graph(self):
        bench = Bench(config())
        before = live_nodes()
        batch = bench.data.clone()
        batch["observation"] = batch["observation"] * torch.ones(1, requires_grad=True)
        batch["next", "reward"] = batch["next", "reward"] * torch.ones(1, requires_grad=True)
        bench.replay.extend(batch)
        del batch
        assert live_nodes() == before


def tensors_in(tree: object) -> Iterator[Tensor]:
    """Every tensor of nested containers."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, TensorDict):
        yield from tree.values(True, True)
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
