"""How rank 0 tells the other ranks what to do, how they answer, and how an error of any rank is told on all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_p2o.policy.model.parallel import Ranks

ERROR_KEY = "megatron_p2o/policy_error"
"""Key in torch.distributed's store under which the first failing rank leaves its error for the others."""

Method = Literal[
    "update",
    "plan_updates",
    "skip",
    "logprobs",
    "reference_logprobs",
    "diverged",
    "memory",
    "export",
    "deliver",
    "save",
    "load",
    "close",
]


class PolicyError(RuntimeError):
    """A rank failed inside a collective call of the policy; the message names the rank, the call and the error.

    The trainer's ranks are then out of step: the only way on is to end the run and resume it.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What one rank is to do next."""

    method: Method
    arguments: tuple[Any, ...] = ()


class RankChannel:
    """One rank's end. `send` is for rank 0, `receive` for the others, the rest for all together."""

    def __init__(self, ranks: Ranks, command_timeout_s: float) -> None:
        """`command_timeout_s`: how long the groups of `ranks` let a rank wait for a command; errors tell it."""
        self._ranks = ranks
        self._command_timeout_s = command_timeout_s
        self.is_broken = False
        """A call has failed: the ranks are out of step, and there is no one left to talk to."""

    def send(self, commands: Sequence[Command]) -> None:
        """Give the ranks of each data-parallel replica its command, rank 0's own among them.

        A command holds the replica's samples and goes to it once: its first rank passes it on.
        """
        with self.named_errors(commands[0].method):
            if self._ranks.heads is not None:
                dist.scatter_object_list([None], list(commands), src=0, group=self._ranks.heads)
            self._pass_on([commands[0]])

    def receive(self) -> Command:
        """Wait for rank 0's next command."""
        received: list[Any] = [None]
        with self.named_errors("serve"):
            try:
                if self._ranks.heads is not None:
                    dist.scatter_object_list(received, None, src=0, group=self._ranks.heads)
                self._pass_on(received)
            except RuntimeError as error:
                raise ConnectionError(
                    "no command from rank 0: it ended without closing the policy, or was silent for "
                    f"parallel.command_timeout_s={self._command_timeout_s:g} s"
                ) from error
        return received[0]

    def _pass_on(self, command: list[Command | None]) -> None:
        """Give the first rank's command to the others of its replica."""
        if self._ranks.replica is not None:
            dist.broadcast_object_list(command, group=self._ranks.replica, group_src=0)

    def gather(self, reply: Any) -> list[Any]:
        """Return every rank's reply on rank 0, nothing elsewhere."""
        replies: list[Any] | None = [None] * self._ranks.world_size if self._ranks.is_conductor else None
        dist.gather_object(reply, replies, dst=0, group=self._ranks.control)
        return replies or []

    @contextmanager
    def named_errors(self, method: str) -> Iterator[None]:
        """Turn any error of a collective call into a `PolicyError` that names the rank that failed first."""
        try:
            yield
        except PolicyError:
            raise
        except Exception as error:
            # A single rank cannot be out of step.
            self.is_broken = self._ranks.world_size > 1
            raise PolicyError(self._first_error(method, error)) from error

    def _first_error(self, method: str, error: Exception) -> str:
        """Publish this rank's error unless another rank has been first, and return the first."""
        own = f"policy.{method} failed on rank {self._ranks.rank}: {type(error).__name__}: {error}"
        try:
            first = _get_default_store().compare_set(ERROR_KEY, "", own).decode()
        except (RuntimeError, ValueError):  # the store is gone with the rank that hosted it
            return own
        return first if first == own else f"{first} (seen on rank {self._ranks.rank} as {type(error).__name__})"
