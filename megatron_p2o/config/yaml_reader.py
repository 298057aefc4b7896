"""The YAML of settings files: version 1.2's plain values, of bounded size.

PyYAML follows version 1.1, where `0100` is 64, `1:30` is 90, `no` is false and `1e-6` is text. Here numbers are
decimal, `true` and `false` are the only booleans, and everything else is text.
"""

import re
from typing import Any, ClassVar

import yaml

MAX_BYTES = 2**20
"""Largest settings file. Settings take a few kilobytes."""

MAX_DEPTH = 32
"""Deepest nesting of mappings and lists."""

MAX_NODES = 100_000
"""Values of a document, each alias counted as all that it stands for."""

NULL = "tag:yaml.org,2002:null"

PLAIN_VALUES = (
    (NULL, r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Tag, form and first characters ("" is written as a zero byte) of what an unquoted value is taken for if not text."""


UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What no setting needs, and file names, terminals or UTF-8 cannot take: an escape of a quoted text makes it."""


class YamlError(ValueError):
    """A document that cannot be read; the message says why, `line` where (from 1; None when it is not known)."""

    def __init__(self, sentence: str, line: int | None = None) -> None:
        super().__init__(sentence)
        self.line = line


class SettingsLoader(yaml.SafeLoader):
    """Reads one document. Knows no tags but those of mappings, lists, text and plain values."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. Refuses one that is too deep, or too large with its aliases expanded."""
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if self._depth == MAX_DEPTH:
            raise YamlError(f"mappings and lists may be {MAX_DEPTH} deep: write it flatter", line)
        num_before = self._num_nodes
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and (found := UNPRINTABLE.search(node.value)):
            raise YamlError(f"the text holds the control character U+{ord(found[0]):04X}: remove it", line)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise YamlError(f"*{event.anchor} is an alias of a value that contains it: write the value out", line)
            self._num_nodes += self._sizes[id(node)]
        else:
            self._num_nodes += 1
            self._sizes[id(node)] = self._num_nodes - num_before
        if self._num_nodes > MAX_NODES:
            raise YamlError(f"the file holds more than {MAX_NODES} values, aliases written out: shorten it", line)
        return node


class SettingsDumper(yaml.SafeDumper):
    """Writes what `SettingsLoader` reads back equal. Quotes what YAML 1.1 would not take for text either."""


def parse_yaml(text: str) -> tuple[SettingsLoader, yaml.Node | None]:
    """Return the root of the only document in `text`, None for an empty one, and what constructs its values.

    Raises:
        YamlError: it is no YAML, or too deep or large.
    """
    try:
        loader = SettingsLoader(text)
        return loader, loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"YAML allows no character U+{ord(text[error.position]):04X}: remove it", line) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise YamlError(f"YAML syntax: {error.problem or error}", line) from error


def construct(loader: SettingsLoader, node: yaml.Node) -> object:
    """Return the value of a node.

    Raises:
        ValueError: it has an unknown tag, or does not fit its tag.
    """
    try:
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise ValueError(error.problem or str(error)) from error


def load_yaml(text: str) -> object:
    """Return what a document holds; None for an empty one.

    Raises:
        ValueError: it cannot be read.
    """
    loader, root = parse_yaml(text)
    return None if root is None else construct(loader, root)


def dump_yaml(settings: object) -> str:
    """Return a document that `parse_yaml` reads back equal."""
    return yaml.dump(settings, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)


def _int(loader: SettingsLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: SettingsLoader, node: yaml.ScalarNode) -> float:
    # .inf and .nan are the names of YAML, inf and nan those of Python.
    return float(re.sub(r"\.(?=inf|nan)", "", loader.construct_scalar(node).lower()))


for _tag, _form, _first in PLAIN_VALUES:
    _firsts = ["" if _character == "\0" else _character for _character in _first]
    for _class in (SettingsLoader, SettingsDumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_form})$"), _firsts)

SettingsLoader.yaml_constructors |= {"tag:yaml.org,2002:int": _int, "tag:yaml.org,2002:float": _float}
for _tag in (*(f"tag:yaml.org,2002:{_name}" for _name in ("null", "bool", "str", "seq", "map")), None):
    SettingsLoader.yaml_constructors[_tag] = yaml.SafeLoader.yaml_constructors[_tag]
