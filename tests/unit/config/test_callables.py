"""How a name in the settings leads to a callable."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.callables import CallableKind, check_call, is_own, load_callable

KIND = CallableKind(parameters=("x",), built_in={"root": "math:sqrt"}, entry_points="megatron_p2o.tests")
SUBJECT = "section.setting=name"


def load(name: str, kind: CallableKind = KIND) -> Callable[..., Any]:
    return load_callable(name, kind, SUBJECT)


def refusal(name: str, kind: CallableKind = KIND) -> str:
    with pytest.raises(ValueError) as refused:
        load(name, kind)
    assert str(refused.value).startswith(f"{SUBJECT} ")
    return str(refused.value).removeprefix(f"{SUBJECT} ")


def test_a_callable_is_found_by_each_kind_of_name(
    tmp_path: Path, installed_package: Callable[[str, str, str], Path]
) -> None:
    installed_package("halves", "def half(x):\n    return x / 2\n", "[megatron_p2o.tests]\nhalf = halves:half\n")
    path = tmp_path / "thirds.py"
    path.write_text("class Thirds:\n    @staticmethod\n    def third(x):\n        return x / 3\n")
    assert load("root")(16) == 4
    assert load("half")(6) == 3
    assert load("halves:half")(8) == 4
    assert load(f"{path}:Thirds.third")(9) == 3


def test_a_file_sees_the_files_beside_it_and_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("NUMBER = 5\n")
    path = tmp_path / "mine.py"
    path.write_text("import beside_it\nCALLS = []\n\ndef five():\n    CALLS.append(1)\n    return beside_it.NUMBER\n")
    assert load(f"{path}:five")() == load(f"{path}:five")() == 5
    assert load(f"{path}:CALLS.copy")() == [1, 1]


def test_a_name_that_leads_nowhere_is_refused_with_what_there_is(
    installed_package: Callable[[str, str, str], Path],
) -> None:
    own = "package.module:callable or path/to/file.py:callable"
    where = f"{own} (packages add names by the entry points megatron_p2o.tests)"
    assert refusal("halve") == f"is none of root, nor {where}"
    installed_package("halves", "half = 0.5\n", "[megatron_p2o.tests]\nhalf = halves:half\n")
    assert refusal("halve") == f"is none of root, half, nor {where}"
    assert refusal("half") == "is float, and must be callable as (x)"
    assert refusal("halve", CallableKind(parameters=("x",))) == f"must be {own}"
    assert refusal("gone.py:f").startswith("cannot be imported (FileNotFoundError: ")
    assert refusal("math:sqrtt") == "cannot be imported (AttributeError: math has no sqrtt, did you mean sqrt?)"
    assert refusal("gone_package:f").startswith("cannot be imported (ModuleNotFoundError: ")


def test_only_a_place_and_an_attribute_name_a_callable() -> None:
    assert [is_own(name) for name in ("a:b", "a/b.py:c.d", "a", ":b", "a:", "")] == [True, True, *[False] * 4]


def test_a_call_is_checked_before_it_is_made() -> None:
    def scaled(x: float, factor: float = 2) -> float:
        return x * factor

    check_call(scaled, (1,), {"factor": 3}, subject=SUBJECT, rule="be callable as (x)")
    check_call(max, (), {}, subject=SUBJECT, rule="be any")  # does not tell its signature
    with pytest.raises(
        ValueError, match=r"^section\.setting=name has the signature .* and must be callable as \(x\) \(got"
    ):
        check_call(scaled, (1,), {"faktor": 3}, subject=SUBJECT, rule="be callable as (x)")
