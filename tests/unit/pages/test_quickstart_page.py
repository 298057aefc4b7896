"""What docs/quickstart.md says of the output is what runs print."""

import re
from pathlib import Path

from megatron_p2o.metrics.console import COLUMNS, SILENT_AT_ZERO

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def test_every_number_of_a_line_is_explained() -> None:
    table = PAGE.partition("| in the line |")[2].partition("\n\n")[0]
    explained = {label for row in table.splitlines() for label in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert {label for label, key, _ in COLUMNS if key not in SILENT_AT_ZERO} <= explained


def test_the_arms_are_those_of_the_script() -> None:
    script = (ROOT / "examples" / "tiny_cpu" / "compare.sh").read_text(encoding="utf-8")
    arms = re.findall(r"^arms=\"(.*)\"$", script, flags=re.MULTILINE)
    assert arms == ["grpo_n6 grpo_n12 p2o"] and "GRPO with 6 rollouts a problem, GRPO with 12, P2O with 6" in PAGE
