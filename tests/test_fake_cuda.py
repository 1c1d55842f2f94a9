"""Updates, imagination, replay and policy on CUDA tensors without a GPU: right devices, no hidden waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_cases import CPU, CUDA, ELSEWHERE, FakeCuda, SizeUnknown, devices_of, faked, like, machine_with_gpu
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from training_cases import config, trajectories

from pwm_torchrl.algorithm.base import Algorithm, MetricRow, find_algorithm
from pwm_torchrl.algorithm.build import Facts, Losses, Networks, build_optimizers, world_model_spec
from pwm_torchrl.algorithm.updates import LocalExecutor, Updates
from pwm_torchrl.config import Config, DynamicsConfig
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.envs.imagination import LatentImaginationEnv
from pwm_torchrl.modules import WorldModelFacts, announce_world_model, policy_module

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")

ALGORITHMS = {
    "pwm": {"algorithm.slice_steps": 4, "algorithm.scale_rewards": True, "algorithm.state_std": True},
    "pwm_paper": {"algorithm.normalize_returns": True, "algorithm.entropy_weight": 1e-3},
}
DYNAMICS = {
    "mlp": DynamicsConfig(kind="mlp"),
    "flow_v2": DynamicsConfig(kind="flow", solver="heun", substeps=4),
}
TASKS = ("short", "wide")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The mode, to be entered."""
    return machine_with_gpu(monkeypatch)


class Made:
    """An algorithm whose networks, losses, optimizers and data are on a GPU that is not there.

    Args:
        fake (FakeCuda): the mode.
        cfg (Config): the run's configuration.
        facts (Facts): of its environment.
        storage (str): of the replay. Defaults to ``"device"``.
    """

    def __init__(self, fake: FakeCuda, cfg: Config, facts: Facts, storage: str = "device") -> None:
        algorithm = find_algorithm(cfg.algorithm.name)
        self.fake = fake
        self.networks = algorithm.build_networks(cfg, facts)
        data = trajectories(observation_dim=facts.observation_dim, action_dim=facts.action_dim)
        self.reduced: list[tuple[str, int, int]] = []
        with fake:
            for name, network in self.networks.items():
                setattr(self.networks, name, faked(network))
            self.losses = algorithm.build_losses(cfg, facts, self.networks)
            self.optimizers = build_optimizers(cfg, self.networks)
            self.data = like(data, CPU)
            self.samples = Samples(1000, 2, cfg.algorithm.slice_length, storage, device=CUDA)
            self.samples.labelled = bool(facts.action_dims)
            self.samples.extend(self.data)
            updates = Updates(LocalExecutor(self.losses, self.optimizers), cfg.memory, self.reduction)
            self.algorithm: Algorithm = algorithm(
                cfg.algorithm, self.networks, self.losses, self.optimizers, self.samples, updates, first_model_updates=1
            )

    def reduction(self, update: str, refused: int, size: int, message: str) -> None:
        self.reduced.append((update, refused, size))

    def epoch(self) -> MetricRow:
        """The updates of an epoch, of which alone something is recorded."""
        with self.fake:
            self.fake.begin()
            return self.algorithm.epoch(self.data, 0.0)


class Samples(TrajectoryReplay):
    """A replay whose slices say, where there are several tasks, that they are of the first."""

    labelled = False

    def sample_slices(self, count: int) -> TensorDictBase:
        slices = super().sample_slices(count)
        if self.labelled:
            slices["task"] = torch.zeros(slices.batch_size, dtype=torch.int64, device=CUDA)
        return slices


def small(algorithm: str, dynamics: str, **changes: Any) -> Config:
    """A run of a few updates of every kind."""
    own = {
        "algorithm.name": algorithm,
        "algorithm.horizon": 2,
        "algorithm.max_updates": 1,
        "algorithm.model_updates": 1,
        "algorithm.critic_passes": 1,
        "algorithm.critic_batch": 8,
        "algorithm.normalize_observations": True,
        "model.loss.one_step_weight": 1.0,
        "model.dynamics": DYNAMICS[dynamics],
        **ALGORITHMS[algorithm],
    }
    return config({**own, **{key.replace("__", "."): value for key, value in changes.items()}})


def check_on_gpu(made: Made) -> None:
    """Whatever lives longer than an update is on the GPU."""
    for _, network in made.networks.items():
        assert devices_of(network) == {"cuda"}
    for name, optimizer in made.optimizers.items():
        state = list(optimizer.optimizer.state.values())
        assert len(state) == len(optimizer.parameters)
        assert devices_of(state) == {"cuda"}, name


