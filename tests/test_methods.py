import pytest
from ml_collections import ConfigDict

from libs.config import load
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


def test_distillations_say_which_they_are():
    config = load("configs/cifar10_unet.py:dpm_solver_pp,clockwork_adaptor")
    assert (config.distill.name, config.sampler.name) == ("clockwork_adaptor", "dpm_solver_pp")
    assert load("configs/digits_uvit.py:progressive").distill.name == "progressive"
    with pytest.raises(UserError, match="progressive and clockwork_adaptor both set distill.name; name one of them"):
        load("configs/cifar10_unet.py:progressive,clockwork_adaptor")


def test_presets_of_progressive_distillation():
    usual, paper, other = (load(f"configs/cifar10_unet.py:{name}") for name in ("progressive", "paper", "hramchenko"))
    assert (paper.train.batch_size, paper.train.betas) == (128, (0.9, 0.999))
    assert (usual.train.batch_size, usual.train.betas) == (512, (0.9, 0.99))  # of the model's training
    assert paper.distill.to_dict() == usual.distill.to_dict()
    assert (paper.distill.target, other.distill.target) == ("ddim2", "x2")
    assert (paper.train.lr, paper.train.steps, paper.train.decay_from) == (5e-5, 50_000, 0.0)


@pytest.mark.parametrize("name", ["cifar10_unet", "celebahq256_unet", "own_model", "digits_uvit", "cifar10_uvit_tiny"])
def test_the_papers_schedule(name):
    config = load(f"configs/{name}.py:cosine,paper")
    assert config.schedule.to_dict() == {"name": "cosine"}
    assert config.denoiser.time_input == "logsnr"
    assert load(f"configs/{name}.py:cosine,dpm_solver_pp").sampler.t_end == 1e-4


def test_adaptors_of_pipelines_are_trained_as_in_the_paper():
    small, large = (load(f"configs/{name}.py:clockwork_adaptor") for name in ("cifar10_unet", "sd15"))
    assert (large.train.lr, large.train.batch_size, large.train.weight_decay) == (1e-4, 16, 0.0)
    assert (small.distill.width, large.distill.width) == (128, 0)  # 0 is the adaptor's own
    assert large.distill.trajectories * large.train.steps // large.distill.updates == 50_000  # the paper's captions


def test_early_exit_is_timed_at_many_rows_too():
    rows = {methods: load(f"configs/cifar10_uvit_tiny.py:{methods}").eval.benchmark_rows
            for methods in ("full", "early_exit", "early_exit_paper")}
    assert rows == {"full": (1, 16), "early_exit": (1, 16, 128), "early_exit_paper": (1, 16, 128)}
