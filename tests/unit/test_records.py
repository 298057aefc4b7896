"""Records survive JSON as files of this and of earlier versions hold them, and what does not fit is named."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from megatron_p2o.records import from_json, from_tagged, from_text, to_json, to_tagged


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    name: str
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    number: int
    share: float
    parts: tuple[Inner, ...] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict[str, Inner])
    parent: int | None = None


WHOLE = Outer(
    number=1 << 70,
    share=0.1,
    parts=(Inner(name="b", seen=frozenset("zya")), Inner(name="é\ud800")),
    by_name={"z": Inner(name="1"), "a": Inner(name="2")},
)


def test_a_record_survives_its_text_with_lone_surrogates_and_numbers_that_are_none() -> None:
    assert from_text(Outer, json.dumps(to_json(WHOLE))) == WHOLE
    again = from_text(Outer, json.dumps(to_json(Outer(number=0, share=math.nan))))
    assert math.isnan(again.share)


def test_fields_and_keys_keep_their_order_unless_a_file_is_compared() -> None:
    assert list(to_json(WHOLE)) == ["number", "share", "parts", "by_name", "parent"]
    assert list(to_json(WHOLE)["by_name"]) == ["z", "a"]
    ordered = to_json(WHOLE, is_sorted=True)
    assert list(ordered["by_name"]) == ["a", "z"] and ordered["parts"][0]["seen"] == ["a", "y", "z"]


def test_a_whole_number_stands_for_a_fraction_and_a_missing_field_for_its_default() -> None:
    read = from_json(Outer, {"number": 1, "share": 1})
    assert read == Outer(number=1, share=1.0) and isinstance(read.share, float)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"number": "1"}, r"^Outer\.number: Expected `int`, got `str`$"),
        ({"number": True}, r"^Outer\.number: Expected `int`, got `bool`$"),
        ({"number": 1.5}, r"^Outer\.number: "),
        ({"share": True}, r"^Outer\.share: "),
        ({"parent": []}, r"^Outer\.parent: "),
        ({"parts": [{"name": "a"}, {"name": None}]}, r"^Outer\.parts\[1\]\.name: Expected `str`, got `null`$"),
        ({"parts": [{}]}, r"^Outer\.parts\[0\]: Object missing required field `name`$"),
        ({"more": 1}, "^Outer has no field more"),
        ({"parts": [{"name": "a"}, {"name": "a", "more": 1}]}, r"^Outer\.parts\[1\] has no field more"),
        ({"by_name": {"x": {"name": "a", "more": 1}}}, r"^Outer\.by_name\.x has no field more"),
    ],
)
def test_a_field_that_does_not_fit_is_named_by_its_path(change: Mapping[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_json(Outer, {"number": 1, "share": 0.5, **change})


def test_what_a_later_version_adds_can_be_passed_over() -> None:
    value = {"number": 1, "share": 0.5, "parts": [{"name": "a", "more": 1}], "more": 2}
    assert from_json(Outer, value, skips_unknown=True).parts == (Inner(name="a"),)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, b"\xff", "null"])
def test_text_that_is_no_record_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        from_text(Outer, text)


def test_a_tag_tells_which_record_it_is() -> None:
    kinds = {kind.__name__: kind for kind in (Inner, Outer)}
    assert to_tagged(WHOLE, "kind")["kind"] == "Outer"
    assert from_tagged(kinds, to_tagged(WHOLE, "kind"), "kind") == WHOLE
    for value in ({"kind": "Other"}, {"name": "a"}, [1], None, {"kind": ["Inner"]}):
        with pytest.raises(ValueError, match=r"^unknown kind: "):
            from_tagged(kinds, value, "kind")
