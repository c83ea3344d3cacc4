from queue import Empty

import pytest
from hydra.utils import instantiate

from nat_models.errors import ConfigError, RunStopped, bad_input, faults_of_the_machine


@pytest.mark.parametrize("error", [ValueError, TypeError, ModuleNotFoundError])
def test_errors_of_the_input_become_config_errors(error):
    with pytest.raises(ConfigError, match="the reason") as caught, bad_input():
        raise error("the reason")
    assert isinstance(caught.value.__cause__, error)


def test_hydras_wrapping_is_taken_off():
    with pytest.raises(ConfigError, match=r"^invalid literal for int\(\)"), bad_input():
        instantiate({"_target_": "builtins.int", "_args_": ["x"]})


def test_faults_of_the_program_pass():
    with pytest.raises(KeyError), bad_input():
        raise KeyError("x")


def test_the_death_of_a_loading_process_is_told_from_other_errors():
    with pytest.raises(RunStopped, match=r"died: .*Killed"), faults_of_the_machine():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match=r"^shape"), faults_of_the_machine():
        raise RuntimeError("shape")


def test_a_loading_process_that_exits_without_a_word_is_told_all_the_same():
    words = "DataLoader worker (pid 1) exited unexpectedly"
    with pytest.raises(RunStopped, match=r"died: DataLoader .*exited"), faults_of_the_machine():
        raise RuntimeError(words) from Empty()


def test_the_end_of_another_process_is_one_line():
    gloo = "[pair.cc:561] Connection closed by peer [127.0.0.1]:4508. This is typically caused by"
    with pytest.raises(RunStopped, match="another process of"), faults_of_the_machine():
        raise RuntimeError(gloo)


def test_a_full_disk_is_one_line_whatever_was_written():
    with pytest.raises(RunStopped, match=r"No space left on device: make room and continue"):
        write_in("/dev/full")
    with pytest.raises(IsADirectoryError):
        write_in("/")


def write_in(path: str) -> None:
    with faults_of_the_machine(), open(path, "w", buffering=1) as log:
        log.write("epoch 1\n")
