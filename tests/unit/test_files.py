from hashlib import sha256

from megatron_p2o.files import json_digest


def test_json_digest_is_that_of_the_text_with_sorted_names() -> None:
    content = {"b": [1, None], "a": "ü"}
    assert json_digest(content) == sha256(b'{"a": "\\u00fc", "b": [1, null]}').hexdigest()
    assert json_digest(content, is_compact=True) == sha256(b'{"a":"\\u00fc","b":[1,null]}').hexdigest()
