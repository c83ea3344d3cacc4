import logging

import pytest
import rich

from nat_models.engine.console import log_to_file, set_up_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_are_neither_wrapped_nor_marked_up_and_go_to_the_file_too(tmp_path, capsys):
    line = "data [3, 4] " + "x" * 300
    set_up_logging()
    logger = logging.getLogger("nat_models.engine.run")
    with log_to_file(tmp_path / "train.log"), rich.get_console().capture() as captured:
        logger.info(line)
    assert captured.get() == line + "\n"
    logger.info("after")
    [kept] = (tmp_path / "train.log").read_text().splitlines()
    assert kept.endswith(line)


def test_libraries_are_quiet():
    set_up_logging()
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
