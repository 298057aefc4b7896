"""`MegatronPolicy` on rank 0 is the Policy of the algorithm. Every other rank follows its commands.

A command is one collective method of `PolicyShard`, with each rank's part of the samples; ranks of one data-parallel
replica get the same part. The answers come back in one gather, so a command has ended everywhere when it returns.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_p2o.config.tree import Config
from megatron_p2o.files import FileDigest
from megatron_p2o.interfaces import NamedWeights, PolicyDiverged
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.model.layer_choice import Capabilities, LayerChoice, machine_capabilities
from megatron_p2o.policy.model.parallel import Ranks, end_parallel, initialize_parallel
from megatron_p2o.policy.rank_channel import Command, Method, RankChannel
from megatron_p2o.policy.training.checkpoint import check_checkpoint
from megatron_p2o.policy.training.forward import PassResult
from megatron_p2o.policy.training.rank_samples import RankSamples, check_samples, split_over_ranks
from megatron_p2o.policy.training.shard import PolicyShard, UpdateReply
from megatron_p2o.policy.weights.hf_directory import first_of
from megatron_p2o.processes import RankMemory
from megatron_p2o.rl.context_shift import shifts_of
from megatron_p2o.rl.objective import stats_as_numbers
from megatron_p2o.types import Logprobs, TrainSample, UpdateReport


def build_policy(config: Config, capabilities: Capabilities | None = None) -> "MegatronPolicy":
    """Return this rank's handle on the policy loaded from `model.path`. All ranks must call.

    Starts torch.distributed when it is not running. Afterwards rank 0 (`is_conductor`) uses the handle as the Policy,
    and every other rank calls `serve()`.

    Args:
        capabilities: what the choice of layers goes by; None asks the machine.

    Raises:
        ValueError: the configuration does not fit the model, the number of processes or what is installed.
    """
    if config.model.dtype == "float32" and torch.cuda.is_available():
        raise ValueError(
            "model.dtype=float32 works only without CUDA, because attention on a GPU needs bfloat16: set "
            "model.dtype=bfloat16"
        )
    ranks = initialize_parallel(config.parallel, config.run.seed)
    with cuda_stand_ins():
        shard = PolicyShard(config, ranks, capabilities or machine_capabilities())
    return MegatronPolicy(config, ranks, shard)


class MegatronPolicy:
    """The Policy of `megatron_p2o.interfaces`, trained by Megatron on all ranks.

    Its methods but `serve` are for rank 0. They raise `ValueError` for samples that cannot be trained on, before any
    rank has begun, and `PolicyError` when a rank fails; no wait exceeds `parallel.timeout_s`, `serve`'s
    for a command `parallel.command_timeout_s`.
    """

    def __init__(self, config: Config, ranks: Ranks, shard: PolicyShard) -> None:
        self._config = config
        self._ranks = ranks
        self._shard = shard
        self._channel = RankChannel(ranks, config.parallel.command_timeout_s)
        self._export: Iterator[tuple[str, Tensor]] | None = None
        self._is_delivery = False
        self._take: Callable[[NamedWeights], None] | None = None
        self._is_checked = False
        """No weight has changed since all were seen to be finite."""

    @property
    def is_conductor(self) -> bool:
        return self._ranks.is_conductor

    @property
    def layers(self) -> LayerChoice:
        """Whose layers were built, and why."""
        return self._shard.layers

    @property
    def vocab_size(self) -> int:
        return self._shard.architecture.vocab_size

    @property
    def largest_weight_bytes(self) -> int:
        """Size of the largest tensor that `weights` yields."""
        return self._shard.architecture.largest_weight_bytes(self._config.model.dtype)

    def deliver_to(self, take: Callable[[NamedWeights], None]) -> None:
        """Make `weights` also give every other rank's copy to `take` on that rank, which must exhaust it.

        All ranks must call. Rank 0's iterator waits for every other rank to take each weight.
        """
        self._take = take

    def meeting(self) -> AbstractContextManager[None]:
        """Return a context for what all ranks do together while `deliver_to` has them take weights.

        An error inside it, on whatever rank it began, is a `PolicyError` that names that, here and for `weights`.
        """
        return self._channel.named_errors("deliver")

    def wait_for_ranks(self) -> None:
        """Lend what `optimizer.lend` names on every rank and free cached GPU memory, then wait for all of them. Engines
        that start afterwards see the true amount of free memory.

        All ranks must call.
        """
        self._shard.lend()
        with self._channel.named_errors("wait_for_ranks"):
            dist.barrier(group=self._ranks.control)

    def update(
        self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_loss_tokens: int
    ) -> UpdateReport:
        """Take one optimizer step; see `interfaces.Policy`.

        Without samples, or when the gradient is not finite, no weight changes (see `UpdateOutcome`) but the
        learning-rate schedule advances.
        """
        check_samples(samples, old_logprobs, self.vocab_size)
        num_response_tokens = sum(len(sample.response_ids) for sample in samples)
        if num_loss_tokens < num_response_tokens:
            raise ValueError(
                f"num_loss_tokens={num_loss_tokens} must count the {num_response_tokens} response tokens of the samples"
            )
        if not samples:
            learning_rate = self._everywhere("skip")[0]
            return UpdateReport(loss=0.0, grad_norm=0.0, learning_rate=learning_rate, outcome="empty")
        by_rank = self._by_rank(samples, old_logprobs)
        replies = cast(
            list[UpdateReply],
            self._conduct("update", [(rank_samples, num_loss_tokens, len(samples)) for rank_samples in by_rank]),
        )
        # Forward, and twice as much backward.
        flops = 3 * sum(self._shard.architecture.forward_flops(s.num_tokens, len(s.response_ids)) for s in samples)
        return _update_report(replies, samples, flops / self._ranks.world_size)

    def plan_updates(self, num_updates: int) -> None:
        """Set the number of updates of the whole run, including those already done. The learning-rate schedule depends
        on it."""
        self._everywhere("plan_updates", num_updates)

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return log pi(response | context_ids) at the sampling temperature, [R] float32 each, without gradient."""
        return self._logprobs("logprobs", samples)

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return the same of the initial policy, for which `objective.kl_coefficient` must be above 0."""
        return self._logprobs("reference_logprobs", samples)

    def _logprobs(
        self, method: Literal["logprobs", "reference_logprobs"], samples: Sequence[TrainSample]
    ) -> list[Logprobs]:
        check_samples(samples, None, self.vocab_size)
        if not samples:
            return []
        by_rank = self._by_rank(samples, None)
        replies = cast(list[dict[int, Logprobs]], self._conduct(method, [(each,) for each in by_rank]))
        by_index = {index: row for reply in replies for index, row in reply.items()}
        return [by_index[index] for index in range(len(samples))]

    def check_finite(self) -> None:
        """Raise `PolicyDiverged` unless all weights are finite; looks at them once between two changes."""
        if self._is_checked:
            return
        names = sorted({name for names in self._everywhere("diverged") for name in names})
        if names:
            raise PolicyDiverged(
                f"the policy has diverged: {len(names)} of its weight tensors hold NaN or infinite values: "
                f"{first_of(names)}"
            )
        self._is_checked = True

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor); the receiver may keep them.

        Every rank takes part until the end: when the iterator is closed early, the rest is gathered and discarded.
        Raises `PolicyDiverged` at once, on rank 0 alone, when a weight is not finite.
        """
        self.check_finite()
        return self._weights("export" if self._take is None else "deliver")

    def _weights(self, method: Literal["export", "deliver"]) -> Iterator[tuple[str, Tensor]]:
        self._send([Command(method=method)] * self._config.parallel.num_replicas)
        self._is_delivery = method == "deliver"
        self._export = stream = self._shard.export()
        try:
            with self._channel.named_errors(method):
                # Not from the stream itself, which closing this generator must not close: it has to be finished.
                yield from iter(functools.partial(self._next_weight, stream), None)
        finally:
            self._finish_export()

    def memory(self) -> list[RankMemory]:
        """Return what each rank holds, by rank."""
        return self._everywhere("memory")

    def save(self, directory: Path) -> Future[Mapping[str, FileDigest]]:
        """Begin to write weights, optimizer and random states into `directory`, which all ranks must see.

        Returns when the state has been copied to host memory; see `interfaces.Policy`.
        """
        self.check_finite()
        self._everywhere("save", directory)
        return self._shard.writer.written

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; the parallel sizes may differ.

        Raises:
            ValueError: `directory` holds no checkpoint.
        """
        check_checkpoint(directory)
        self._everywhere("load", directory)

    def close(self) -> None:
        """End the followers' `serve` and the process groups. The policy cannot be used afterwards.

        After a `PolicyError` there is no one left to talk to, and this does nothing.
        """
        if self._channel.is_broken:
            return
        self._finish_export()
        self._send([Command(method="close")] * self._config.parallel.num_replicas)
        self._end()

    def serve(self) -> None:
        """Follow rank 0's commands until it closes the policy. For every rank but 0.

        Raises:
            PolicyError: a rank failed, or rank 0 ended without closing the policy.
        """
        assert not self.is_conductor, "rank 0 conducts"
        while True:
            command = self._channel.receive()
            if command.method == "close":
                self._end()
                return
            with self._channel.named_errors(command.method):
                reply = self._execute(command)
                if command.method != "deliver":
                    self._channel.gather(reply)

    def _end(self) -> None:
        """Finish what this rank has to write, and end its process groups; the model goes with this object."""
        self._shard.writer.wait()
        self._shard.optimization.close()
        end_parallel(self._ranks)

    def _next_weight(self, stream: Iterator[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
        """Return what the stream yields next, None at its end."""
        if self._channel.is_broken:
            raise ConnectionError("the ranks did not meet")
        return next(stream, None)

    def _finish_export(self) -> None:
        """Take part in what is left of an export that was not consumed to the end."""
        if self._export is None or self._channel.is_broken:
            return
        stream, self._export = self._export, None
        with self._channel.named_errors("export"):
            deque(stream, maxlen=0)
            # Consumers of weights on other ranks keep step with the one here, and may end later.
            if not self._is_delivery:
                self._channel.gather(None)

    def _by_rank(self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None) -> list[RankSamples]:
        micro_batch_tokens = self._config.optimizer.micro_batch_tokens
        return split_over_ranks(
            samples, old_logprobs, self._config.parallel, micro_batch_tokens, self._shard.architecture
        )

    def _everywhere(self, method: Method, *arguments: Any) -> list[Any]:
        """Run a method with the same arguments on all ranks; returns their answers by rank."""
        return self._conduct(method, [arguments] * self._config.parallel.num_replicas)

    def _conduct(self, method: Method, arguments_by_data_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        commands = [Command(method=method, arguments=arguments) for arguments in arguments_by_data_rank]
        self._send(commands)
        with self._channel.named_errors(method):
            return self._channel.gather(self._execute(commands[0]))

    def _send(self, commands: list[Command]) -> None:
        """`commands`: one per data-parallel replica."""
        assert self.is_conductor, "rank 0 conducts: the other ranks serve"
        self._is_checked &= commands[0].method not in ("update", "load")
        if self._export is not None:
            raise RuntimeError(f"policy.weights() must be consumed to the end before policy.{commands[0].method}")
        self._channel.send(commands)

    def _execute(self, command: Command) -> Any:
        with cuda_stand_ins():
            if command.method == "deliver":
                assert self._take is not None, "every rank calls `deliver_to` or none does"
                self._take(self._shard.export())
                return None
            result = getattr(self._shard, command.method)(*command.arguments)
            if command.method == "export":
                deque(result, maxlen=0)  # unlike a loop, holds no weight when the last has come
                return None
            return result


def _update_report(
    replies: Sequence[UpdateReply], samples: Sequence[TrainSample], flops_per_rank: float
) -> UpdateReport:
    results = [reply.result for reply in replies if reply.result is not None]
    total = functools.reduce(PassResult.merge, results, PassResult.zero())
    return UpdateReport(
        loss=float(total.loss) / max(int(total.divisor), 1),
        grad_norm=replies[0].outcome.grad_norm,
        learning_rate=replies[0].learning_rate,
        outcome=replies[0].outcome.outcome,
        tokens=stats_as_numbers(total.stats),
        shifts=shifts_of(samples, [reply.shifts for reply in replies]),
        flops_per_rank=flops_per_rank,
    )
