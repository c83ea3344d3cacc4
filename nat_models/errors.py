"""Bad input, told apart from faults of the program."""

import difflib
import errno
import re
from collections.abc import Iterator, Sequence
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


@contextmanager
def faults_of_the_machine() -> Iterator[None]:
    """Around the work: what the machine does to it is a RunStopped, with what may help."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(
            f"{error}: make room and continue from what was saved last (ckpt=last)"
        ) from error
    except RunStopped as error:  # of a loading process, with its traceback
        *traceback, last = str(error).strip().splitlines()
        raise RunStopped(last.partition("RunStopped: ")[2]) if traceback else error from None
    except RuntimeError as error:
        if re.search(r"Connection (closed|reset) by peer|remote process exited", str(error)):
            raise RunStopped(
                "another process of the run ended; its message says why, or it was killed"
            ) from error
        died = re.match(r"DataLoader worker .*(killed by signal|exited unexpectedly)", str(error))
        if not died:
            raise
        reason = (str(error.__cause__ or "") or str(error)).splitlines()[0]
        raise RunStopped(
            f"data.num_workers: a loading process died: {reason} Out of memory? Fewer of them may "
            "help, or a smaller data.batch_size; what was saved last can be continued"
        ) from error


class RunStopped(RuntimeError):
    """A run cannot go on, by no fault of the program; the message tells what is left of it."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message on an unknown word: the known ones like it; empty where none is."""
    near = difflib.get_close_matches(word, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""
