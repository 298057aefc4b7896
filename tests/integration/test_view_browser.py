"""`p2o view` in a real browser: every view opens, foreign text does nothing, and the page follows a real run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.evolve.record.history import (
    Accepted,
    Ended,
    Picked,
    Reflected,
    RoundHistory,
    Scored,
    template_digest,
)
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.view import frozen
from megatron_p2o.view.frozen import write_report

playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VIEWS = ("overview", "curves", "steps", "problems", "templates", "engines", "memory", "settings", "warnings")
HOSTILE = "</script></pre><img src=x onerror=\"window.hacked=1\"><svg onload='window.hacked=1'>${hacked}"
TOKENS = {
    "lengths": [9, 6, 0, 10],
    "sampling_logprobs": [-0.25, -1.0, -2.0, None],
    "shifts": [5.0, -1.0, 0.0, None],
    "kept": [0, 1, 1, None],
}
TOKEN_NUMBERS = [
    "log-prob -0.25 under the template, -5.25 plainly; context ratio 0.006738; advantage 1.5; dropped",
    "log-prob -1 under the template, 0 plainly; context ratio 2.718; advantage 1.5",
    "not measured",
]
"""What the page says of the tokens that have a text."""

START_TIMEOUT_S = 120
RUN_TIMEOUT_S = 1500
PAGE_TIMEOUT_MS = 120_000

HELD_REWARD = """
import time
from pathlib import Path

def reward(problem, response, finish_reason):
    folder = Path({folder!r})
    while (folder / "run" / "rollouts" / "step-000002.jsonl").exists() and not (folder / "seen").exists():
        time.sleep(0.5)
    return float(len(response) % 2)
"""
"""Answers of the third step are graded only when the page has shown the second."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: tools/install_browser.sh installs it"),
]


