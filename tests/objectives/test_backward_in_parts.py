"""``backward`` of the three losses: a batch in parts has the gradients, losses and random numbers of the whole."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from objective_cases import FLOW, A, B, D, H, Networks, no_gradients, randomized, slice_data, world_model
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import CriticEnsemble, value_module, world_model_module
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.objectives.actor_loss import Accumulated
from pwm_torchrl.objectives.base import backward_in_parts, micro_batches

SIZES = [1, 3, None]
TIGHT = {"rtol": 0.0, "atol": 1e-12}
SHORTCUT = {**FLOW, "condition_on_step_size": True}


def after(call: Callable[[], object], *trained: nn.Module) -> tuple[list[Tensor | None], object, Tensor]:
    """Gradients that a call with fixed random numbers adds, what it returns, and the generator's state afterwards."""
    for module in trained:
        module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    out = call()
    gradients = [None if p.grad is None else p.grad.clone() for module in trained for p in module.parameters()]
    return gradients, out, torch.get_rng_state()


def assert_same(whole: list[Tensor | None], parts: list[Tensor | None]) -> None:
    assert max(g.abs().max() for g in whole if g is not None) > 1e-4, "gradients of zero show nothing"
    for x, y in zip(whole, parts, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y, x, **TIGHT)


def end_some_rollouts(networks: Networks, imagine: Callable[[], object]) -> None:
    """Move the termination head's threshold between the probabilities that it gives."""
    head, logits = networks.model.termination, []
    handle = head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    imagine()
    handle.remove()
    head.threshold = torch.cat(logits).sigmoid().quantile(0.8).item()


@pytest.mark.parametrize("size", SIZES)
class TestModelLoss:
    @pytest.mark.parametrize("tasks", [False, True], ids=["single-task", "multi-task"])
    @pytest.mark.parametrize(
        ("model", "options"),
        [
            ({}, {}),
            ({"reward_head": "two_hot"}, {"form": "tdmpc2"}),
            ({"dynamics": {"kind": "residual"}, "termination": True}, {"termination_coef": 0.7}),
            ({"dynamics": FLOW}, {"flow_matching_weight": 0.5, "flow_matching_source": "attached"}),
            ({"dynamics": {**FLOW, "checkpoint_substeps": True}}, {"flow_matching_weight": 0.5}),
            (
                {"dynamics": SHORTCUT, "termination": True, "reward_head": "two_hot"},
                {"flow_matching_weight": 0.5, "flow_matching_source": "detached", "self_consistency_weight": 0.3},
            ),
        ],
        ids=["mlp", "two-hot", "termination", "flow-matching", "checkpointed", "everything"],
    )
    def test_sums_to_forward(self, model: dict, options: dict, tasks: bool, size: int | None) -> None:
        """Of slices that end or are padded at different steps, so that the parts' numbers of valid steps differ."""
        data = slice_data(tasks=tasks, dtype=torch.float64)
        data["next", "done"] = torch.rand(B, H, 1) < 0.3
        data["next", "terminated"] = data["next", "done"] & (torch.rand(B, H, 1) < 0.5)
        mask = torch.ones(B, H, dtype=torch.bool)
        mask[0, 1:] = mask[3] = False
        data["collector", "mask"] = mask
        network = world_model(tasks, torch.float64, **model)
        loss = PWMModelLoss(network, gamma=0.9, **options)
        assert len(set(loss.read(data).valid.sum(0).flatten().tolist())) > 2

        def whole() -> TensorDict:
            losses = loss(data)
            sum(losses.values()).backward()
            return losses

        expected, losses, generator = after(whole, network)
        found, parts, same_generator = after(lambda: loss.backward(loss.read(data), size), network)
        assert_same(expected, found)
        assert torch.equal(generator, same_generator)
        assert set(parts) == set(losses.keys()) == set(loss.out_keys)
        for key, value in parts.items():
            assert not value.requires_grad
            torch.testing.assert_close(value, losses[key].detach(), **TIGHT)


