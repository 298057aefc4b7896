"""The documentation as a site: every page is in it, every link leads somewhere, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 300

LOADED = re.compile(r"""(?:src|href)=["'](?:https?:)?//[^"']+["']|url\((?:https?:)?//[^)]+\)""")
"""An address of another server, whether it is loaded or only linked."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pytest.importorskip("mkdocs", reason="mkdocs is not installed here: requirements/dev.txt names it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")} >= pages
    assert len(pages) > 15


def test_the_site_loads_nothing_from_other_servers(site: Path) -> None:
    tags = re.compile(r"<(?:script|link|img|iframe)\b[^>]*>")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert [tag for tag in tags.findall(text) if LOADED.search(tag)] == [], path


def test_links_out_of_the_documentation_became_names() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import site_hooks
    finally:
        sys.path.pop(0)
    page = "See [the kernels](../kernels/README.md#times), [metrics](metrics.md) and [there](https://x.org/../y)."
    assert site_hooks.on_page_markdown(page) == (
        "See the kernels (`kernels/README.md` in the repository), [metrics](metrics.md) and [there](https://x.org/../y)."
    )
