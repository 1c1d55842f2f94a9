"""Updates on a batch that is shared out to ranks: each back-propagates its rows, all make the same step.

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

from pwm_torchrl.algorithm.build import Losses, NetworkOptimizer, Networks
from pwm_torchrl.algorithm.updates import is_out_of_memory, undo_of
from pwm_torchrl.distributed.ranks import Gathering, Ranks, Total
from pwm_torchrl.objectives.actor_loss import Accumulated
from pwm_torchrl.objectives.model_loss import MASK_KEY, FlowNoise

NOISE = "noise"
#: Model updates between comparisons of the ranks, where no actor update makes one.
COMPARE_EVERY = 50
#: Whole numbers as large as the tensors' elements, to add up their bits.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedExecutor:
    """One rank's part in the updates, an :class:`~pwm_torchrl.algorithm.updates.Executor`.

    Args:
        networks (Networks): what is trained, the same on every rank.
        losses (Losses): the objectives around them.
        optimizers (dict of NetworkOptimizer): of the networks that are trained, by their names.
        ranks (Ranks): the processes.
        start (callable, optional): called once, before rank 0's first update, to get the others ready. Defaults to
            ``None``.
    """

    def __init__(
        self,
        networks: Networks,
        losses: Losses,
        optimizers: Mapping[str, NetworkOptimizer],
        ranks: Ranks,
        start: Callable[[SharedExecutor], None] | None = None,
    ) -> None:
        self.networks, self.losses, self.optimizers = networks, losses, optimizers
        self.undo = undo_of(optimizers, losses.return_statistics)
        self.ranks = ranks
        self._start = start
        self._models = 0  # model updates

    def largest_share(self, batch: int) -> int:
        """Rows of a batch that one rank has at most."""
        return self.ranks.largest_share(batch)

    def model(self, data: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Model update on slices ``[B, H]``, in micro-batches of ``size`` on every rank; rank 0 only.

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
        statistics = self.networks.model.observation_statistics
        if statistics is not None:  # collecting changes them, which only rank 0 does
            common["observations"] = TensorDict(dict(statistics.named_buffers()))
        losses, norm = self._model(size, self._send("model", size, rows, common))
        return losses, slices.valid.float().mean(), norm

    def actor(self, start: TensorDictBase, size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Actor update on rollouts from latents ``[B]``; rank 0 only.

        Returns:
            tuple: losses, rollouts ``[B, H]`` and gradient norm.
        """
        loss = self.losses.actor
        rows = start.select(*loss.in_keys)
        noise = loss.draw_noise(start.get(loss.tensor_keys.latent))
        if noise is not None:
            rows[NOISE] = noise.transpose(0, 1)
        return self._actor(size, self._send("actor", size, rows, TensorDict()), len(start))

    def critic(self, states: TensorDictBase, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Critic update on ``states`` ``[S]``; rank 0 only.

        Returns:
            tuple: losses and gradient norm.
        """
        common = TensorDict(counted=self.losses.critic.counted(states))
        return self._critic(size, self._send("critic", size, states, common), len(states))

    def follow(self, command: Mapping[str, Any]) -> None:
        """Do this rank's part of the update that rank 0 commands; take it back if memory ran out on any of them."""
        update, size, count = command["update"], command["size"], command["count"]
        undo, optimizer = self.undo[update], self.optimizers[update]
        undo.note()
        for group in optimizer.optimizer.param_groups:
            group["lr"] = command["lr"]
        try:
            parcel = self.ranks.receive(command)
            if update == "model":
                self._model(size, parcel)
            elif update == "actor":
                self._actor(size, parcel, count)
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
        lr = self.optimizers[update].optimizer.param_groups[0]["lr"]
        return self.ranks.send({"update": update, "size": size, "lr": lr}, rows, common)

    def _model(self, size: int, parcel: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        optimizer, ranks = self.optimizers["model"], self.ranks
        with ranks.agreeing():
            rows, common = parcel["rows"].auto_batch_size_(2), parcel["common"]
            noise = rows.get(NOISE, None)
            statistics = self.networks.model.observation_statistics
            if statistics is not None and not ranks.leads:
                for key, buffer in statistics.named_buffers():
                    buffer.copy_(common["observations", key])
            losses = self.losses.model.backward(
                self.losses.model.read(rows),
                size,
                noise=None if noise is None else FlowNoise(*(noise[key].transpose(0, 1) for key in FlowNoise._fields)),
                valid_counts=(common["per_step"], common["overall"]),
            )
            total = Total(ranks, [*(p.grad for p in optimizer.parameters), *losses.values()])
        finished = self._finish("model", total, losses)
        self._models += 1
        if self._models % COMPARE_EVERY == 0 and self.losses.actor is None:
            ranks.idle = False
            self._compare()
            ranks.idle = True
        return finished

    def _actor(self, size: int, parcel: TensorDictBase, count: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        loss, ranks = self.losses.actor, self.ranks
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
            norm = self.optimizers["actor"].step(self.undo["actor"].before_step)
        self._compare()  # once an epoch, usually
        ranks.idle = True
        return losses, imagined, norm

    def _compare(self) -> None:
        """Ranks that drifted apart would train on, and each look healthy."""
        with self.ranks.agreeing():
            checked = self.checksums()
        self.ranks.compare(list(checked), torch.stack(list(checked.values())))

    def _critic(self, size: int, parcel: TensorDictBase, count: int) -> tuple[dict[str, Tensor], Tensor]:
        optimizer, ranks = self.optimizers["critic"], self.ranks
        with ranks.agreeing():
            states = parcel["rows"].auto_batch_size_(1)
            losses = self.losses.critic.backward(states, size, whole=(count, parcel["common", "counted"]))
            total = Total(ranks, [*(p.grad for p in optimizer.parameters), *losses.values()])
        return self._finish("critic", total, losses)

    def _finish(self, name: str, total: Total, losses: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Add up gradients and losses, and step."""
        optimizer = self.optimizers[name]
        total.exchange()
        with self.ranks.agreeing():
            tensors = total.tensors()
            for parameter, gradient in zip(optimizer.parameters, tensors, strict=False):  # losses follow
                parameter.grad = gradient
            whole = {
                key: x for key, x in zip(losses, tensors[len(optimizer.parameters) :], strict=True) if x is not None
            }
            norm = optimizer.step(self.undo[name].before_step)
        self.ranks.idle = True
        return whole, norm

    @torch.no_grad()
    def checksums(self) -> dict[str, Tensor]:
        """Of each network, with its optimizer, and of the return statistics: the sum of the bits as whole numbers."""
        sums = {}
        for name, network in self.networks.items():
            if name not in self.optimizers:
                continue
            state = self.optimizers[name].optimizer.state
            moments = [x for p in self.optimizers[name].parameters for x in state.get(p, {}).values()]
            # Buffers are left out: those of observations are rank 0's until the next model update.
            sums[name] = bits([*network.parameters(), *(x for x in moments if isinstance(x, Tensor))])
        if self.losses.return_statistics is not None:
            sums["return_statistics"] = bits(list(self.losses.return_statistics.buffers()))
        return sums


def bits(tensors: list[Tensor]) -> Tensor:
    """The bits of tensors, added up as whole numbers: equal where they are equal, whatever the order."""
    device = tensors[0].device
    each = [x.contiguous().view(BITS[x.element_size()]).sum(dtype=torch.int64).to(device) for x in tensors]
    return torch.stack(each).sum()
