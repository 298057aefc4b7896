"""Write the measured results into kernels/README.md, between the markers of each device.

    python kernels/bench/tables.py

Only what lies in `results/*.json` is written, file by file; a file's name begins with the marker it belongs to.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
MARKERS = ("gpu", "cpu")


def main() -> None:
    text = README.read_text()
    for marker in MARKERS:
        tables = [table(json.loads(file.read_text())) for file in result_files(marker)]
        if tables:
            head, start, rest = text.partition(f"<!-- results: {marker} -->\n")
            _, end, tail = rest.partition("<!-- end of results -->")
            text = head + start + "\n\n".join(tables) + "\n" + end + tail
    README.write_text(text)


def result_files(marker: str) -> list[Path]:
    """Return the committed results of a device kind, in a stable order."""
    return sorted((FOLDER / "results").glob(f"{marker}_*.json"))


def table(result: dict[str, Any]) -> str:
    """Return a heading line that says where and how it was measured, and the rows."""
    environment = dict(result["environment"])
    origin = f"{environment.pop('device')}, {environment.pop('clock')}, commit {environment.pop('commit')}"
    versions = ", ".join(f"{name} {version}" for name, version in environment.items() if version != "not installed")
    lines = [f"`{result['op']}`, {_size(result)}median of {result['repeats']}; {origin}; {versions}.", ""]
    if result.get("note"):
        lines += [result["note"], ""]
    columns = [name for name in result["rows"][0] if name != "errors"]
    lines += ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in result["rows"]]
    return "\n".join(lines)


def _size(result: dict[str, Any]) -> str:
    if "shape" not in result:
        return ""
    shape = result["shape"]
    ceiling = f"plain product {result['matmul_tflops']:.3g} TFLOP/s"
    return f"V = {shape['vocab_size']:,}, D = {shape['hidden_size']:,}, {ceiling}, "


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
