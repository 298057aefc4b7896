"""Seeds that depend only on the purpose of the random numbers."""

import hashlib
import json


def seed_of(*purpose: str | int) -> int:
    """Return a seed in [0, 2**63) that depends on `purpose` only: the same in every process and on every machine.

    Different purposes give independent seeds; ("a", 1) and ("a1",) are different.
    """
    digest = hashlib.sha256(json.dumps(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