@pytest.mark.parametrize("size", SIZES)
class TestActorLoss:
    @pytest.mark.parametrize("tasks", [False, True], ids=["single-task", "multi-task"])
    @pytest.mark.parametrize("normalize", [False, True], ids=["by-horizon", "by-std"])
    @pytest.mark.parametrize(
        ("model", "options"),
        [
            ({}, {}),
            ({}, {"deterministic": True}),
            ({"reward_head": "two_hot", "dynamics": FLOW}, {"detach": False}),
            ({"termination": True}, {}),
        ],
        ids=["mlp", "deterministic", "attached", "ended"],
    )
    def test_equals_rollout_and_loss(
        self, model: dict, options: dict, normalize: bool, tasks: bool, size: int | None
    ) -> None:
        networks = Networks(tasks, torch.float64, **model)
        loss = networks.loss(normalize_returns=normalize, gamma=0.9, **options).double()
        start = networks.start()
        if networks.model.termination is not None:
            end_some_rollouts(networks, lambda: loss(start))
        # Statistics that have seen a batch; both runs go on from the same.
        loss.return_statistics.update(torch.randn(9, 1, dtype=torch.float64))
        before = deepcopy(loss.return_statistics.state_dict())

        def whole() -> tuple[TensorDict, TensorDict]:
            losses, rollout = loss.rollout_and_loss(start)
            losses["loss_actor"].backward()
            return losses, rollout

        expected, (losses, rollout), generator = after(whole, networks.actor)
        statistics = deepcopy(loss.return_statistics.state_dict())
        loss.return_statistics.load_state_dict(before)
        found, (same_losses, same_rollout), same_generator = after(lambda: loss.backward(start, size), networks.actor)
        assert_same(expected, found)
        assert no_gradients(networks.model, networks.critics)
        assert torch.equal(generator, same_generator)
        assert loss.return_statistics.count == before["count"] + (B if normalize else 0), "updated once, with all of it"
        for key, value in loss.return_statistics.state_dict().items():
            torch.testing.assert_close(value, statistics[key], **TIGHT)
        for ours, theirs in ((same_losses, losses), (same_rollout, rollout)):
            assert not any(value.requires_grad for value in ours.values(True, True))
            assert ours.batch_size == theirs.batch_size
            assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
            for key, value in ours.items(True, True):
                torch.testing.assert_close(value, theirs[key].detach(), **TIGHT)
        if networks.model.termination is not None:
            lengths = same_rollout["collector", "mask"].sum(1).flatten().tolist()
            assert min(lengths) < H == max(lengths), "some rollouts end early"

    def test_adds_to_gradients_that_are_there(self, size: int | None) -> None:
        networks = Networks(dtype=torch.float64)
        loss, start = networks.loss(), networks.start()
        once, _, _ = after(lambda: loss.backward(start, size), networks.actor)
        torch.manual_seed(7)
        loss.backward(start, size)
        assert_same([2 * g for g in once], [p.grad for p in networks.actor.parameters()])

    def test_parameters_that_share_a_gradient(self, size: int | None) -> None:
        """Autograd gives both summands' parameters one tensor; accumulating in place would count it twice."""

        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = (nn.Parameter(torch.full((A,), x, dtype=torch.float64)) for x in (0.1, 0.2))

            def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
                loc = (self.a + self.b).expand(*latent.shape[:-1], A)
                return loc, torch.full_like(loc, 0.3)

        networks, actor = Networks(dtype=torch.float64), Sum()
        module = TensorDictModule(actor, in_keys=["latent"], out_keys=["loc", "scale"])
        loss = PWMActorLoss(module, world_model_module(networks.model), value_module(networks.critics), horizon=H)
        start = networks.start()
        expected, _, _ = after(lambda: loss.rollout_and_loss(start)[0]["loss_actor"].backward(), actor)
        found, _, _ = after(lambda: loss.backward(start, size), actor)
        assert_same(expected, found)


