"""Address and name of the reflection model, from the settings."""

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.endpoints.address import checked_address


def endpoint_of(config: ReflectionConfig) -> tuple[str, str]:
    """Return (base url, model). Raises `ValueError` when one is not named, or the first is no address."""
    if not config.base_url or not config.model:
        raise ValueError(
            f"evolution.reflection.backend={config.backend} needs evolution.reflection.base_url and .model"
        )
    return checked_address(config.base_url, "evolution.reflection"), config.model
