import pytest
from ml_collections import ConfigDict

from libs.errors import UserError
from libs.methods import apply_methods


def clockwork(config):
    config.policy.update(name="clockwork", clock=4)


def early_exit(config):
    config.policy.update(name="early_exit")


def progressive(config):
    config.distillation = ConfigDict({"name": "progressive"})


TABLE = {"clockwork": clockwork, "early_exit": early_exit, "progressive": progressive}


@pytest.fixture
def config() -> ConfigDict:
    return ConfigDict({"policy": {"name": "full", "clock": 1}})


def test_each_method_fills_its_section(config):
    apply_methods(config, "clockwork, progressive", TABLE)
    assert config.to_dict() == {
        "policy": {"name": "clockwork", "clock": 4},
        "distillation": {"name": "progressive"},
    }


def test_no_methods(config):
    apply_methods(config, "", TABLE)
    assert config.to_dict() == {"policy": {"name": "full", "clock": 1}}


def test_unknown_method(config):
    with pytest.raises(UserError, match="'clockwerk' is unknown; choose from clockwork, early_exit, prog"):
        apply_methods(config, "progressive,clockwerk", TABLE)


def test_two_methods_for_one_section(config):
    with pytest.raises(UserError, match="clockwork and early_exit both set policy.name; name one of them"):
        apply_methods(config, "clockwork,early_exit", TABLE)
