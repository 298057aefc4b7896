"""This rank's part of the policy: model and optimizer. Every method is collective."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_p2o.config.tree import Config
from megatron_p2o.policy.model.layer_choice import Capabilities, choose_layers, fused_operations
from megatron_p2o.policy.model.model import build_models
from megatron_p2o.policy.model.parallel import Ranks
from megatron_p2o.policy.training.checkpoint import CheckpointWriter, load_checkpoint
from megatron_p2o.policy.training.forward import (
    Denominator,
    MicroBatch,
    PassResult,
    forward_backward,
    length_multiple,
    make_micro_batches,
    response_logprobs,
)
from megatron_p2o.policy.training.optimizer import Optimization, StepOutcome
from megatron_p2o.policy.training.rank_samples import RankSamples
from megatron_p2o.policy.training.settings import machine_problems, policy_settings
from megatron_p2o.policy.weights.hf_directory import WeightFiles
from megatron_p2o.policy.weights.hf_weights import diverged_weights, export_hf_weights, load_hf_weights
from megatron_p2o.policy.weights.host_weights import HostWeights
from megatron_p2o.processes import RankMemory, host_memory_of, own_host_memory
from megatron_p2o.rl.context_shift import SampleShift
from megatron_p2o.rl.objective import annealed, cap_in_the_loss, dead_share, stats_as_numbers
from megatron_p2o.types import Logprobs
from p2o_kernels import HeadOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReply:
    """A rank's account of one update."""

    outcome: StepOutcome
    learning_rate: float
    result: PassResult | None
    """Result of the pass, on the one rank that represents its data-parallel replica; None on the others."""
    shifts: Mapping[int, SampleShift]
    """`PassResult.shifts_by_sample` by place in the caller's list; empty where there is no result."""


