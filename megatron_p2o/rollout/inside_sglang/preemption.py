"""Training requests take KV cache from evolution's: a plugin of every engine process with priorities.

SGLang 0.5.21 preempts a running request when a slot is missing, and not when tokens of the KV cache are: a request of
a higher priority then waits until a lower one has ended (sgl-project/sglang#14872). Here it takes their tokens, from
the newest of the lowest priority on. A preempted request waits in the engine's queue with the tokens it has, and is
computed again from them when there is room.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

ADD = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
PASS = "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw"

_preempted: list[Any] = []
"""Requests that this pass of the scheduler has preempted."""


def register() -> None:
    """Have SGLang preempt for tokens as well; it calls this in each of its processes."""
    HookRegistry.register(ADD, add_with_preemption, HookType.AROUND)
    HookRegistry.register(PASS, requeue_preempted, HookType.AROUND)


def is_in_place() -> bool:
    """Return whether this process preempts for tokens."""
    return hasattr(PrefillAdder.add_one_req, "__wrapped__")


def add_with_preemption(add: Callable[..., AddReqResult], adder: Any, request: Any, **options: Any) -> AddReqResult:
    """Add a waiting request to the next prefill; where tokens are missing, preempt lower priorities and try again."""
    result = add(adder, request, **options)
    if result != AddReqResult.NO_TOKEN or request.priority is None:
        return result
    lower = preemptible(adder, request)
    if tokens_needed(request) > adder.rem_total_tokens + sum(tokens_of(adder, other) for other in lower):
        return result
    for other in lower:
        preempt(adder, other)
        # What was evicted with it may have been this request's cached prefix.
        request.init_next_round_input(adder.tree_cache)
        result = add(adder, request, **options)
        if result != AddReqResult.NO_TOKEN:
            return result
    return result


def requeue_preempted(prefill: Callable[..., Any], scheduler: Any, *args: Any, **options: Any) -> Any:
    """Choose the next prefill. SGLang forgets what was preempted for a prefill that did not come about."""
    _preempted.clear()
    chosen = prefill(scheduler, *args, **options)
    waiting = set(map(id, scheduler.waiting_queue))
    for request in _preempted:
        if id(request) not in waiting:
            scheduler._add_request_to_queue(request)
    return chosen


def preemptible(adder: Any, request: Any) -> list[Any]:
    """Return the running requests that `request` may preempt: of the lowest priority and the newest first."""
    least = request.priority - adder.priority_scheduling_preemption_threshold
    lower = [
        other
        for other in adder.running_batch.reqs
        if not other.finished() and other.priority is not None and other.priority < least
    ]
    return sorted(lower, key=lambda other: (other.priority, -other.time_stats.wait_queue_entry_time))


def tokens_needed(request: Any) -> int:
    """Return the tokens that SGLang wants free before it prefills a request."""
    left = max(request.sampling_params.max_new_tokens - len(request.output_ids), 0)
    return len(request.full_untruncated_fill_ids) - len(request.prefix_indices) + min(left, CLIP_MAX_NEW_TOKENS)


def tokens_of(adder: Any, running: Any) -> float:
    """Return the tokens that a running request holds or that are kept free for it, at most."""
    held = len(running.origin_input_ids) + len(running.output_ids)
    return held + adder._get_running_request_total_token_offset(running)


def preempt(adder: Any, running: Any) -> None:
    """Take a running request out of its batch, and its tokens from it."""
    batch = adder.running_batch
    index = next(place for place, other in enumerate(batch.reqs) if other is running)
    adder.memory_budget.total_offset -= adder._get_running_request_total_token_offset(running)
    batch.release_req(index, len(batch.reqs) - 1)
    batch.filter_batch(keep_indices=[place for place in range(len(batch.reqs)) if place != index])
    adder.preempt_list.append(running)
    _preempted.append(running)
