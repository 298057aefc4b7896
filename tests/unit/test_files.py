import os
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import pytest

from megatron_p2o import files
from megatron_p2o.files import FileDigest, digest_of, digests_of, json_digest


def test_json_digest_is_that_of_the_text_with_sorted_names() -> None:
    content = {"b": [1, None], "a": "ü"}
    assert json_digest(content) == sha256(b'{"a": "\\u00fc", "b": [1, null]}').hexdigest()
    assert json_digest(content, is_compact=True) == sha256(b'{"a":"\\u00fc","b":[1,null]}').hexdigest()


def test_files_are_hashed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ba":
        (tmp_path / name).write_text(name)
    both = Barrier(2, timeout=60)

    def waiting(path: Path) -> FileDigest:
        both.wait()  # raises where the other one is not being hashed
        return digest_of(path)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(files, "digest_of", waiting)
    digests = digests_of([tmp_path / "b", tmp_path / "a"])
    assert [(name, digest.sha256) for name, digest in digests.items()] == [
        ("b", sha256(b"b").hexdigest()),
        ("a", sha256(b"a").hexdigest()),
    ]
