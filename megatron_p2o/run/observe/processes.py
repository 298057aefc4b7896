"""Metrics of the engines and the other processes of a run."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.metrics.memory import ProcessMemory
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.processes import HostMemory, host_memory_of
from megatron_p2o.rollout.engines import SglangEngines


class HasWorkers(Protocol):
    """A grader that grades in processes of its own."""

    @property
    def worker_pids(self) -> Sequence[int]: ...


class ProcessMeter:
    """Measures the processes that a run consists of."""

    def __init__(
        self,
        policy: MegatronPolicy,
        engines: SglangEngines,
        grader: HasWorkers,
        session: EvolutionSession | None,
    ) -> None:
        self._policy, self._engines, self._grader, self._session = policy, engines, grader, session
        self._memory = ProcessMemory()

    def metrics(self, phase_peak_bytes: Mapping[str, int]) -> Mapping[str, float]:
        """Return what the engines did and what the run's processes hold; `phase_peak_bytes`: of this one."""
        others = {"graders": host_memory_of(self._grader.worker_pids)}
        service = self._session.service_process_id if self._session is not None else None
        if service is not None:
            others["evolution"] = host_memory_of([service])
        others["relays"] = sum(self._engines.relay_memory(), HostMemory())
        ranks, engines = self._policy.memory(), self._engines.host_memory()
        return {**self._engines.metrics(), **self._memory.metrics(ranks, engines, others, phase_peak_bytes)}
