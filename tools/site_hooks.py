"""A hook of mkdocs: the site holds docs/ alone, so that a link to another file of the repository becomes its name."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
"""A link to a file above docs/."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with the names of files instead of links that the site cannot follow."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}` in the repository)", markdown)
