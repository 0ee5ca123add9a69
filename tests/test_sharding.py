"""Sharded training, as `accelerate launch --use_fsdp` starts it: equal to one process, and resumed as any other."""

import json
import os
import shutil
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_flash_training import FLASH, LORA, SHORT
from test_flash_training import TINY as OF_FLASH
from test_train_script import TINY as OF_TRAIN
from test_train_script import losses_of
from tiny_training import tiny_config
from torch.distributed.tensor import DTensor
from two_processes import run_in_two

import distillate
import train
from libs.backbones import DDPMUNet, UViT
from libs.distillation.clockwork_adaptor import check
from libs.distillation.teacher_features import TeacherFeatures
from libs.errors import UserError
from libs.processes import Processes
from libs.training import Trainer, sharding
from libs.training.state import Checkpoints

DIGITS, TINY = OF_TRAIN[0], OF_TRAIN[1:]
SCRIPTS = {"train": train.main, "distillate": distillate.main}
HALVINGS = ("--config.distill.start_steps=8", "--config.distill.end_steps=4", "--config.train.accumulate=2")
PICTURES = ("--config.train.preview_every=4", "--config.train.preview_images=3", "--config.train.ema=0.5")
EXIT = ("--config.early_exit.ual_per_sample=true", "--config.train.grad_checkpoint=true",
        "--config.train.preview_every=5", "--config.train.preview_images=2")


def launched(*options):
    """What `accelerate launch --use_fsdp` with these options says to the processes that it starts."""
    argv = ["--use_fsdp", "--fsdp_version=2", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", *options, "train.py"]
    with mock.patch.dict(os.environ):
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if "FSDP" in name}


def run_sharded(argv):
    """Commands (script, workdir, *fields) in one pair of processes, the first argument; the environment is the second.

    Of the last save of each, WORKDIR/held_{rank}.json tells how many numbers this process holds.
    """
    commands, environment = map(json.loads, argv)
    os.environ.update(environment)
    save, features = Trainer._save, TeacherFeatures.__call__

    def counted_save(self):
        moments = [each for weight in self.parameters for each in self.optimizer.state[weight].values() if each.dim()]
        kinds = {"weights": [*self.net.parameters()], "moments": moments, "average": [*self.ema.state().values()]}
        held = {name: [sum(sharding.local(each).numel() for each in tensors), sum(each.numel() for each in tensors)]
                for name, tensors in kinds.items()}
        (self.run.workdir / f"held_{self.processes.rank}.json").write_text(json.dumps(held))
        assert all(each.untyped_storage().nbytes() <= 4 for each in self.ema.net.parameters())
        save(self)

    def left_in_the_middle(self, *inputs):
        found = features(self, *inputs)
        assert all(isinstance(each, DTensor) for each in self.net.parameters()), "its hooks have run"
        return found

    with (mock.patch.object(Processes, "close"), mock.patch.object(Trainer, "_save", counted_save),
          mock.patch.object(TeacherFeatures, "__call__", left_in_the_middle)):
        for script, workdir, *fields in commands:
            if status := SCRIPTS[script]([*fields, f"--workdir={workdir}"]):
                return status
    return 0


def run_alone(script, workdir, *fields):
    assert SCRIPTS[script]([*fields, f"--workdir={workdir}"]) == 0


def copy_without_last(run, workdir):
    """A run of 5 steps that stands at step 4."""
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "ckpts" / "00000005")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs: NAME of one process, sharded/NAME of two."""
    folder = tmp_path_factory.mktemp("runs")
    run_alone("train", folder / "plain", DIGITS, *TINY)
    run_alone("train", folder / "teacher", DIGITS, *OF_FLASH, *SHORT)
    teacher = f"--checkpoint={folder / 'teacher'}"
    runs = {"plain": ("train", DIGITS, *TINY),
            "exits": ("train", f"{DIGITS}:early_exit", *TINY, *EXIT),
            "halved": ("distillate", f"{DIGITS}:progressive", *OF_FLASH, *SHORT, *HALVINGS, teacher),
            "lora": ("distillate", *FLASH, LORA, *PICTURES, teacher)}
    for name in ("exits", "halved", "lora"):
        script, *fields = runs[name]
        run_alone(script, folder / name, *fields)
    copy_without_last(folder / "plain", folder / "sharded" / "from_one")
    commands = [(script, str(folder / "sharded" / name), *fields) for name, (script, *fields) in runs.items()]
    for name, *more in (("resumed", "--config.train.max_minutes=0.0000001"), ("resumed",), ("from_one",)):
        commands.append(("train", str(folder / "sharded" / name), DIGITS, *TINY, *more))
    run_in_two(run_sharded, [json.dumps(commands), json.dumps(launched())])
    copy_without_last(folder / "sharded" / "plain", folder / "sharded" / "to_one")
    run_alone("train", folder / "sharded" / "to_one", DIGITS, *TINY)
    return folder


def checkpoints(workdir):
    return Checkpoints(workdir / "ckpts")


def assert_equal_but_for_rounding(one, two):
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4)
    one, two = (checkpoints(folder).newest() for folder in (one, two))
    for mine, theirs in ((one.weights, two.weights), (one.ema, two.ema), (one.state["beside"], two.state["beside"])):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert type(theirs[name]) is torch.Tensor
            torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plain", "exits", "halved/steps_0004", "lora"])
def test_two_processes_with_a_part_each_learn_what_one_does(runs, name):
    """The LoRA's teacher is the sharded network too, called as often as each process's images need."""
    assert_equal_but_for_rounding(runs / name, runs / "sharded" / name)


@pytest.mark.parametrize("name", ["plain", "exits", "halved/steps_0004", "lora"])
def test_each_holds_a_part(runs, name):
    one, two = (json.loads((runs / "sharded" / name / f"held_{rank}.json").read_text()) for rank in range(2))
    for kind in ("weights", "moments", "average"):
        (mine, total), (theirs, _) = one[kind], two[kind]
        assert mine + theirs == total > 0, "a LoRA's base is parted too"
        assert max(mine, theirs) < 0.6 * total


def test_pictures_are_those_of_one_process(runs):
    """Of the averaged LoRA and its teacher: by the main process, with the others' parts."""
    for name in ("lora/previews/00000004.png", "exits/previews/00000005.png"):
        assert (runs / "sharded" / name).is_file()
        assert (runs / name).is_file()


