"""What Python tests check, and which names of an answer they may see: read from the tests alone."""

import ast
import builtins
from collections.abc import Iterable, Sequence

BUILT_INS = frozenset(dir(builtins))

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
QUIET = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
"""Statements that decide nothing about an answer."""


def checks_something(code: str, entry_point: str | None) -> bool:
    """Return whether running a test can fail an answer: code that only defines or imports passes every answer.

    A `check` that the code defines is run where `entry_point` names the function it gets.

    Raises:
        ValueError: it is no Python code.
    """
    statements = _parsed(code).body
    defined = [statement.name for statement in statements if isinstance(statement, DEFINITIONS)]
    if entry_point and "check" in defined:
        return True
    return any(_decides(statement) for statement in statements)


def _decides(statement: ast.stmt) -> bool:
    if isinstance(statement, QUIET):
        return False
    inner = list(ast.walk(statement))
    is_for_programs = isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )
    return not is_for_programs and any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in inner)


def names_for_tests(names: Iterable[object], tests: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return those of an answer's names that its tests see: never a built-in which the tests use for themselves.

    An `abs` or `all` of the answer's own would decide `assert abs(f(2) - 4) < 1e-6`. Tests that call nothing else (MBPP
    has `assert sum(10, 15) == 6`) want the answer's.

    Args:
        tests: code and entry point of each.
    """
    wanted: set[str] = set()
    for code, entry_point in tests:
        wanted |= _free_names(code) | ({entry_point} if entry_point else set())
    entry_points = {entry_point for _, entry_point in tests if entry_point}
    hidden = BUILT_INS - entry_points if wanted - BUILT_INS or entry_points else frozenset[str]()
    return [name for name in names if isinstance(name, str) and name.isidentifier() and name not in hidden]


def _free_names(code: str) -> set[str]:
    """Return the names that code reads and does not bind."""
    nodes = list(ast.walk(_parsed(code)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    bound |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return read - bound


def _parsed(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"a test is no Python code ({type(error).__name__}: {error})") from error
