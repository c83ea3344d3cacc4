"""Bad input, told apart from faults of the program."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException


class ConfigError(ValueError):
    """A value of the configuration, or a file that it names, cannot be used."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Around all that comes before work starts: whatever goes wrong there is a ConfigError."""
    try:
        yield
    except InstantiationException as error:  # Hydra's wrapping of an error
        raise ConfigError(str(error.__cause__ or error)) from error
    except (ValueError, TypeError, ImportError, AssertionError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error


class RunStopped(RuntimeError):
    """A run cannot go on, by no fault of the program; the message tells what is left of it."""