@contextmanager
def served(page: Any, *runs: Path) -> Iterator[str]:
    """Run `p2o view` and yield its address. `page` leaves it before it ends."""
    command = [sys.executable, "-m", "megatron_p2o.cli", "view", *map(str, runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())
        assert address is not None
        yield address[0]
        page.goto("about:blank")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=START_TIMEOUT_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # The sandbox needs a user namespace, which a container as root may not have.
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def new_page(browser: Any, **options: Any) -> Any:
    """Return a page that waits longer for what it is to show than Playwright does by itself."""
    opened = browser.new_page(**options)
    opened.set_default_timeout(PAGE_TIMEOUT_MS)
    return opened


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Yield a page that fails the test for an error of a script, a request to another server or a dialog."""
    opened = new_page(browser, viewport={"width": 1200, "height": 900})
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("dialog", lambda dialog: faults.append(dialog.message))
    opened.on("request", lambda request: faults.append(request.url) if not is_ours(request.url) else None)
    yield opened
    opened.close()
    assert faults == []


def is_ours(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:")) or url.endswith("/report.html")


def step_line(step: int, reward: float) -> str:
    metrics = {"rollout/reward_mean": reward, "perf/step_s": 3.0, "perf/rollout_s": 2.0, "perf/train_s": 1.0}
    metrics |= {f"memory/{name}_bytes": step * 2.0**30 for name in ("ranks_host", "rank_0_host", "rank_host_peak")}
    metrics |= {
        "engine/evolution_price": step / 8,
        "engine/evolution_slowdown": 0.25,
        "memory/train_peak_bytes": 2.0**30,
    }
    return metrics_line(step, 0, f"2026-01-01T00:00:{4 * step:02d}+00:00", metrics)


def metrics_line(step: int, epoch: int, time: str, metrics: dict[str, float]) -> str:
    return json.dumps({"step": step, "epoch": epoch, "time": time, "metrics": metrics}) + "\n"


def rollout(problem_id: str, is_templated: bool) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        **dict.fromkeys(("source", "level", "question", "answer", "response", "reason", "feedback"), HOSTILE),
        "template": HOSTILE if is_templated else "",
        "is_templated": is_templated,
        "is_solved": is_templated,
        "reward": float(is_templated),
        "advantage": 1.5,
        "num_response_tokens": 3,
        "finish_reason": "stop",
        "weight_versions": [1],
        **({"tokens": TOKENS} if is_templated else {}),
    }


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """Return a run folder in which every text is an attack."""
    run = tmp_path / "run<b>"
    (run / "rollouts").mkdir(parents=True)
    settings = {"run": {"name": HOSTILE, "seed": 1}, "model": {"path": HOSTILE}, "evolution": {"num_lineages": 3}}
    (run / "config.yaml").write_text(json.dumps(settings))
    lines = [step_line(step, step / 10) for step in (1, 2, 3)]
    epoch_end = {"hard/set_size": 3.0, "perf/evolution_s": 0.0}
    lines.insert(1, metrics_line(1, 1, "2026-01-01T00:00:04.500+00:00", epoch_end))
    (run / "metrics.jsonl").write_text("".join(lines) + metrics_line(1, 1, HOSTILE, epoch_end))
    entry = {"epoch": 0, "step": 1, "plain_tries": 1, "plain_solved": 0, "templated_tries": 1, "templated_solved": 1}
    entries = [{**entry, "problem_id": f"{HOSTILE}-{number}"} for number in range(20)]
    again = [{**entries[0], "step": 2, "plain_solved": 1}, {**entries[0], "epoch": 2, "step": 3}]
    (run / "hard_samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, *again]))
    rollouts = [rollout(entry["problem_id"], templated) for entry in entries for templated in (False, True)]
    (run / "rollouts" / "step-000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    warning = {"time": HOSTILE, "level": "WARNING", "logger": HOSTILE, "message": HOSTILE}
    (run / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    trial = Trial(reward=0.5, response_text=HOSTILE, finish_reason="stop", num_tokens=3, weight_version=1)
    with Journal(run / "evolution" / "journal-0000.jsonl") as journal:
        history = RoundHistory([], journal.append, "fingerprint", max_rollouts=8)
        history.add(Picked(proposal=0, parent=0, minibatch=(HOSTILE,)))
        plainly = replace(trial, reward=0.0)
        history.add(Scored(template=template_digest(""), problem_id=HOSTILE, occasion="", trial=plainly))
        history.add(Reflected(proposal=0, text=HOSTILE, prompt=f"Improve {HOSTILE}", reply=f"Well: {HOSTILE}"))
        history.add(Scored(template=template_digest(HOSTILE), problem_id=HOSTILE, occasion="", trial=trial))
        history.add(Accepted(proposal=0, candidate=1))
        history.add(Ended(proposal=0, outcome=HOSTILE))
        history.add(Picked(proposal=1, parent=1, minibatch=(HOSTILE,)))
    (run / "templates").mkdir()
    template = {"id": 1, "text": HOSTILE, "parent": 0, "score": 0.5, "weight_version": 0, "lineage_problem_ids": []}
    (run / "templates" / "library-1.json").write_text(json.dumps({"version": 1, "templates": [template]}))
    ended = {"epoch": 0, "ended_by": HOSTILE, "outcomes": {HOSTILE: 1}}
    (run / "evolution" / "rounds.jsonl").write_text(json.dumps(ended) + "\n")
    (run / "engines").mkdir()
    batch = "Decode batch, #running-req: 7, #token: 43, token usage: 0.25, gen throughput (token/s): 9.5, #queue-req: 2"
    (run / "engines" / f"engine-{HOSTILE.replace('/', '')}.log").write_text(f"[2026-01-01 00:00:00] {batch}\n")
    return run


def open_view(page: Any, address: str, view: str) -> None:
    page.goto(f"{address}#{view}/0")
    page.wait_for_selector(f'nav a[aria-current="page"][href="#{view}/0"]')
    page.wait_for_selector("#content > *")


def test_every_view_opens_and_shows_foreign_text_as_text(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        assert_views_show_foreign_text_as_text(page, address)


def test_the_report_opens_from_disk_with_every_view(page: Any, hostile_run: Path, tmp_path: Path) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    write_report([hostile_run], tmp_path / "report.html")
    address = (tmp_path / "report.html").as_uri()
    assert_views_show_foreign_text_as_text(page, address)
    assert page.inner_text("#status") == "step 3"
    assert set(requests) == {address}
    assert not page.is_visible("#left-out")


def test_the_report_says_what_it_has_left_out(
    page: Any, hostile_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "MAX_DETAIL_BYTES", 0)
    write_report([hostile_run], tmp_path / "report.html")
    address = (tmp_path / "report.html").as_uri()
    open_view(page, address, "problems")
    assert "rollouts of 0 of 20 problems; 0 of 1 reflections" in page.inner_text("#left-out")
    page.click(".cell >> nth=3")
    assert "This file holds a sample" in page.inner_text("dialog[open]")
    page.keyboard.press("Escape")
    open_view(page, address, "templates")
    page.click("text=What reflection saw")
    assert "This file holds a sample" in page.inner_text("dialog[open]")


def assert_views_show_foreign_text_as_text(page: Any, address: str) -> None:
    for view in VIEWS:
        open_view(page, address, view)
        assert page.evaluate("document.querySelectorAll('#content img, #content b, #content [onload]').length") == 0
    assert HOSTILE in page.inner_text("#content")  # the warning
    open_view(page, address, "overview")
    page.wait_for_selector("section[aria-label=Training] canvas")
    page.click("section[aria-label=Training] summary >> nth=0")
    table = page.locator("section[aria-label=Training] details[open] >> nth=0")
    table.locator("tbody th").first.wait_for()  # the numbers are written when the table has opened
    assert table.locator("tbody th").all_inner_texts() == ["1", "2", "3"]
    assert table.locator("td").all_inner_texts() == ["10.0 %", "20.0 %", "30.0 %"]
    assert page.inner_text("section[aria-label=Examples] pre >> nth=0") == HOSTILE
    assert HOSTILE in page.inner_text("section[aria-label='Evolution rounds']")
    open_view(page, address, "templates")
    assert page.inner_text("article pre") == HOSTILE
    assert page.inner_text("section[aria-label='Published templates'] pre") == HOSTILE
    page.click("text=What reflection saw")
    page.wait_for_selector("dialog[open]")
    shown = [
        HOSTILE,
        f"Improve {HOSTILE}",
        f"Well: {HOSTILE}",
        HOSTILE,
    ]  # template, message, reply, the parent's response
    assert page.locator("dialog pre").all_inner_texts() == shown
    page.keyboard.press("Escape")
    open_view(page, address, "engines")
    assert page.locator("tbody td").all_inner_texts()[0:4] == ["7", "2", "25 %", "9.5"]
    open_view(page, address, "problems")
    page.click(".cell >> nth=3")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("dialog pre >> nth=0") == HOSTILE
    assert page.locator("dialog article").count() == 2
    assert_tokens_tell_their_numbers(page)
    assert page.evaluate("window.hacked") is None


def assert_tokens_tell_their_numbers(page: Any) -> None:
    page.locator("dialog summary").first.scroll_into_view_if_needed()
    tokens = page.locator("dialog .tokens")
    assert tokens.inner_text() == HOSTILE, "the parts and the rest are the response"
    spans = tokens.locator("span")
    assert spans.all_inner_texts() == [HOSTILE[:9], HOSTILE[9:15], HOSTILE[15:25]]
    told: list[str] = []
    for number in range(3):
        spans.nth(number).hover()
        text, _, numbers = page.inner_text("dialog .numbers").partition(": ")
        assert json.loads(text) == spans.nth(number).inner_text()
        told.append(numbers)
    assert told == TOKEN_NUMBERS
    assert [spans.nth(number).get_attribute("class") for number in range(3)] == ["dropped", None, None]


def test_the_page_grows_with_the_run_and_says_when_the_run_is_gone(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "curves")
        page.wait_for_selector('[data-metric="rollout/reward_mean"] canvas')
        areas = page.locator("section > h2").all_inner_texts()
        assert areas[0] == "rollout" and areas[1:] == sorted(areas[1:]), "what a run is watched for comes first"
        assert page.inner_text("#status") == "step 3"
        with (hostile_run / "metrics.jsonl").open("a") as file:
            file.write(step_line(4, 0.4) + '{"step": 5, "torn')
        page.wait_for_selector("#status:text-is('step 4')")
        hostile_run.rename(hostile_run.with_name("gone"))
        page.wait_for_selector("#damages:has-text('is gone')")


def test_the_page_says_when_the_server_has_ended(browser: Any, hostile_run: Path) -> None:
    page, other = new_page(browser), new_page(browser)
    with served(other, hostile_run) as address:
        open_view(page, address, "overview")
    page.wait_for_selector("#status:has-text('Not up to date')")
    page.close()
    other.close()


def test_it_can_be_used_by_keyboard_and_on_a_phone(browser: Any, hostile_run: Path) -> None:
    phone = new_page(browser, viewport={"width": 360, "height": 740}, color_scheme="dark")
    with served(phone, hostile_run) as address:
        for view in VIEWS:
            open_view(phone, address, view)
            assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        open_view(phone, address, "overview")
        phone.keyboard.press("Tab")
        phone.keyboard.press("Tab")
        for _ in range(4):
            phone.keyboard.press("Tab")
        phone.keyboard.press("Enter")
        phone.wait_for_selector('nav a[aria-current="page"][href="#problems/0"]')
        phone.focus(".cell >> nth=0")
        phone.keyboard.press("Enter")
        phone.wait_for_selector("dialog[open]")
        phone.keyboard.press("Escape")
        phone.wait_for_selector("dialog:not([open])", state="attached")
    phone.close()


def focused_numbers(page: Any) -> str:
    """Return what the line below the tokens says of the focused one."""
    text, _, numbers = page.inner_text("dialog .numbers").partition(": ")
    assert json.loads(text) == page.evaluate("document.activeElement.textContent")
    return numbers


def test_numbers_of_tokens_are_reached_by_keyboard(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "problems")
        page.click(".cell >> nth=3")
        page.locator("dialog summary").first.scroll_into_view_if_needed()
        page.wait_for_selector("dialog[open] .tokens")
        assert page.locator("dialog .tokens span[tabindex='0']").count() == 1, "one stop of the Tab key"
        page.focus("dialog summary >> nth=0")  # the template, which stands before the tokens
        page.keyboard.press("Tab")
        told = [focused_numbers(page)]
        for _ in range(2):
            page.keyboard.press("ArrowRight")
            told.append(focused_numbers(page))
        assert told == TOKEN_NUMBERS
        page.keyboard.press("ArrowRight")
        assert focused_numbers(page) == TOKEN_NUMBERS[2], "there is no further one"
        page.keyboard.press("Home")
        assert focused_numbers(page) == TOKEN_NUMBERS[0]
        page.keyboard.press("Tab")
        assert not page.evaluate("document.activeElement.closest('.tokens')"), "the next Tab leaves them"


def test_numbers_of_tokens_are_shown_by_a_tap(browser: Any, hostile_run: Path) -> None:
    phone = new_page(browser, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    with served(phone, hostile_run) as address:
        open_view(phone, address, "problems")
        phone.tap(".cell >> nth=3")
        phone.locator("dialog summary").first.scroll_into_view_if_needed()  # its template, above the response
        phone.wait_for_selector("dialog[open] .tokens")
        phone.tap("dialog .tokens span >> nth=1")
        assert focused_numbers(phone) == TOKEN_NUMBERS[1]
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    phone.close()


def test_the_cells_of_a_problem_are_its_epochs_and_open_all_that_was_asked_in_them(
    page: Any, hostile_run: Path
) -> None:
    late = [{**rollout(f"{HOSTILE}-0", False), "question": "late"}]
    for step in (2, 3):
        path = hostile_run / "rollouts" / f"step-{step:06d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in late * step))
    with served(page, hostile_run) as address:
        open_view(page, address, "problems")
        assert page.locator(".heat thead th").all_inner_texts() == ["problem", "0", "2"], "epochs, not times"
        first = page.locator(".heat tbody tr >> nth=0")
        labels = [
            str(cell.get_attribute("aria-label"))[len(f"{HOSTILE}-0, ") :] for cell in first.locator(".cell").all()
        ]
        assert labels == [
            "epoch 0, steps 1, 2: plain 1 of 2, templated 2 of 2",
            "epoch 2, step 3: plain 0 of 1, templated 1 of 1",
        ]
        second = page.locator(".heat tbody tr >> nth=1")
        assert second.locator("td").count() == 2 and second.locator(".cell").count() == 1
        page.focus(".heat tbody tr:nth-child(1) .cell >> nth=0")
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open] article")
        assert page.locator("dialog h3:text-matches('^Step')").all_inner_texts() == ["Step 2", "Step 1"]
        assert page.locator("dialog article").count() == 4, "two of each step"
        page.select_option("dialog select", label="epoch 2, step 3")
        page.wait_for_selector("dialog h3:text-is('Step 3')")
        assert page.locator("dialog article").count() == 3
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.ariaLabel").startswith(f"{HOSTILE}-1, epoch 0")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.textContent") == f"{HOSTILE}-0"


def test_what_is_typed_while_the_page_is_drawn_anew_is_searched_for(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "problems")
        assert page.locator(".heat tbody tr").count() > 1
        page.focus("[data-key=find]")
        page.keyboard.type("-19")
        page.evaluate("document.querySelector('[data-key=find]').dataset.old = ''; refresh(true)")
        page.wait_for_selector("[data-key=find]:not([data-old])")
        assert page.input_value("[data-key=find]") == "-19"
        page.keyboard.press("Enter")
        page.wait_for_selector(".heat tbody tr:only-child")


def test_only_what_is_looked_at_is_asked_for_and_taken_apart(page: Any, hostile_run: Path) -> None:
    num_rollouts = 60
    lines = [rollout(f"{HOSTILE}-0", True)] * num_rollouts
    (hostile_run / "rollouts" / "step-000003.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/problem?" in request.url else None)
    with served(page, hostile_run) as address:
        open_view(page, address, "problems")
        page.click(".cell >> nth=1")
        page.wait_for_selector("dialog[open] .tokens")
        assert len(asked) == 1 and asked[0].endswith("&steps=3")
        assert page.locator("dialog article").count() == num_rollouts
        assert page.locator("dialog .tokens").count() < num_rollouts / 2, "those in sight, and a few below"
        page.locator("dialog article").last.scroll_into_view_if_needed()
        page.wait_for_selector("dialog article:last-child .tokens")


def test_a_running_round_shows_budget_lineages_and_price_and_grows(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "templates")
        text = page.inner_text("#content")
        assert "Budget: 2 of 8 rollouts spent" in text
        assert page.evaluate("[document.querySelector('progress').value, document.querySelector('progress').max]") == [
            2,
            8,
        ]
        assert "Lineages at work: 1. The other 2 of 3 wait" in text
        rows = page.locator("[aria-label='Lineages at work'] tbody tr")
        assert rows.all_inner_texts() == ["1\t1\treflection writes\t"]
        assert "Price: 0.375 at step 3" in text
        assert "Line: 0 (0) → 1 (0.5)" in text
        page.focus("[data-key='candidate 1']")
        page.click("summary:has-text('Price')")
        page.focus("[data-key='candidate 1']")
        trial = Trial(reward=1.0, response_text="", finish_reason="stop", num_tokens=3, weight_version=1)
        with Journal(hostile_run / "evolution" / "journal-0000.jsonl") as journal:
            history = RoundHistory(journal.records, journal.append, "fingerprint")
            history.add(Scored(template=template_digest(HOSTILE), problem_id="b", occasion="", trial=trial))
        page.wait_for_selector("text=Budget: 3 of 8 rollouts spent")
        assert page.evaluate("document.activeElement.dataset.key") == "candidate 1", "the focus stays where it was"
        assert page.locator("details[data-key='price'][open]").count() == 1, "and so does what was folded out"


def test_the_timeline_has_steps_phases_and_the_round_beside_them(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "steps")
        moments = page.locator(".timeline .moment")
        told = [str(moment.get_attribute("aria-label")) for moment in moments.all()]
        assert told == [
            "step 1: 00:00:01 to 00:00:04, 3 s; rollout 2 s, train 1 s",
            "step 2: 00:00:05 to 00:00:08, 3 s; rollout 2 s, train 1 s",
            "step 3: 00:00:09 to 00:00:12, 3 s; rollout 2 s, train 1 s",
            "round 0: 00:00:04 has not ended; beside steps 2 to 3",
        ]
        boxes = [moment.bounding_box() for moment in moments.all()]
        first, second, third, of_round = boxes
        apart = second["x"] - first["x"]
        assert apart == pytest.approx(4 / 3 * first["width"], abs=2), "as far apart as their times, within two pixels"
        assert third["x"] - second["x"] == pytest.approx(apart, abs=2)
        assert of_round["x"] == pytest.approx(first["x"] + 3.5 / 4 * apart, abs=2), "it began at 4.5 s"
        assert of_round["x"] + of_round["width"] == pytest.approx(third["x"] + third["width"], abs=2)
        phase = page.locator(".timeline .moment >> nth=0 >> i >> nth=0").bounding_box()
        assert phase["width"] == pytest.approx(2 / 3 * first["width"], abs=2)
        assert [text[-8:] for text in page.locator(".tick").all_inner_texts()[:2]] == ["00:00:02", "00:00:04"]
        moments.nth(0).focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.inner_text(".numbers") == told[3]


def test_memory_is_shown_by_kind_peak_and_process(page: Any, hostile_run: Path) -> None:
    with served(page, hostile_run) as address:
        open_view(page, address, "memory")
        kinds = page.locator("[aria-label='Memory by kind of process'] tbody tr").all_inner_texts()
        assert [row.split("\t")[:3] for row in kinds] == [["ranks", "3 GiB", "3 GiB"]]
        processes = page.locator("[aria-label='Memory by process'] tbody tr").all_inner_texts()
        assert processes == ["rank 0\t3 GiB\t3 GiB"]
        titles = page.locator("figure h3").all_inner_texts()
        assert titles == [
            "Host memory by kind, GiB",
            "Peak of rank 0 by phase, host memory, GiB",
            "Host memory by rank, GiB",
        ]
        page.wait_for_selector("figure canvas")


def test_it_follows_a_real_run(page: Any, tiny: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join((tiny / "problems" / "train.jsonl").read_text().splitlines(keepends=True)[:24]))
    (tmp_path / "held.py").write_text(HELD_REWARD.format(folder=str(tmp_path)))
    settings = [
        *(f"run.directory={tmp_path}", "run.name=run", f"model.path={tiny}/model", f"data.train={train}"),
        *(f"grading.function={tmp_path}/held.py:reward", f"grading.timeout_s={RUN_TIMEOUT_S}"),
        f"data.evaluation.heldout_easy={tiny}/problems/heldout_easy.jsonl",
        f"data.evaluation.heldout_hard={tiny}/problems/heldout_hard.jsonl",
        *("schedule.problems_per_step=8", "schedule.problems_per_update=8", "schedule.epochs=1"),
        *("evaluation.every_steps=0", "evaluation.at_start=false", "evaluation.with_best_template=false"),
    ]
    command = [sys.executable, "-m", "megatron_p2o.cli", "train", str(ROOT / "examples" / "tiny_cpu" / "grpo_n6.yaml")]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    with (tmp_path / "log").open("w") as log:
        training = subprocess.Popen([*command, *sets], stdout=log, stderr=log, env={**os.environ, "COLUMNS": "100"})
        try:
            wait_for(tmp_path / "run" / "config.yaml", training, tmp_path / "log")
            with served(page, tmp_path / "run") as address:
                open_view(page, address, "steps")
                page.wait_for_selector("#content span:text-is('step 2')", timeout=1000 * RUN_TIMEOUT_S)
                assert training.poll() is None, "the page was to be seen while the run goes on"
                open_view(page, address, "problems")
                page.click(".cell >> nth=0")
                page.wait_for_selector("dialog[open] article")
                (tmp_path / "seen").touch()
                assert training.wait(timeout=RUN_TIMEOUT_S) == 0, (tmp_path / "log").read_text()
                page.keyboard.press("Escape")
                page.wait_for_selector("#status:text-is('finished')")
        finally:
            training.kill()


def wait_for(path: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    while not path.exists():
        assert process.poll() is None, log.read_text()
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