def tensors_of(row: MetricRow) -> dict[str, Any]:
    """The row's tensors, which are to be on the GPU until its numbers are asked for."""
    sums = row.state_dict()["sums"]
    return {key: value for key, value in sums.items() if isinstance(value, Tensor)}


class TestEpoch:
    @pytest.mark.parametrize("storage", ["device", "memory"])
    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_does_not_wait(self, algorithm: str, dynamics: str, storage: str, fake_cuda: FakeCuda) -> None:
        made = Made(fake_cuda, small(algorithm, dynamics), Facts(3, 1, True), storage)
        row = made.epoch()
        assert fake_cuda.waits == []
        check_on_gpu(made)
        metrics = tensors_of(row)
        assert {"loss/model", "loss/actor", "loss/critic", "grad_norm/model", "grad_norm/actor"} <= metrics.keys()
        assert devices_of(metrics) == {"cuda"}

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_micro_batches(self, algorithm: str, fake_cuda: FakeCuda) -> None:
        sizes = {f"memory__{name}_micro_batch": 3 for name in ("model", "actor", "critic")}
        row = Made(fake_cuda, small(algorithm, "mlp", **sizes), Facts(3, 1, True)).epoch()
        assert fake_cuda.waits == []
        assert row.state_dict()["sums"]["memory/actor_micro_batch"] == 3

    @pytest.mark.parametrize("starts", ["replay", "current"])
    def test_start_observations(self, starts: str, fake_cuda: FakeCuda) -> None:
        made = Made(fake_cuda, small("pwm", "mlp", algorithm__actor_starts=starts), Facts(3, 1, True))
        made.epoch()
        assert fake_cuda.waits == []

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_metrics_leave_the_gpu_at_once(self, algorithm: str, fake_cuda: FakeCuda) -> None:
        row = Made(fake_cuda, small(algorithm, "mlp"), Facts(3, 1, True)).epoch()
        with fake_cuda:
            fake_cuda.begin()
            numbers = row.numbers()
            assert len(fake_cuda.waits) == 1, fake_cuda.waits
        assert len(numbers) > 10
        assert all(type(value) in (int, float) for value in numbers.values())

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_optimizers_take_one_kernel_for_all_parameters(self, algorithm: str, fake_cuda: FakeCuda) -> None:
        made = Made(fake_cuda, small(algorithm, "mlp"), Facts(3, 1, True))
        made.epoch()
        updates = made.algorithm.updates.made
        assert fake_cuda.operations["_fused_adam_.default"] == updates
        assert fake_cuda.operations["_foreach_norm.Scalar"] == updates
        assert fake_cuda.operations["_foreach_mul_.Tensor"] == updates  # clipping

    def test_an_update_that_ran_out_of_memory_is_repeated(
        self, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = Made(fake_cuda, small("pwm", "mlp", memory__actor_micro_batch=5), Facts(3, 1, True))
        made.epoch()
        backward, refusals = made.losses.actor.backward, [torch.OutOfMemoryError("CUDA out of memory.")]

        def refusing(*args: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return backward(*args)

        monkeypatch.setattr(made.losses.actor, "backward", refusing)
        made.epoch()
        check_on_gpu(made)
        assert made.reduced == [("actor", 5, 3)]


class TestSeveralTasks:
    facts = Facts(3, 2, True, action_dims=(1, 2))

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_pretraining_does_not_wait(self, algorithm: str, dynamics: str, fake_cuda: FakeCuda) -> None:
        cfg = small(algorithm, dynamics, mode="pretrain", model__reward_head="two_hot", algorithm__scale_rewards=False)
        made = Made(fake_cuda, cfg, self.facts)
        row = made.epoch()
        assert fake_cuda.waits == []
        check_on_gpu(made)
        assert devices_of(tensors_of(row)) == {"cuda"}

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_extraction_does_not_wait(self, algorithm: str, dynamics: str, fake_cuda: FakeCuda, tmp_path: Path) -> None:
        """All three updates in the view of one task of a model that is fine-tuned."""
        cfg = small(algorithm, dynamics, model__reward_head="two_hot", algorithm__scale_rewards=False)
        spec = world_model_spec(cfg, self.facts)
        announce_world_model(tmp_path, WorldModelFacts(spec, task_names=TASKS, observation_dims=(3, 3)))
        cfg.mode, cfg.finetune, cfg.world_model, cfg.task = "extract", True, str(tmp_path), "short"
        made = Made(fake_cuda, cfg, Facts(3, 1, True))
        row = made.epoch()
        assert fake_cuda.waits == []
        check_on_gpu(made)
        assert {"loss/model", "loss/actor", "loss/critic"} <= tensors_of(row).keys()


def networks_of(algorithm: str, dynamics: str) -> Networks:
    """Networks on the CPU, not fake."""
    return find_algorithm(algorithm).build_networks(small(algorithm, dynamics), Facts(3, 1, True))


class TestMovedLosses:
    """A loss on the CPU that is moved goes on with everything that it computes with, submodule or not."""

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_model_loss(self, algorithm: str, dynamics: str, fake_cuda: FakeCuda) -> None:
        networks = networks_of(algorithm, dynamics)
        with fake_cuda:
            loss = losses_of(algorithm, dynamics, networks).model.to(CUDA)
            fake_cuda.begin()
            assert devices_of(loss(like(trajectories()))) == {"cuda"}
            assert devices_of(networks.model) == {"cuda"}
            assert fake_cuda.waits == []

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_actor_loss(self, algorithm: str, dynamics: str, fake_cuda: FakeCuda) -> None:
        networks = networks_of(algorithm, dynamics)
        with fake_cuda:
            loss = losses_of(algorithm, dynamics, networks).actor.to(CUDA)
            fake_cuda.begin()
            start = TensorDict(latent=torch.rand(6, 16, device=CUDA), batch_size=[6])
            out = loss(start)
            out["loss_actor"].backward()
            gradients = [p.grad for p in loss.parameters() if p.grad is not None]
            assert gradients
            assert devices_of([out, gradients, loss.action_gradients(start["latent"])]) == {"cuda"}
            for _, network in networks.items():
                assert devices_of(network) == {"cuda"}
            assert fake_cuda.waits == []

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_critic_loss(self, algorithm: str, fake_cuda: FakeCuda) -> None:
        networks = networks_of(algorithm, "mlp")
        with fake_cuda:
            loss = losses_of(algorithm, "mlp", networks).critic.to(CUDA)
            fake_cuda.begin()
            states = TensorDict(
                latent=torch.rand(6, 16, device=CUDA),
                action=torch.rand(6, 1, device=CUDA),
                value_target=torch.rand(6, 1, device=CUDA),
                batch_size=[6],
            )
            assert devices_of(loss(states)) == {"cuda"}
            assert devices_of(networks.critic) == {"cuda"}
            assert fake_cuda.waits == []


def losses_of(algorithm: str, dynamics: str, networks: Networks) -> Losses:
    """Losses around networks that become fake ones on the CPU."""
    for name, network in networks.items():
        setattr(networks, name, faked(network, CPU))
    return find_algorithm(algorithm).build_losses(small(algorithm, dynamics), Facts(3, 1, True), networks)


class TestActing:
    """An action is copied to the simulator at every step anyway. TorchRL's TanhNormal waits, the package does not."""

    def test_policy_of_one_task(self, fake_cuda: FakeCuda) -> None:
        networks = networks_of("pwm", "mlp")
        with fake_cuda:
            policy = policy_module(faked(networks.model), faked(networks.actor))
            fake_cuda.begin()
            out = policy(TensorDict(observation=torch.rand(4, 3, device=CUDA), batch_size=[4]))
            assert devices_of(out) == {"cuda"}
            assert own(fake_cuda.waits) == []

    def test_policy_of_several_tasks(self, fake_cuda: FakeCuda) -> None:
        cfg = small("pwm", "mlp", model__reward_head="two_hot", algorithm__scale_rewards=False)
        networks = find_algorithm("pwm").build_networks(cfg, TestSeveralTasks.facts)
        with fake_cuda:
            policy = policy_module(faked(networks.model), faked(networks.actor), task="task")
            data = TensorDict(observation=torch.rand(4, 3, device=CUDA), batch_size=[4])
            data["task"] = torch.zeros(4, dtype=torch.int64, device=CUDA)
            fake_cuda.begin()
            assert devices_of(policy(data)) == {"cuda"}
            assert own(fake_cuda.waits) == []

    def test_actor(self, fake_cuda: FakeCuda) -> None:
        networks = networks_of("pwm", "mlp")
        with fake_cuda:
            model, actor = faked(networks.model), faked(networks.actor)
            action = actor.act(model.encode(torch.rand(4, 3, device=CUDA)), torch.randn(4, 1, device=CUDA))
            assert action.device == CUDA
            assert fake_cuda.waits == []

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    def test_imagination(self, dynamics: str, fake_cuda: FakeCuda) -> None:
        networks = networks_of("pwm", dynamics)
        with fake_cuda:
            model, actor = faked(networks.model), faked(networks.actor)
            env = LatentImaginationEnv(model, start=torch.rand(20, 16, device=CUDA), horizon=3, batch_size=[4])
            policy = policy_module(None, actor, observation="latent", latent="hidden")
            data = env.reset()
            fake_cuda.begin()
            for _ in range(2):
                data = env.step_mdp(env.step(policy(data)))
                assert devices_of(data) == {"cuda"}
            assert own(fake_cuda.waits) == []


def own(waits: list[str]) -> list[str]:
    """Those in the package's own lines."""
    return [wait for wait in waits if not wait.endswith(ELSEWHERE)]


class TestReplay:
    @pytest.mark.parametrize("storage", ["device", "memory"])
    def test_samples_arrive_without_waiting(self, storage: str, fake_cuda: FakeCuda) -> None:
        with fake_cuda:
            replay = TrajectoryReplay(1000, 2, 4, storage, device=CUDA)
            replay.extend(like(trajectories(), CPU))
            fake_cuda.begin()
            assert devices_of(replay.sample_slices(5)) == {"cuda"}
            assert devices_of(replay.sample_observations(5)) == {"cuda"}
            assert fake_cuda.waits == []


class TestRecorder:
    """What these tests rely on: each of these makes the host wait, and is recorded."""

    @pytest.mark.parametrize(
        "waiting",
        [
            lambda x: x.sum().item(),
            lambda x: float(x.sum()),
            lambda x: bool(x.sum() > 0),
            lambda x: x.cpu(),
            lambda x: x.to("cpu", non_blocking=True),
            lambda x: torch.zeros(3).to(x.device),
            lambda x: torch.tensor([1.0, 2.0], device=x.device),
            lambda x: x.copy_(torch.zeros(3)),
        ],
    )
    def test_waits(self, waiting: Callable[[Tensor], Any], fake_cuda: FakeCuda) -> None:
        with fake_cuda:
            waiting(torch.rand(3, device=CUDA))
            assert len(fake_cuda.waits) == 1

    @pytest.mark.parametrize(
        "waiting", [torch.nonzero, torch.unique, lambda x: x[x > 0], lambda x: x.masked_select(x > 0)]
    )
    def test_sizes_that_depend_on_data(self, waiting: Callable[[Tensor], Any], fake_cuda: FakeCuda) -> None:
        with fake_cuda:
            with pytest.raises(SizeUnknown):
                waiting(torch.rand(3, device=CUDA))
            assert len(fake_cuda.waits) == 1

    @pytest.mark.parametrize(
        "going_on",
        [
            lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True),
            lambda x: x.masked_fill_(x > 0, 1.0),
            lambda x: x.clamp(max=x.mean()),
            lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
            lambda x: x * torch.tensor(2.0),
            lambda x: torch.randperm(3, device=x.device),
        ],
    )
    def test_does_not_wait(self, going_on: Callable[[Tensor], Any], fake_cuda: FakeCuda) -> None:
        with fake_cuda:
            out = going_on(torch.rand(3, device=CUDA))
            assert out.device == CUDA
            assert fake_cuda.waits == []

    def test_devices_do_not_mix(self, fake_cuda: FakeCuda) -> None:
        with fake_cuda, pytest.raises(RuntimeError, match="cuda:0"):
            torch.rand(3, device=CUDA) + torch.rand(3)

    def test_gradients_and_copies_stay_there(self, fake_cuda: FakeCuda) -> None:
        real = torch.nn.Linear(3, 2)
        with fake_cuda:
            net = faked(real)
            copy.deepcopy(net)(torch.rand(4, 3, device=CUDA)).sum().backward()
            net(torch.rand(4, 3, device=CUDA)).sum().backward()
            assert devices_of([p.grad for p in net.parameters()]) == {"cuda"}
            assert fake_cuda.waits == []
