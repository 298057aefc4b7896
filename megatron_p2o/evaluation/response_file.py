"""The responses of an evaluation on disk, one line each as they arrive, so that an evaluation can be resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_p2o.evaluation.outcome import GradedResponse
from megatron_p2o.metrics.jsonl import JsonObject, keep_lines, read_lines, read_records
from megatron_p2o.records import from_json, to_json


class ResponseFile:
    """`<set>.jsonl`: a first line {"settings": ...} of what the responses depend on, then one `GradedResponse` a line.

    Used in `with`. A line that a kill has torn is dropped, a damaged one passed over: it is sampled again. Written by
    one process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open the file, or begin it.

        Raises:
            ValueError: it holds responses given under other settings; the message names them.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(path)
        first = next(read_lines(path), None)
        if first is not None:
            _check_settings(path, first.get("settings"), settings)
        responses = read_records(path, lambda line: None if "settings" in line else from_json(GradedResponse, line))
        self.responses = {
            (response.problem_id, response.sample): response
            for response in responses
            if response is not None and response.is_decided
        }
        """Responses by problem id and sample index; of an earlier evaluation those with a verdict, the others are asked
        again."""
        self._file = path.open("a", encoding="utf-8")
        if first is None:
            self._write({"settings": dict(settings)})

    def append(self, response: GradedResponse) -> None:
        """Keep a response: it is handed to the operating system before this returns."""
        self._write(to_json(response))
        self.responses[response.problem_id, response.sample] = response

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, line: JsonObject) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def _check_settings(path: Path, found: object, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings in its first line: it holds no responses, use another --output")
    changed = [
        f"{name} was {_short(found.get(name))} and is {_short(wanted.get(name))}"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} holds responses of another evaluation ({'; '.join(changed)}): give another --output, or --restart "
            "to throw them away"
        )


def _short(value: object) -> str:
    return f"{value:.12}..." if isinstance(value, str) and len(value) > 16 else str(value)
