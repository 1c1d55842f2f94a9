"""``checkpoint_substeps``: the same gradients to the bit, and stored activations that do not depend on K."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from objective_cases import A, B, D, H, Networks, gradients, no_gradients, slice_data, world_model
from training_cases import Bench, assert_equal, config

from benchmarks.activation_memory import saved_bytes, tensors_of
from pwm_torchrl.modules import make_dynamics
from pwm_torchrl.objectives import PWMModelLoss

SYSTEMS = {"v1": ("heun", 2), "v2": ("heun", 4), "v3": ("euler", 8)}
PARAMETERIZATIONS = ("residual_endpoint", "tangent", "simnorm_velocity")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits depend on how a sum is split among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flow(system: str, parameterization: str, checkpoint: bool) -> dict[str, object]:
    solver, substeps = SYSTEMS[system]
    return {
        "kind": "flow",
        "parameterization": parameterization,
        "solver": solver,
        "substeps": substeps,
        "checkpoint_substeps": checkpoint,
    }


def evaluations(model: torch.nn.Module) -> list[int]:
    """A list that grows by one with every evaluation of the dynamics' network."""
    calls: list[int] = []
    model.dynamics.net.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def assert_same_bits(results: list[list[torch.Tensor | None]]) -> None:
    plain, checkpointed = results
    assert any(x is not None and x.abs().max() > 0 for x in plain[1:]), "a gradient of zeros shows nothing"
    for x, y in zip(plain, checkpointed, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("tasks", [False, True], ids=["single-task", "multi-task"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("system", SYSTEMS)
class TestBothLosses:
    """Multi-task models mask their padding actions, in both losses."""

    def test_world_model_loss(self, system: str, parameterization: str, dtype: torch.dtype, tasks: bool) -> None:
        data, results, counts = slice_data(tasks=tasks, dtype=dtype), [], []
        data["next", "done"][1, 2] = True
        options = {"reward_head": "two_hot", "termination": True}
        for checkpoint in (False, True):
            model = world_model(tasks, dtype, dynamics=flow(system, parameterization, checkpoint), **options)
            calls = evaluations(model)
            torch.manual_seed(1)  # of the flow-matching term
            loss = sum(PWMModelLoss(model, flow_matching_weight=0.5, flow_matching_source="attached")(data).values())
            results.append([loss, *gradients(loss, model)])
            counts.append(len(calls))
        assert_same_bits(results)
        assert counts[1] == counts[0] + H * model.dynamics.evaluations, "every transition is computed again"

    def test_actor_loss(self, system: str, parameterization: str, dtype: torch.dtype, tasks: bool) -> None:
        for detach in (True, False):
            results, counts = [], []
            for checkpoint in (False, True):
                n = Networks(tasks, dtype, dynamics=flow(system, parameterization, checkpoint))
                calls = evaluations(n.model)
                torch.manual_seed(1)
                loss = n.loss(detach=detach)(n.start())["loss_actor"]
                results.append([loss, *gradients(loss, n.actor)])
                counts.append(len(calls))
                assert no_gradients(n.model, n.critics)
            assert_same_bits(results)
            assert counts[1] == counts[0] + H * n.model.dynamics.evaluations


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_is_the_same_to_the_bit(system: str) -> None:
    """Two epochs of world-model, policy and critic updates."""
    solver, substeps = SYSTEMS[system]
    weights = []
    for checkpoint in (False, True):
        dynamics = {"solver": solver, "substeps": substeps, "checkpoint_substeps": checkpoint}
        bench = Bench(config({f"model.dynamics.{key}": value for key, value in dynamics.items()}))
        before = bench.snapshots()
        torch.manual_seed(3)
        for _ in range(2):
            bench.step()
        assert all(any(moved) for moved in bench.changed(before).values())
        named = [(name, network.state_dict()) for name, network in bench.networks.items()]
        weights.append({f"{name}.{key}": value for name, state in named for key, value in state.items()})
    assert_equal(*weights)


def test_the_inputs_of_a_checkpointed_transition_are_guarded() -> None:
    """As everywhere in autograd, changing in place what the backward pass needs is an error, not a wrong gradient."""
    dynamics = make_dynamics("flow", D, A, 0, [12], checkpoint_substeps=True)
    latent = torch.rand(B, D)
    out = dynamics(latent, torch.rand(B, A)).sum()
    latent.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class TestStoredActivations:
    """Bytes of the distinct storages that autograd saves, parameters and batch left out."""

    def dynamics(self, checkpoint: bool, solver: str, substeps: int, parameterization: str) -> int:
        d = make_dynamics(
            "flow", D, A, 0, [12, 12], parameterization=parameterization, solver=solver, substeps=substeps,
            checkpoint_substeps=checkpoint,
        )  # fmt: skip
        start, actions = torch.rand(B, D), torch.rand(H, B, A)

        def roll_out() -> torch.Tensor:
            z = start
            for action in actions:
                z = d(z, action)
            return z

        return saved_bytes(roll_out, [*tensors_of(d), start, actions])

    @pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
    @pytest.mark.parametrize("solver", ["euler", "heun"])
    def test_of_the_dynamics(self, solver: str, parameterization: str) -> None:
        plain = [self.dynamics(False, solver, k, parameterization) for k in (2, 4, 8)]
        stored = [self.dynamics(True, solver, k, parameterization) for k in (2, 4, 8)]
        # The latents between the transitions; the first is given and the last is a result.
        assert stored == [(H - 1) * B * D * 4] * 3
        assert plain[0] < plain[1] < plain[2]
        # Heun of the end-point flow takes 2K - 1 evaluations, all others a multiple of K.
        assert plain[2] > 3.5 * plain[0] > 3.5 * 3 * stored[0]

    @pytest.mark.parametrize("tasks", [False, True], ids=["single-task", "multi-task"])
    @pytest.mark.parametrize("loss", ["model", "actor"])
    def test_of_the_losses(self, loss: str, tasks: bool) -> None:
        def stored(system: str, checkpoint: bool) -> int:
            n = Networks(tasks, dynamics=flow(system, "residual_endpoint", checkpoint))
            data = slice_data(tasks=tasks) if loss == "model" else n.start()
            given = [*data.values(True, True)]
            for module in (n.model, n.actor, n.critics):
                given += tensors_of(module)
            objective = PWMModelLoss(n.model) if loss == "model" else n.loss(detach=False)
            return saved_bytes(lambda: objective(data), given)

        plain = [stored(system, False) for system in SYSTEMS]
        checkpointed = [stored(system, True) for system in SYSTEMS]
        assert len(set(checkpointed)) == 1
        assert checkpointed[0] < plain[0] < plain[1] < plain[2]

    def test_the_count_is_of_storages(self) -> None:
        """Views of one tensor count once and whole, given tensors not at all."""
        w, x = torch.rand(4, 4, requires_grad=True), torch.rand(3, 4)
        assert saved_bytes(lambda: (x @ w).exp(), [w, x]) == 3 * 4 * 4, "exp keeps its result"
        assert saved_bytes(lambda: (x @ w).exp()) == 3 * 4 * 4 * 2, "and the product its input; its gradient needs no w"

        def twice() -> list[torch.Tensor]:
            y = w.exp()
            return [y[:1] * y[1:2], y[2:3] * y[3:]]

        assert saved_bytes(twice, [w]) == 4 * 4 * 4
