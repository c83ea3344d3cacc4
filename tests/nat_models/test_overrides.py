import pytest

from nat_models.cli import config_dir
from nat_models.errors import ConfigError
from nat_models.overrides import check_overrides


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("train", "modle.name=x", r"modle\.name=x: no such key; did you mean model\.name"),
        ("train", "trainer.max_epoch=1", r"trainer\.max_epoch=1: no .* mean trainer\.max_epochs"),
        ("train", "debgu=short", r"debgu=short: no such key; did you mean debug\?"),
        ("train", "zzz=1", r"zzz=1: no such key"),
        ("train", "data=mnist", r"data=mnist: expected one of as_trained, .*, mnist5k, .*, wds"),
        ("train", "+data=mnist", r"data=mnist: expected one of as_trained, .*, mnist5k, .*, wds"),
        ("train", "~zzz", r"Could not delete from config\. 'zzz' does not exist\."),
        ("train", "+seed=1", r"\+seed=1: Could not append to config\. .* at 'seed'\."),
        ("train", "seed=1,2", r"seed=1,2: Ambiguous value for argument 'seed=1,2'"),
        ("train", "seed", r"seed: expected KEY=VALUE, as Hydra's grammar has it"),
        ("train", "name=[a", r"name=\[a: expected KEY=VALUE, as Hydra's grammar has it"),
        ("eval", "checkpoint=x", r"checkpoint=x: no such key"),
        ("bench", "model=nat_demo", r"model=nat_demo: no .* mean models or model\.name\?"),
    ],
)
def test_mistakes_are_named_in_one_line(config, override, message):
    with pytest.raises(ConfigError, match=rf"\A{message}[^\n]*\Z"):
        check_overrides(config_dir(), config, ["channels_last=true", override])


def test_what_can_be_composed_is_let_pass():
    overrides = ["data=fake", "+data.options.seed=1", "~logger", "hydra.run.dir=here", "++seed=2"]
    check_overrides(config_dir(), "train", overrides)