@pytest.mark.parametrize("size", SIZES)
class TestValueLoss:
    @pytest.mark.parametrize("masked", [None, 0.4, 1.0], ids=["no mask", "some ended", "all ended"])
    def test_sums_to_forward(self, masked: float | None, size: int | None) -> None:
        critics = randomized(CriticEnsemble(D, [10]).double())
        data = TensorDict(
            latent=torch.rand(B, D, dtype=torch.float64),
            value_target=torch.randn(B, 1, dtype=torch.float64),
            batch_size=[B],
        )
        if masked is not None:
            data["collector", "mask"] = mask = torch.rand(B, 1) >= masked
            assert mask.any() == (masked < 1)
            assert not mask.all()
        loss = PWMValueLoss(critics)

        def whole() -> TensorDict:
            losses = loss(data)
            losses["loss_value"].backward()
            return losses

        expected, losses, generator = after(whole, critics)
        found, parts, same_generator = after(lambda: loss.backward(data, size), critics)
        assert torch.equal(generator, same_generator)
        assert set(parts) == set(loss.out_keys)
        for key, value in parts.items():
            assert not value.requires_grad
            torch.testing.assert_close(value, losses[key].detach(), **TIGHT)
        if masked == 1.0:
            assert all((g == 0).all() for g in expected + found)
        else:
            assert_same(expected, found)


class TestShares:
    """What several processes compute of one batch adds up to what one does; a share may be empty."""

    SHARES = (slice(0, 3), slice(3, 3), slice(3, B))

    def test_model_loss(self) -> None:
        data = slice_data(dtype=torch.float64)
        data["next", "done"] = torch.rand(B, H, 1) < 0.3
        network = world_model(False, torch.float64, dynamics=FLOW)
        loss = PWMModelLoss(network, flow_matching_weight=0.5)
        slices = loss.read(data)

        def shares() -> list[dict[str, Tensor]]:
            noise, counts = loss.draw_noise(slices), slices.valid_counts()
            return [
                loss.backward(slices.rows(rows), 2, noise=noise.rows(rows), valid_counts=counts) for rows in self.SHARES
            ]

        expected, whole, generator = after(lambda: loss.backward(slices), network)
        found, parts, same_generator = after(shares, network)
        assert_same(expected, found)
        assert torch.equal(generator, same_generator)
        for key, value in whole.items():
            torch.testing.assert_close(sum(part[key] for part in parts), value, **TIGHT)
            assert parts[1][key] == 0

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_actor_loss(self, deterministic: bool) -> None:
        """What is accumulated of the shares, put together, ends as the batch does."""
        networks = Networks(dtype=torch.float64)
        loss = networks.loss(normalize_returns=True, deterministic=deterministic).double()
        start = networks.start()
        before = deepcopy(loss.return_statistics.state_dict())

        def shares() -> tuple[TensorDict, TensorDict]:
            loss.return_statistics.load_state_dict(before)
            noise = loss.draw_noise(start["latent"])
            parts = [
                loss.accumulate(start[rows], 2, None if noise is None else noise[:, rows], B) for rows in self.SHARES
            ]
            assert len(parts[1].returns) == len(parts[1].rollouts) == 0
            assert loss.return_statistics.count == before["count"]
            each = zip(*(part.gradients for part in parts), strict=True)
            gradients = [None if shares[0] is None else sum(shares) for shares in each]
            returns = torch.cat([part.returns for part in parts])
            return loss.finish(Accumulated(gradients, returns, torch.cat([part.rollouts for part in parts])))

        expected, whole, generator = after(lambda: loss.backward(start), networks.actor)
        found, joined, same_generator = after(shares, networks.actor)
        assert_same(expected, found)
        assert torch.equal(generator, same_generator)
        for ours, theirs in zip(joined, whole, strict=True):
            for key, value in ours.items(True, True):
                torch.testing.assert_close(value, theirs[key], **TIGHT)

    def test_value_loss(self) -> None:
        critics = randomized(CriticEnsemble(D, [10]).double())
        latent, target = torch.rand(B, D, dtype=torch.float64), torch.randn(B, 1, dtype=torch.float64)
        data = TensorDict(latent=latent, value_target=target, batch_size=[B])
        data["collector", "mask"] = torch.rand(B, 1) >= 0.4
        loss = PWMValueLoss(critics)

        def shares() -> list[dict[str, Tensor]]:
            return [loss.backward(data[rows], 2, whole=(B, loss.counted(data))) for rows in self.SHARES]

        expected, whole, _ = after(lambda: loss.backward(data), critics)
        found, parts, _ = after(shares, critics)
        assert_same(expected, found)
        for key, value in whole.items():
            torch.testing.assert_close(sum(part[key] for part in parts), value, **TIGHT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["model", "actor", "value"])
