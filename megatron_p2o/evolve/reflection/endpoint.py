"""Where the settings say that the reflecting model is."""

from urllib.parse import urlsplit

from megatron_p2o.config.tree import ReflectionConfig


def endpoint_of(config: ReflectionConfig) -> tuple[str, str]:
    """Return (base url, model). Raises `ValueError` when one is not named, or the first is no address."""
    if not config.base_url or not config.model:
        raise ValueError(
            f"evolution.reflection.backend={config.backend} needs evolution.reflection.base_url and .model"
        )
    try:
        address = urlsplit(config.base_url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # such as a port that is no number
        is_address = False
    if not is_address:
        raise ValueError(
            f"evolution.reflection.base_url={config.base_url!r} must be an address such as https://host/v1"
        )
    return config.base_url, config.model