def test_resumed_equals_uninterrupted(runs):
    plain, resumed = runs / "sharded/plain", runs / "sharded/resumed"
    assert losses_of(resumed) == losses_of(plain)
    one, other = (checkpoints(folder).load(5) for folder in (plain, resumed))
    assert_same(one.weights, other.weights)
    assert_same(one.ema, other.ema)
    assert one.state["optimizer"].keys() == other.state["optimizer"].keys() != set()
    for index, moments in one.state["optimizer"].items():
        assert_same(moments, other.state["optimizer"][index])


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", ["from_one", "to_one"])
def test_a_run_goes_on_in_another_number_of_processes(runs, name):
    """From what one process saved in two with a part each, and the other way round."""
    assert_equal_but_for_rounding(runs / "plain", runs / "sharded" / name)


def test_the_launcher_is_understood():
    config = tiny_config()
    for options, reshard in (((), True), (("--fsdp_version=1",), True),
                             (("--fsdp_reshard_after_forward=false",), False),
                             (("--fsdp_version=1", "--fsdp_sharding_strategy=SHARD_GRAD_OP"), False)):
        with mock.patch.dict(os.environ, launched(*options)):
            assert sharding.asked_for(2)
            assert not sharding.asked_for(1), "one process has nobody to share with"
            assert sharding.read_launcher(config, "fp16") is reshard
    assert not sharding.asked_for(2), "DistributedDataParallel"


@pytest.mark.parametrize(("options", "precision", "compiled", "message"), [
    (["--fsdp_offload_params=true"], "fp32", False, "--fsdp_offload_params=true is not served; leave it out"),
    (["--fsdp_activation_checkpointing=true"], "fp32", False, "use --config.train.grad_checkpoint=true"),
    (["--fsdp_version=1", "--fsdp_sharding_strategy=NO_SHARD"], "fp32", False,
     "--fsdp_sharding_strategy='no_shard' is unknown; choose from true, full_shard"),
    (["--fsdp_reshard_after_forward=8"], "fp32", False, "--fsdp_reshard_after_forward='8' is unknown; choose from"),
    ([], "fp16", False, "--mixed_precision=fp16: a discriminator learns beside the sharded network, and"),
    ([], "fp32", True, "--config.compute.compile=True: a network that accelerate launch --use_fsdp shards"),
])
def test_what_is_not_served_is_refused(options, precision, compiled, message):
    config = tiny_config()
    config.compute.compile = compiled
    with mock.patch.dict(os.environ, launched(*options)), pytest.raises(UserError, match=message):
        sharding.read_launcher(config, precision, alone=False)


def test_an_adaptor_is_not_sharded():
    from libs import config as config_files

    config = config_files.load("configs/cifar10_unet.py:dpm_solver_pp,clockwork_adaptor")
    with mock.patch.dict(os.environ, launched()), pytest.raises(UserError, match="an adaptor is too small to be"):
        check(config, 2)


def test_the_parts_of_known_networks():
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
    assert sharding.units(net) == [net.in_blocks[0], net.mid_block, net.out_blocks[0]]
    unet = DDPMUNet(channel=8, channel_multiplier=(1, 2), n_res_blocks=1)
    assert sharding.units(unet) == [*unet.down, *unet.mid, *unet.up]
    assert sharding.units(torch.nn.Sequential(unet)) == sharding.units(unet)
    assert sharding.units(torch.nn.Linear(2, 2)) == []
