"""Addresses of endpoints. Imports no client."""

from urllib.parse import urlsplit


def checked_address(base_url: str, settings: str) -> str:
    """Return `base_url`, which the settings of the dotted name `settings` give. Raises `ValueError` if it is none."""
    try:
        address = urlsplit(base_url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # such as a port that is no number
        is_address = False
    if not is_address:
        raise ValueError(f"{settings}.base_url={base_url!r} must be an address such as https://host/v1")
    return base_url