class PolicyShard:
    """Built from `model.path`; must be constructed on all ranks, inside `cuda_stand_ins`."""

    def __init__(self, config: Config, ranks: Ranks, capabilities: Capabilities) -> None:
        settings = policy_settings(config)
        problems = machine_problems(config, settings, capabilities)
        if problems:
            raise ValueError("; ".join(problems))
        self.config = config
        self.layers = choose_layers(config.model.layer_backend, capabilities)
        is_dense = settings.architecture.experts is None
        settings = policy_settings(config, fused_operations(self.layers.layers, capabilities, is_dense=is_dense))
        self.ranks = ranks
        self.architecture = settings.architecture
        head = HeadOptions(kernel=config.head.kernel, weight_grad=config.head.weight_grad)
        temperature = config.rollout.temperature
        self.models = build_models(self.architecture, settings.transformer, temperature, self.layers.layers, head)
        with WeightFiles(Path(config.model.path)) as files:
            load_hf_weights(self.models, files, self.architecture)
        self.optimization = Optimization(
            self.models,
            settings.transformer,
            config.optimizer,
            is_sharded=config.parallel.distributed_optimizer,
            overrides=settings.overrides,
        )
        has_reference = config.objective.kl_coefficient > 0
        self._initial = HostWeights(self.models) if has_reference else None
        self._dead_share = 0.0
        self._num_updates = 0
        self.writer = CheckpointWriter(config.parallel.timeout_s)
        # The last stage holds the results; its tensor ranks all know the same, its context ranks each their part.
        self.speaks = ranks.tensor_rank == 0 and ranks.pipeline_rank == config.parallel.pipeline - 1

    def update(self, rank_samples: RankSamples, num_loss_tokens: int, num_samples: int) -> UpdateReply:
        """Take one optimizer step on the samples of all data-parallel ranks."""
        self._num_updates += 1
        with traced(self._trace_path()):
            return self._update(rank_samples, num_loss_tokens, num_samples)

    def _trace_path(self) -> Path | None:
        number = self._num_updates
        if number != self.config.logging.profile_update:
            return None
        return self.config.run.folder / "profile" / f"update-{number}-rank-{self.ranks.rank}.json.gz"

    def _update(self, rank_samples: RankSamples, num_loss_tokens: int, num_samples: int) -> UpdateReply:
        optimization = self.optimization
        batches = self._micro_batches(rank_samples)
        denominator = Denominator(
            objective=annealed(self.config.objective, optimization.scheduler.num_steps),
            num_loss_tokens=num_loss_tokens,
            num_samples=num_samples,
            counts_here=self.ranks.data_rank == 0 and self.ranks.context_rank == 0,
        )
        learning_rate = optimization.learning_rate
        optimization.lending.take_back()
        optimization.clear_gradients()
        cap = cap_in_the_loss(self.config)
        result = forward_backward(optimization.modules, batches, denominator, self._dead_share, cap).on_cpu()
        self._dead_share = dead_share(stats_as_numbers(result.stats), otherwise=self._dead_share)
        outcome = optimization.step()
        if not self.speaks:
            return UpdateReply(outcome=outcome, learning_rate=learning_rate, result=None, shifts={})
        shifts = {rank_samples.indices[place]: sums for place, sums in result.shifts_by_sample().items()}
        return UpdateReply(
            outcome=outcome, learning_rate=learning_rate, result=replace(result, shifts=()), shifts=shifts
        )

    def plan_updates(self, num_updates: int) -> None:
        """See `Optimization.plan`."""
        self.optimization.plan(num_updates)

    def skip(self) -> float:
        """Let an update without samples pass; returns the learning rate it would have used."""
        learning_rate = self.optimization.learning_rate
        self.optimization.skip()
        return learning_rate

    def logprobs(self, rank_samples: RankSamples) -> dict[int, Logprobs]:
        """Return the responses' log-probs by place in the caller's list, for the ranks that speak."""
        self.optimization.lending.take_back_parameters()
        batches = self._micro_batches(rank_samples)
        logprobs = response_logprobs(self.optimization.modules, batches)
        return {rank_samples.indices[sample]: row for sample, row in logprobs.items()} if self.speaks else {}

    def reference_logprobs(self, samples: RankSamples) -> dict[int, Logprobs]:
        """Return the log-probs of the initial policy. Its weights are swapped with the policy's for the call."""
        if self._initial is None:
            raise RuntimeError("objective.kl_coefficient=0 keeps no weights of the initial policy")
        self.optimization.lending.take_back_parameters()
        with self.optimization.whole_weights(), self._initial.in_place():
            return self.logprobs(samples)

    def _micro_batches(self, rank_samples: RankSamples) -> list[MicroBatch]:
        return make_micro_batches(rank_samples, self.ranks.device, length_multiple(self.models[0].config))

    def diverged(self) -> list[str]:
        """Return the Hugging Face names of this rank's weights that are not finite."""
        self.optimization.lending.take_back_parameters()
        return diverged_weights(self.models)

    def memory(self) -> RankMemory:
        """Return what this rank holds."""
        has_gpu = self.ranks.device.type == "cuda"
        return RankMemory(
            host=own_host_memory(),
            gpu_peak_bytes=torch.cuda.max_memory_allocated() if has_gpu else 0,
            agent=host_memory_of([os.getppid()] if os.environ.get("LOCAL_RANK") == "0" else []),
        )

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights on every rank; see `export_hf_weights`.

        Meanwhile what `optimizer.lend` names is lent; it, and what the allocator keeps of training and of this, is
        free when the last weight has been yielded: engines on the GPU ask for their memory.
        """
        lending = self.optimization.lending
        lending.take_back_parameters()
        self.optimization.gather_weights()
        lending.begin()
        self.empty_cache()
        yield from export_hf_weights(self.models, self.architecture)
        lending.finish()
        self.empty_cache()

    def lend(self) -> None:
        """Lend what `optimizer.lend` names until the next update, and give the GPU back what the allocator keeps."""
        self.optimization.lending.begin()
        self.optimization.lending.finish()
        self.empty_cache()

    def save(self, directory: Path) -> None:
        """Begin to write; see `CheckpointWriter`."""
        if self.optimization.lending.has_parameters:  # else they were whole when they went
            self.optimization.gather_weights()
        self.writer.begin(self.models, self.optimization, directory, self.ranks.control)

    def load(self, directory: Path) -> None:
        self.writer.wait()
        self.optimization.lending.take_back()
        self.optimization.lending.arrive()
        load_checkpoint(self.models, self.optimization, directory)

    def empty_cache(self) -> None:
        """Give the GPU back what the allocator keeps and no tensor is in."""
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Write what runs inside as a Chrome trace to `path`, a .json.gz; without a path nothing is recorded.

    CPU operators, and CUDA kernels where there are any. Opens in Perfetto or chrome://tracing.
    """
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as recorded:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
