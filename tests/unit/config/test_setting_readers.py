"""Every setting has a reader: its own section is asked for it, not another that has a setting of the same name."""

import ast
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import megatron_p2o
from megatron_p2o.config.sections.data import OF_TASK
from megatron_p2o.config.tree import Config

PACKAGE = Path(megatron_p2o.__file__).parent
RECORDS = {PACKAGE / "config" / "tree.py", *(PACKAGE / "config" / "sections").glob("*.py")}

Setting = tuple[str, str]
"""Name of a section's class, and of its field."""


def sections_in(kind: object) -> set[type]:
    """Return the classes of sections that an annotation holds, also below `|` and `Mapping`."""
    if isinstance(kind, type) and is_dataclass(kind):
        return {kind}
    return {each for part in typing.get_args(kind) for each in sections_in(part)}


def fields_by_class(section: type = Config) -> dict[str, dict[str, set[str]]]:
    """Return the fields of all section classes, each with the classes that it leads to."""
    hints = typing.get_type_hints(section)
    below = {each for field in fields(section) for each in sections_in(hints[field.name])}
    own = {field.name: {each.__name__ for each in sections_in(hints[field.name])} for field in fields(section)}
    return {section.__name__: own} | {name: entry for each in below for name, entry in fields_by_class(each).items()}


FIELDS = fields_by_class()


def annotated(annotation: ast.expr | None) -> set[str]:
    """Return the classes of sections that an annotation names."""
    return FIELDS.keys() & {
        part.id for part in ast.walk(annotation or ast.Constant(None)) if isinstance(part, ast.Name)
    }


def handed_on(trees: Iterable[ast.Module]) -> dict[str, set[str]]:
    """Return the sections that fields and methods of the package's own records lead to, by their name."""
    found: dict[str, set[str]] = defaultdict(set)
    for part in (
        part for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body
    ):
        match part:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) | ast.FunctionDef(name=name, returns=kind):
                found[name] |= annotated(kind)
            case _:
                pass
    return found


class Module:
    """Knows which names of a module hold sections: by annotation, assignment, or a loop over one."""

    def __init__(self, tree: ast.Module, of_records: dict[str, set[str]]) -> None:
        self.nodes, self.of_records = list(ast.walk(tree)), of_records
        self.held: dict[str, set[str]] = defaultdict(set)
        for node in self.nodes:
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
                name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target).removeprefix("self.")
                self.held[name] |= annotated(node.annotation)
            if isinstance(node, ast.Lambda):  # its parameters have no annotations: they are called like the section
                for argument in node.args.args:
                    self.held[argument.arg] |= FIELDS["Config"].get(argument.arg, set())
            if isinstance(node, ast.ClassDef) and node.name in FIELDS:
                self.held["self"].add(node.name)
        while self._bind():
            pass

    def reads(self) -> Iterator[Setting]:
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                yield from ((name, node.attr) for name in self.sections(node.value) if node.attr in FIELDS[name])

    def sections(self, node: ast.expr) -> set[str]:
        """Return the classes that an expression may be of, or hold."""
        match node:
            case ast.Name(id=name):
                return self.held[name]
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self.held:
                return self.held[name]
            case ast.Attribute(value=value, attr="values" | "items" | "get"):
                return self.sections(value)
            case ast.Attribute(value=value, attr=name):
                found = {found for section in self.sections(value) for found in FIELDS[section].get(name, ())}
                return found or self.of_records.get(name, set())
            case ast.Call(func=function):
                return self.sections(function)
            case ast.Subscript(value=value):
                return self.sections(value)
            case ast.BoolOp(values=options) | ast.Tuple(elts=options):
                return set().union(*map(self.sections, options))
            case ast.IfExp(body=body, orelse=other):
                return self.sections(body) | self.sections(other)
            case _:
                return set()

    def _bind(self) -> bool:
        before = sum(map(len, self.held.values()))
        for node in self.nodes:
            match node:
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    for target, value in zip(targets, values, strict=True):
                        self._hold(target, value)
                case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                    self._hold(target, value)
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    self._hold(target, value)
                case _:
                    pass
        return sum(map(len, self.held.values())) > before

    def _hold(self, target: ast.expr, value: ast.expr) -> None:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            name, found = ast.unparse(one), self.sections(value)
            self.held[name.removeprefix("self.")] |= found
            if found and name.startswith("self."):
                self.of_records.setdefault(name.removeprefix("self."), set()).update(found)


def test_every_setting_is_read_somewhere() -> None:
    trees = [
        ast.parse(source.read_text("utf-8"))
        for source in PACKAGE.rglob("*.py")
        # What the records of settings derive from them counts, a rule about them does not.
        if source in RECORDS or not {"config", "testing"} & set(source.relative_to(PACKAGE).parts)
    ]
    of_records = handed_on(trees)
    modules = [Module(tree, of_records) for tree in trees]
    read = {found for module in modules for found in module.reads()}
    read |= {("TaskConfig", name) for name in OF_TASK}  # `DataConfig.of_task` takes them by name
    unread = {(section, name) for section, own in FIELDS.items() for name in own} - read
    # The preset has done its work once the settings are read.
    assert unread == {("Config", "preset")}
