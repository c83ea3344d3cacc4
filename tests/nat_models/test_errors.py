import pytest
from hydra.utils import instantiate

from nat_models.errors import ConfigError, bad_input


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
