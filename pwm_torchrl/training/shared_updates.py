"""The three updates on a batch that is shared out to ranks: each back-propagates its rows, all make the same step.

The arithmetic is that of one process with the whole batch. Rank 0 samples and draws the random numbers as ever, for the
whole batch; what couples its rows (numbers of valid steps, the running variance of returns) is settled with all of it;
gradients are added up before they are divided and clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.objectives.model_loss import MASK_KEY
from pwm_torchrl.objectives.policy_updates import Accumulated
from pwm_torchrl.objectives.slices import FlowNoise
from pwm_torchrl.algorithm.build import Learner, Losses, ModelLosses, ModelNetworks
from pwm_torchrl.training.collectives import Gathering, Total
from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.algorithm.updates import Undo, is_out_of_memory
from pwm_torchrl.training.updates import UPDATE_OF

#: Network that each update trains.
NETWORKS = {update: network for network, update in UPDATE_OF.items()}
NOISE = "noise"
#: World-model updates between comparisons of the ranks, where no policy update makes one.
COMPARE_EVERY = 50
#: Whole numbers as large as the tensors' elements, to add up their bits.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedUpdates:
    """One rank's part in the updates.

    Args:
        networks (ModelNetworks): what is trained, the same on every rank.
        losses (ModelLosses): the objectives around them.
        learners (dict of Learner): their optimizers.
        undo (dict of Undo): by network.
        ranks (Ranks): the processes.
        start (callable, optional): called once, before rank 0's first update, to get the others ready. Defaults to
            ``None``.
    """

    def __init__(
        self,
        networks: ModelNetworks,
        losses: ModelLosses,
        learners: Mapping[str, Learner],
        undo: Mapping[str, Undo],
        ranks: Ranks,
        start: Callable[[SharedUpdates], None] | None = None,
    ) -> None:
        self.networks, self.losses, self.learners, self.undo = networks, losses, learners, undo
        self.ranks = ranks
        self._start = start
        self._models = 0  # world-model updates

    @property
    def with_policy(self) -> Losses:
        """The objectives of a run that has a policy."""
        assert isinstance(self.losses, Losses)
        return self.losses

    def model(self, data: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """World-model update on slices ``[B, H]``, in micro-batches of ``size`` on every rank; rank 0 only.

        Returns:
            tuple: losses of the batch, fraction of valid steps and gradient norm.
        """
        loss = self.losses.model
        slices = loss.read(data)
        noise, (per_step, overall) = loss.draw_noise(slices), slices.valid_counts()
        rows = data.select(*loss.in_keys, MASK_KEY, strict=False)
        if noise is not None:
            rows[NOISE] = TensorDict({key: x.transpose(0, 1) for key, x in noise._asdict().items()}, data.batch_size)
        common = TensorDict(per_step=per_step, overall=overall)
        statistics = self.networks.world_model.observation_statistics
        if statistics is not None:  # collecting changes them, which only rank 0 does
            common["observations"] = TensorDict(dict(statistics.named_buffers()))
        losses, norm = self._model(size, self._send("world-model", size, rows, common))
        return losses, slices.valid.float().mean(), norm

    def policy(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Policy update on rollouts from latents ``[B]``; rank 0 only.

        Returns:
            tuple: losses, rollouts ``[B, H]`` and gradient norm.
        """
        loss = self.with_policy.actor
        rows = start.select(*loss.in_keys)
        noise = loss.draw_noise(start.get(loss.tensor_keys.latent))
        if noise is not None:
            rows[NOISE] = noise.transpose(0, 1)
        return self._policy(size, self._send("policy", size, rows, TensorDict()), len(start))

    def critic(self, states: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Critic update on ``states`` ``[S]``; rank 0 only.

        Returns:
            tuple: losses and gradient norm.
        """
        common = TensorDict(counted=self.with_policy.value.counted(states))
        return self._critic(size, self._send("critic", size, states, common), len(states))

    def follow(self, command: Mapping[str, Any]) -> None:
        """Do this rank's part of the update that rank 0 commands; take it back if memory ran out on any of them."""
        update, size, count = command["update"], command["size"], command["count"]
        undo, learner = self.undo[NETWORKS[update]], self.learners[NETWORKS[update]]
        undo.note()
        for group in learner.optimizer.param_groups:
            group["lr"] = command["lr"]
        try:
            parcel = self.ranks.receive(command)
            if update == "world-model":
                self._model(size, parcel)
            elif update == "policy":
                self._policy(size, parcel, count)
            else:
                self._critic(size, parcel, count)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        undo.restore()  # out of the handler, whose traceback holds the update's tensors

    def _send(self, update: str, size: int, rows: TensorDictBase, common: TensorDictBase) -> TensorDictBase:
        if self._start is not None:
            self._start(self)
            self._start = None
        lr = self.learners[NETWORKS[update]].optimizer.param_groups[0]["lr"]
        return self.ranks.send({"update": update, "size": size, "lr": lr}, rows, common)

    def _model(self, size: int, parcel: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        learner, ranks = self.learners["world_model"], self.ranks
        with ranks.agreeing():
            rows, common = parcel["rows"].auto_batch_size_(2), parcel["common"]
            noise = rows.get(NOISE, None)
            statistics = self.networks.world_model.observation_statistics
            if statistics is not None and not ranks.leads:
                for key, buffer in statistics.named_buffers():
                    buffer.copy_(common["observations", key])
            losses = self.losses.model.backward(
                self.losses.model.read(rows),
                size,
                noise=None if noise is None else FlowNoise(*(noise[key].transpose(0, 1) for key in FlowNoise._fields)),
                valid_counts=(common["per_step"], common["overall"]),
            )
            total = Total(ranks, [*(p.grad for p in learner.parameters), *losses.values()])
        finished = self._finish("world_model", total, losses)
        self._models += 1
        if self._models % COMPARE_EVERY == 0 and not isinstance(self.losses, Losses):
            ranks.idle = False
            self._compare()
            ranks.idle = True
        return finished

    def _policy(self, size: int, parcel: TensorDictBase, count: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        loss, ranks = self.with_policy.actor, self.ranks
        with ranks.agreeing():
            rows = parcel["rows"].auto_batch_size_(1)
            noise = rows.get(NOISE, None)
            part = loss.accumulate(rows, size, None if noise is None else noise.transpose(0, 1), count)
            returns = part.returns.new_zeros(count, 1)
            returns[ranks.share(count)] = part.returns
            total = Total(ranks, [*part.gradients, returns])
            rollouts = Gathering(ranks, part.rollouts, count)
        total.exchange()
        rollouts.exchange()
        with ranks.agreeing():
            *gradients, whole = total.tensors()
            assert whole is not None
            losses, imagined = loss.finish(Accumulated(gradients, whole, rollouts.whole()))
            norm = self.learners["actor"].step(self.undo["actor"].before_step)
        self._compare()  # once an epoch, usually
        ranks.idle = True
        return losses, imagined, norm

    def _compare(self) -> None:
        """Ranks that drifted apart would train on, and each look healthy."""
        with self.ranks.agreeing():
            checked = self.checksums()
        self.ranks.compare(list(checked), torch.stack(list(checked.values())))

    def _critic(self, size: int, parcel: TensorDictBase, count: int) -> tuple[dict[str, Tensor], Tensor]:
        learner, ranks = self.learners["critics"], self.ranks
        with ranks.agreeing():
            states = parcel["rows"].auto_batch_size_(1)
            losses = self.with_policy.value.backward(states, size, whole=(count, parcel["common", "counted"]))
            total = Total(ranks, [*(p.grad for p in learner.parameters), *losses.values()])
        return self._finish("critics", total, losses)

    def _finish(self, name: str, total: Total, losses: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Add up gradients and losses, and step."""
        learner = self.learners[name]
        total.exchange()
        with self.ranks.agreeing():
            tensors = total.tensors()
            for parameter, gradient in zip(learner.parameters, tensors, strict=False):  # losses follow
                parameter.grad = gradient
            whole = {key: x for key, x in zip(losses, tensors[len(learner.parameters) :], strict=True) if x is not None}
            norm = learner.step(self.undo[name].before_step)
        self.ranks.idle = True
        return whole, norm

    @torch.no_grad()
    def checksums(self) -> dict[str, Tensor]:
        """Of each network, with its optimizer, and of the return statistics: the sum of the bits as whole numbers."""
        sums = {}
        for name, network in self.networks.items():
            if name not in self.learners:
                continue
            state = self.learners[name].optimizer.state
            moments = [x for p in self.learners[name].parameters for x in state.get(p, {}).values()]
            # Buffers are left out: those of observations are rank 0's until the next world-model update.
            sums[name] = bits([*network.parameters(), *(x for x in moments if isinstance(x, Tensor))])
        if self.losses.return_statistics is not None:
            sums["return_statistics"] = bits(list(self.losses.return_statistics.buffers()))
        return sums


def bits(tensors: list[Tensor]) -> Tensor:
    """The bits of tensors, added up as whole numbers: equal where they are equal, whatever the order."""
    device = tensors[0].device
    each = [x.contiguous().view(BITS[x.element_size()]).sum(dtype=torch.int64).to(device) for x in tensors]
    return torch.stack(each).sum()
