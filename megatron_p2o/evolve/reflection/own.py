"""Reflection by code of one's own: a callable that `evolution.reflection.backend` names."""

import asyncio
import inspect
import logging
from typing import Any

from megatron_p2o.config.callables import CallableKind, check_callable, load_callable, made_callable
from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionRequest, ReflectionUnavailable

BUILT_IN = ("openai", "self", "phrasebook")
"""Names of our own backends."""

KIND = CallableKind(parameters=("request",), entry_points="megatron_p2o.reflectors", other_names=BUILT_IN)
"""What `evolution.reflection.backend` may name beside them."""

MAX_FAILURES = 5
"""Failures in a row before evolution pauses."""

logger = logging.getLogger(__name__)


class OwnReflector:
    """A `Reflector` that calls a function, or the instance of a class, with each `ReflectionRequest`.

    An `async def` is awaited; any other is called in a thread, so that it may wait for whatever it likes.
    """

    def __init__(self, config: ReflectionConfig) -> None:
        """Import the code, and make the instance of a class.

        Raises:
            ValueError: it is not found, cannot be called as `KIND` says, or its class raises.
        """
        self._subject = f"evolution.reflection.backend={config.backend}"
        found = load_callable(config.backend, KIND, self._subject)
        check_callable(found, KIND, self._subject, config.arguments, "evolution.reflection.arguments")
        self._function = made_callable(found, config.arguments, self._subject)
        self._timeout_s = config.timeout_s
        self._num_failed = 0
        """In a row."""

    async def propose(self, request: ReflectionRequest) -> str:
        """Return what the function returns.

        Raises:
            ReflectionRefused: it raised this, any other exception, took longer than `evolution.reflection.timeout_s`,
                or returned no text.
            ReflectionUnavailable: it raised this, or failed `MAX_FAILURES` times in a row.
        """
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                text = await _called(self._function, request)
            if not isinstance(text, str):
                raise TypeError(f"it returned {type(text).__name__}, and not a text")
        except (ReflectionRefused, ReflectionUnavailable):
            self._num_failed = 0
            raise
        except Exception as error:  # whatever code of others does
            late = f"it took longer than evolution.reflection.timeout_s={self._timeout_s:g}"
            reason = late if limit.expired() else f"{type(error).__name__}: {error}"
            raise self._failure(reason, error) from error
        self._num_failed = 0
        return text

    async def close(self) -> None:
        """Call the function's own `close()`, if it has one."""
        close = getattr(self._function, "close", None)
        if close is not None:
            await _called(close)

    def _failure(self, reason: str, error: Exception) -> ReflectionRefused | ReflectionUnavailable:
        """Count a failure and return what to raise. The first of a row is logged with its traceback."""
        self._num_failed += 1
        logger.warning("%s failed: %s", self._subject, reason, exc_info=error if self._num_failed == 1 else None)
        if self._num_failed < MAX_FAILURES:
            return ReflectionRefused("own reflector failed", reason)
        return ReflectionUnavailable(
            f"{self._subject} failed {self._num_failed} times in a row, the last time: {reason}"
        )


async def _called(function: Any, *given: object) -> object:
    """Return what a function of either kind returns."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        returned = function(*given)
    else:
        returned = await asyncio.to_thread(function, *given)
    return await returned if inspect.isawaitable(returned) else returned
