"""`report.html`: the page of `p2o view` in one file, which asks no server because it holds the answers."""

import base64
import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_p2o.files import write_whole
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.report.charts import thinned
from megatron_p2o.view import panels
from megatron_p2o.view.panels import encoded
from megatron_p2o.view.runs import ViewedRun

ASSETS = Path(__file__).parent / "assets"

MAX_DETAIL_BYTES = 8 << 20
"""Packed size of the rollouts and reflections in a file: half for each, the same share for each run."""

MAX_STEPS_OF_PROBLEM = 6
"""Latest steps of a problem whose rollouts are kept."""

MAX_VALUES = 1000
"""Values kept of a metric: the latest `NUM_LATEST_STEPS`, and others evenly chosen."""

NUM_LATEST_STEPS = 100
"""Latest steps that keep all their numbers."""

SCRIPT = re.compile(r'<script src="assets/([\w./]+)"></script>')
STYLE = re.compile(r'<link rel="stylesheet" href="assets/([\w./]+)">')

Detail = tuple[str, Callable[[], object]]
"""The address of an answer that may be left out, and what makes it."""


def write_report(run_dirs: Sequence[Path], output: Path) -> list[str]:
    """Write the page of the runs to `output` (replaced in one rename); return a sentence for each damaged file.

    Works for a run in progress and for runs that lack parts.

    Raises:
        ValueError: no run was named, or one of them is not a run directory.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory")
    runs = [ViewedRun(directory) for directory in run_dirs]
    write_whole(output, frozen_page({"answers": _answers(runs)}))
    return [sentence for run in runs for sentence in run.damages()]


def _answers(runs: Sequence[ViewedRun]) -> JsonObject:
    """Return what the page asks for by address. Rollouts and reflections that do not fit are left out and counted."""
    answers: dict[str, Any] = {name: panel(runs) for name, panel in panels.OF_ALL.items()}
    num_bytes = MAX_DETAIL_BYTES // (2 * len(runs))
    for number, run in enumerate(runs):
        of_run: dict[str, Any] = {name: panel(run) for name, panel in panels.OF_RUN.items()}
        of_run["metrics"] = thinned_metrics(of_run["metrics"])
        reflections = list(_reflections(run, of_run["rounds"]))
        problems = list(_problems(run, answers["report"]["examples"]))
        kept = {**fitting(reflections, num_bytes), **fitting(problems, num_bytes)}
        answers |= {f"run/{number}/{address}": answer for address, answer in {**of_run, **kept}.items()}
        answers["runs"][number]["left_out"] = _left_out(run, of_run["metrics"], problems, reflections, kept)
    # Reading them has found what is damaged.
    for run, shown in zip(runs, answers["runs"], strict=True):
        shown["damages"] = run.damages()
    return answers


def fitting(details: Iterable[Detail], num_bytes: int) -> dict[str, object]:
    """Return the first answers that take no more than that when each is packed."""
    kept: dict[str, object] = {}
    for address, make in details:
        answer = make()
        num_bytes -= len(zlib.compress(encoded(answer), level=1))
        if num_bytes < 0:
            break
        kept[address] = answer
    return kept


def _problems(run: ViewedRun, examples: Sequence[JsonObject]) -> Iterator[Detail]:
    """Yield the problems that have rollouts: those that the report shows, then the others in no particular order."""
    known = run.rollouts().facts
    shown = [problem["problem_id"] for each in examples if each["name"] == run.name for problem in each["examples"]]
    others = sorted(known, key=lambda id_: hashlib.sha256(id_.encode(errors="replace")).digest())
    for problem_id in dict.fromkeys(id_ for id_ in (*shown, *others) if id_ in known):
        yield (
            f"problem?id={_component(problem_id)}",
            lambda id_=problem_id: panels.problem_panel(run, id_, max_steps=MAX_STEPS_OF_PROBLEM),
        )


def _reflections(run: ViewedRun, rounds: Sequence[JsonObject]) -> Iterator[Detail]:
    """Yield the reflections that the page can open: of the latest round first, of candidates before refused ones."""
    for found in rounds:
        name = found["name"]
        for each in (*found["candidates"], *found["refusals"]):
            if each["proposal"] is not None:
                address = f"reflection?round={_component(name)}&proposal={each['proposal']}"
                yield address, lambda name=name, each=each: panels.reflection_panel(run, name, each["proposal"])


def thinned_metrics(metrics: JsonObject) -> JsonObject:
    """Return a panel of metrics with no more than `MAX_VALUES` values of each."""
    return {**metrics, "series": {key: _thinned(values) for key, values in metrics["series"].items()}}


def _thinned(values: Sequence[float | None]) -> Sequence[float | None]:
    places = [place for place, value in enumerate(values) if value is not None]
    if len(places) <= MAX_VALUES:
        return values
    early = [(place, 0.0) for place in places if place < len(values) - NUM_LATEST_STEPS]
    kept = {place for place, _ in thinned(early, MAX_VALUES - NUM_LATEST_STEPS)}
    return [
        value if place in kept or place >= len(values) - NUM_LATEST_STEPS else None
        for place, value in enumerate(values)
    ]


def _left_out(
    run: ViewedRun, metrics: JsonObject, problems: Sequence[Detail], reflections: Sequence[Detail], kept: JsonObject
) -> list[str]:
    """Return a sentence on what the file does not have; none when it has everything."""
    parts: list[str] = []
    for what, details in (("rollouts of {} problems", problems), ("{} reflections", reflections)):
        addresses = [address for address, _ in details]
        num_kept = sum(address in kept for address in addresses)
        if num_kept < len(addresses):
            parts.append(what.format(f"{num_kept} of {len(addresses)}"))
    if run.rollouts().most_steps() > MAX_STEPS_OF_PROBLEM:
        parts.append(f"the rollouts of a problem's latest {MAX_STEPS_OF_PROBLEM} steps")
    if len(metrics["steps"]) > MAX_VALUES:
        parts.append(f"at most {MAX_VALUES} values of a curve")
    if not parts:
        return []
    return [f"This file holds only: {'; '.join(parts)}. `p2o view {run.directory}` shows all."]


def _component(text: str) -> str:
    """Return what JavaScript's encodeURIComponent does."""
    return quote(text, safe="!*'()", errors="replace")


def frozen_page(content: JsonObject) -> str:
    """Return the page with its scripts, its styles and `content` in it."""
    hashes: list[str] = []

    def script(found: re.Match[str]) -> str:
        source = (ASSETS / found[1]).read_text(encoding="utf-8")
        hashes.append(f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'")
        return f"<script>{source}</script>"

    page = (ASSETS / "index.html").read_text(encoding="utf-8")
    # Packed text has no character that could end its element: nothing of a run can become markup.
    packed = base64.b64encode(gzip.compress(encoded(content), mtime=0)).decode()
    page = page.replace("<script ", f'<script type="application/gzip" id="frozen">{packed}</script>\n<script ', 1)
    page = SCRIPT.sub(script, page)
    page = STYLE.sub(lambda found: f"<style>{(ASSETS / found[1]).read_text(encoding='utf-8')}</style>", page)
    # Only our own scripts may run, and nothing is loaded from elsewhere.
    policy = f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data:"
    meta = f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">"
    return page.replace("<head>", f"<head>\n{meta}", 1)
