"""A command's arguments, checked before Hydra takes them: a mistake is one line with a hint."""

from collections.abc import Iterator
from typing import Any

import hydra
from hydra.errors import (
    CompactHydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from nat_models.errors import ConfigError, did_you_mean


def check_overrides(config_dir: str, config_name: str, overrides: list[str]) -> None:
    """Compose a configuration, to see whether it can be.

    Args:
        config_dir: Folder of the configurations.
        config_name: The one to change.
        overrides: Its changes: KEY=VALUE, GROUP=CHOICE, ...

    Raises:
        ConfigError: It cannot; the message names the argument, and what may have been meant.
    """
    with hydra.initialize_config_dir(config_dir, version_base="1.3"):
        try:
            hydra.compose(config_name, overrides)
        except CompactHydraException as error:
            known = hydra.compose(config_name, return_hydra_config=True)
            raise ConfigError(_explain(error, overrides, known)) from error


def _explain(error: CompactHydraException, overrides: list[str], known: DictConfig) -> str:
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected KEY=VALUE, as Hydra's grammar has it"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={choice}: expected one of {', '.join(error.options)}"
    reason = str(error) or str(error.__cause__)
    given = max((o for o in overrides if o in reason), key=len, default=None)
    if given is None:
        return reason.splitlines()[0]
    if not _is_unknown(error):
        return f"{given}: {reason.splitlines()[0]}"
    own = OmegaConf.masked_copy(known, [str(key) for key in known if key != "hydra"])
    key = given.partition("=")[0]
    keys = {*known.hydra.runtime.choices, *_keys(OmegaConf.to_container(own))} - {key}
    return f"{given}: no such key{did_you_mean(key, sorted(keys))}"


def _is_unknown(error: CompactHydraException) -> bool:
    """Whether Hydra knows neither a key nor a group of that name."""
    cause = isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError)
    return cause or "No match in the defaults list" in str(error)


def _keys(values: Any, above: str = "") -> Iterator[str]:
    """All keys below one, with dots."""
    for key, value in values.items() if isinstance(values, dict) else ():
        yield f"{above}{key}"
        yield from _keys(value, f"{above}{key}.")