class TestReductions:
    @staticmethod
    def make(kind: str, reduction: str) -> tuple[PWMModelLoss | PWMActorLoss | PWMValueLoss, TensorDict, nn.Module]:
        networks = Networks(dtype=torch.float64)
        if kind == "actor":
            return networks.loss(reduction=reduction, normalize_returns=True).double(), networks.start(), networks.actor
        if kind == "model":
            data = slice_data(dtype=torch.float64)
            data["next", "done"][2, 1] = True
            return PWMModelLoss(networks.model, reduction=reduction), data, networks.model
        states = networks.start()
        states["value_target"] = torch.randn(B, 1, dtype=torch.float64)
        return PWMValueLoss(networks.critics, reduction=reduction), states, networks.critics

    def test_a_sum_has_the_sums_gradients(self, kind: str, size: int | None) -> None:
        (loss, data, network), (other, _, same) = self.make(kind, "sum"), self.make(kind, "sum")

        def whole() -> TensorDict:
            losses = loss(data)
            sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
            return losses

        expected, losses, _ = after(whole, network)
        read = other.read(data) if kind == "model" else data
        found, parts, _ = after(lambda: other.backward(read, size), same)
        assert_same(expected, found)
        parts = parts[0] if kind == "actor" else parts
        for key in losses.keys():
            torch.testing.assert_close(parts[key], losses[key].detach(), **TIGHT)

    def test_none_is_refused(self, kind: str, size: int | None) -> None:
        loss, data, network = self.make(kind, "none")
        with pytest.raises(ConfigurationError, match="reduction='none' leaves no scalar"):
            loss.backward(loss.read(data) if kind == "model" else data, size)
        assert no_gradients(network)


class TestSplitting:
    @pytest.mark.parametrize(
        ("count", "size", "expected"),
        [
            (5, None, [(0, 5)]),
            (5, 9, [(0, 5)]),
            (5, 2, [(0, 2), (2, 4), (4, 5)]),
            (3, 1, [(0, 1), (1, 2), (2, 3)]),
            (0, 4, [(0, 0)]),
        ],
    )
    def test_rows(self, count: int, size: int | None, expected: list[tuple[int, int]]) -> None:
        assert [(rows.start, rows.stop) for rows in micro_batches(count, size)] == expected

    @pytest.mark.parametrize("size", [0, -3])
    def test_refuses_less_than_one_row(self, size: int) -> None:
        with pytest.raises(ValueError, match=f"A micro-batch of {size} rows is too small"):
            list(micro_batches(4, size))

    def test_one_part_lives_at_a_time(self) -> None:
        """Or splitting would not save what it is for."""
        weight = torch.ones(3, requires_grad=True)
        alive: list[int] = []
        most = 0

        class Count(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                nonlocal most
                alive.append(1)
                most = max(most, len(alive))
                ctx.token = Token()
                return x.clone()

            @staticmethod
            def backward(ctx: object, gradient: Tensor) -> Tensor:
                return gradient

        class Token:
            def __del__(self) -> None:
                alive.pop()

        backward_in_parts(6, 2, lambda rows: {"a": Count.apply(weight).sum() * (rows.stop - rows.start)})
        assert (most, len(alive)) == (1, 0)
        assert weight.grad.tolist() == [6.0] * 3
