"""Recognises written forms: sets given by a condition, residues, functions by cases, matrices with a factor."""

import re
from fractions import Fraction
from itertools import pairwise

from megatron_p2o.rewards.math.reading.latex import split_at

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\d+/\d+")
_WITHOUT_POINTS = re.compile(r"\\mathbb ?\{?R\}?(?:\\setminus ?|\\backslash ?|-)\\\{([^{}\\]*)\\\}")
_SET_BUILDER = re.compile(
    r"\\\{(?P<unknown>[A-Za-z])(?:\\in ?\\mathbb ?\{?R\}?)?(?:\||:)(?P<condition>.*[^\\])\\\}", re.DOTALL
)
_RESIDUE = re.compile(r"(?:(?P<unknown>[A-Za-z](?:_\w)?)\\equiv ?)?(?P<value>-?\d{1,9})\\pmod\{(?P<modulus>\d{1,9})\}")
_CASES = re.compile(r"\\begin\{cases\}(.*)\\end\{cases\}", re.DOTALL)
_IF = re.compile(r"^,?(?:\\text\{ ?,?(?:if|for|when|where)(?: ([^{}]*))?\})?,?")
_MATRIX_WITH_FACTOR = re.compile(
    r"(?P<factor>[^&]+?)(?:\\cdot ?)?"
    r"(?P<begin>\\begin\{(?P<kind>[bp]?matrix)\})(?P<rows>.*)(?P<end>\\end\{(?P=kind)\})",
    re.DOTALL,
)


_TERM = re.compile(r"(?<=.)[+-]", re.DOTALL)


def simplified(text: str) -> str:
    r"""Return a set given by its condition as that condition, and the reals without some points as intervals."""
    builder = _SET_BUILDER.fullmatch(text)
    if builder and re.search(rf"(?<![\\A-Za-z]){builder['unknown']}(?![A-Za-z])", builder["condition"]):
        return builder["condition"]
    removed = _WITHOUT_POINTS.fullmatch(text)
    return reals_without(removed[1].split(",")) if removed else text


def reals_without(points: list[str]) -> str:
    """Return all real numbers but some as a union of intervals; several points have to be numbers."""
    if len(points) > 1:
        if not all(_NUMBER.fullmatch(point) for point in points):
            return ""
        points = sorted(points, key=Fraction)
    bounds = [r"-\infty", *points, r"\infty"]
    return r"\cup ".join(f"({lower},{upper})" for lower, upper in pairwise(bounds))


def residue(text: str) -> tuple[str, int, int] | None:
    r"""Return unknown, least remainder and modulus of `x\equiv 10\pmod{7}`; the unknown may be missing."""
    found = _RESIDUE.fullmatch(text)
    if found is None or int(found["modulus"]) == 0:
        return None
    return found["unknown"] or "", int(found["value"]) % int(found["modulus"]), int(found["modulus"])


def cases(text: str) -> list[tuple[str, str]] | None:
    """Return the values and conditions of a function by cases, None for anything else."""
    found = _CASES.fullmatch(text)
    if found is None:
        return None
    rows = [row.split("&") for row in found[1].strip().removesuffix(r"\\").split(r"\\")]
    if not all(len(row) == 2 for row in rows):
        return None
    return [
        (value.strip(" ,"), _IF.sub(lambda found: found[1] or "", condition.strip()).strip(" ,."))
        for value, condition in rows
    ]


def multiplied_matrix(text: str) -> str | None:
    """Return a matrix with a factor before it as the matrix of the products, None for anything else."""
    found = _MATRIX_WITH_FACTOR.fullmatch(text)
    if (
        found is None
        or len(split_at(found["factor"], _TERM)[0]) > 1
        or re.search(r"(?<![\\A-Za-z])[A-Z]", found["factor"])
    ):
        return None
    factor = "-1" if found["factor"] == "-" else found["factor"]
    rows = [
        [f"({factor})({entry})" for entry in row.split("&")] for row in found["rows"].removesuffix(r"\\").split(r"\\")
    ]
    return found["begin"] + r"\\".join("&".join(row) for row in rows) + found["end"]
