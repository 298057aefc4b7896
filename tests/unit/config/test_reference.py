"""`docs/settings.md` and the docstrings that it is made of."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from megatron_p2o.config.reference import docstrings_of, settings_page
from megatron_p2o.config.tree import Config

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def sections(section: type) -> list[type]:
    """Return a section of the tree and all below it."""
    below = [kind for kind in get_type_hints(section).values() if isinstance(kind, type) and is_dataclass(kind)]
    return [section, *(found for kind in below for found in sections(kind))]


def rows() -> dict[str, list[str]]:
    """Return the cells behind each setting's name."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in settings_page().splitlines()]
    return {name.strip("`"): cells for name, *cells in lines if name.startswith("`")}


def test_the_page_of_settings_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), (
        "renew it: python -m megatron_p2o.config.reference > docs/settings.md"
    )


@pytest.mark.parametrize("section", sections(Config), ids=lambda section: section.__name__)
def test_every_setting_has_a_docstring_that_stands_alone(section: type) -> None:
    found = docstrings_of(section)
    assert list(found) == [field.name for field in fields(section)]
    for name, text in found.items():
        assert text, f"{section.__name__}.{name} has no docstring"
        assert text[0].isupper() and text.endswith("."), f"{section.__name__}.{name}: {text}"
        assert not text.startswith("Of "), f"{section.__name__}.{name} begins with a fragment: {text}"


def test_a_row_states_type_default_range_unit_and_meaning() -> None:
    found = rows()
    assert found["optimizer.beta1"][:4] == ["number", "`0.9`", "≥ 0, < 1", ""]
    assert found["rollout.top_p"][2] == "1"
    assert found["rollout.request_timeout_s"][:4] == ["number", "`3600`", "> 0, ≤ 2000000", "seconds"]
    assert found["schedule.max_steps"][:4] == ["integer or null", "`null`", "≥ 1", "steps"]
    assert found["data.train"][:2] == ["records by name", "none"]
    assert found["data.train.NAME.grading"][:2] == ["null, or a section like `grading`", "`null`"]
    assert found["logprobs.importance_cap"][:3] == ["number or null", "`null`", "≥ 1"]
    assert found["hard.counted"][:2] == ["one of `plain`, `all`", "`plain`; reference: `all`"]
    assert found["evolution.budget"][:2] == ["integer", "`72`"]
    assert (
        found["evolution.budget"][2].startswith("≥ 1, `light` = 6, ")
        and "`heavy_4` = 72" in found["evolution.budget"][2]
    )
    assert found["sglang"][:2] == ["mapping of names to anything", "`{}`"]
    assert found["evolution.reflection.phrases"][4].startswith("File of the `phrasebook` backend")
