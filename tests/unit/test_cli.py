"""The command itself."""

import pytest

from megatron_p2o import __version__
from megatron_p2o.cli import main


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"p2o {__version__}\n"
