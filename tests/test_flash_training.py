"""Flash Diffusion through distillate.py: whole students and LoRAs, resumed, shared among processes, and sampled."""

import json

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from two_processes import run_in_two

import distillate
import sample
import train
from libs import config as config_files
from libs.build import load_chain, load_model
from libs.checkpoint import load_described, read, resolve, save_backbone
from libs.conditioners import Conditioners, Draws, Label, SuperResolution
from libs.distillation.flash_training import null_condition, rollout_policy
from libs.errors import UserError
from libs.lora import AdaptersOff, add_lora, fingerprint, load_lora
from libs.training.state import Checkpoints

TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=2",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=4", "--config.backbone.num_heads=2")
SHORT = ("--config.train.steps=4", "--config.train.batch_size=8", "--config.train.log_every=1",
         "--config.train.save_every=2", "--config.train.preview_every=0")
STAGES = ("--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4")
DIGITS = "--config=configs/digits_uvit.py"
FLASH = (f"{DIGITS}:flash", *TINY, *SHORT, *STAGES)
LORA = "--config.distill.lora_rank=2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    assert train.main([DIGITS, *TINY, *SHORT, f"--workdir={workdir}"]) == 0
    return workdir


def distil(teacher, workdir, *fields):
    return distillate.main([*FLASH, *fields, f"--checkpoint={teacher}", f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert distil(teacher, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def lora(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    assert distil(teacher, workdir, LORA) == 0
    return workdir


def tiny(methods):
    config = config_files.load(f"configs/digits_uvit.py{methods}")
    for field in TINY:
        config_files.override(config, *field.removeprefix("--config.").split("=", 1))
    return config


def saved(workdir, step=4):
    return Checkpoints(workdir / "ckpts").load(step)


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal_states(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name


def rows(workdir):
    return [json.loads(line) for line in (workdir / "stats.jsonl").read_text().splitlines()]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(teacher, whole, tmp_path):
    """Of a LoRA: tests/test_flash_pipeline.py."""
    assert distil(teacher, tmp_path, "--config.train.steps=2") == 0
    assert distil(teacher, tmp_path) == 0
    one, other = saved(whole), saved(tmp_path)
    assert_equal_states(one.weights, other.weights)
    assert_equal_states(one.state["beside"], other.state["beside"])
    assert one.state["beside"], "the discriminator is in the checkpoint"
    assert_equal_states(one.state["optimizer"], other.state["optimizer"])


@pytest.mark.parametrize("fields", [(), (LORA,)])
def test_a_run_does_not_go_on_from_a_teacher_that_changed(fields, teacher, tmp_path, run_main):
    start, workdir = tmp_path / "start.safetensors", tmp_path / "run"
    net, description = load_described(resolve(str(teacher)))
    save_backbone(start, net.state_dict(), description)
    assert distil(start, workdir, *fields, "--config.train.steps=2") == 0
    assert distil(start, workdir, *fields, "--config.train.steps=3", "--config.compute.precision=bf16") == 0
    save_backbone(start, {name: 2 * each for name, each in net.state_dict().items()}, description)
    ran = run_main(distillate.main, *FLASH, *fields, f"--checkpoint={start}", f"--workdir={workdir}")
    assert ran.status == 2
    assert f"--workdir: {workdir} learned from other weights than {start} has now" in ran.stderr.splitlines()[-1]
    assert Checkpoints(workdir / "ckpts").steps() == [2, 3]


def test_the_stages_follow_the_updates_and_their_losses_are_told(whole):
    first, *others = rows(whole)
    assert "distil" in first
    assert "discriminator" not in first, "the first stage has the distillation loss alone"
    assert all({"distil", "dmd", "adversarial", "discriminator"} <= row.keys() for row in others)


def test_a_student_is_not_guided(whole):
    config = tiny("")
    config.sampler.cfg_scale = 2.0
    with pytest.raises(UserError, match="cfg_scale=2.0: a student of Flash Diffusion takes no guidance"):
        load_chain(config, str(whole), CPU, ["sampler.cfg_scale"])


def test_a_whole_student_samples_by_itself_at_the_times_of_its_modes(whole, tmp_path):
    config = tiny("")
    chain, _ = load_chain(config, str(whole), CPU)
    steps = (chain.ts * 1024).tolist()
    assert steps == [1024, 768, 512, 256, 0]
    assert config.sampler.name == "lcm"
    assert chain.cfg_scale == 1
    assert sample.main([DIGITS, *TINY, f"--checkpoint={whole}", "--seeds=0-4", f"--out={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*.png"))) >= 5


def test_a_loras_checkpoint_holds_nothing_else(lora, whole):
    names = saved(lora).weights
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any(bool(each.any()) for name, each in names.items() if ".lora_B." in name), "it has learnt"
    described = load_described(resolve(str(lora)))[1]
    assert "lora" not in described, "what loads is one whole network"


def test_a_lora_loads_as_the_network_that_was_trained(teacher, lora):
    config = tiny(":flash")
    base, _ = load_model(config, str(teacher))
    merged, _ = load_model(config, str(lora))
    assert not any("lora" in name for name in merged.state_dict())
    assert fingerprint(merged) != fingerprint(base)
    add_lora(base, 2, 2)
    load_lora(base, saved(lora).ema, "here")
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([900.0, 500.0, 20.0]), torch.tensor([1, 2, 3])
    torch.testing.assert_close(merged(x, t, y), base.eval()(x, t, y), rtol=1e-4, atol=1e-5)
    untouched, _ = load_model(config, str(teacher))
    assert torch.equal(AdaptersOff(base)(x, t, y), untouched(x, t, y)), "with its LoRA off it is the teacher"


def test_a_lora_of_other_weights_is_refused(teacher, lora):
    path = resolve(str(teacher))
    weights, description = read(path)
    before = path.read_bytes()
    try:
        save_backbone(path, {name: -each for name, each in weights.items()}, description)
        with pytest.raises(UserError, match="is a LoRA of other weights than .* holds now"):
            load_described(resolve(str(lora)))
    finally:
        path.write_bytes(before)


def test_a_lora_of_a_lora_of_a_network_with_heads(teacher, tmp_path):
    """The students have none; what they were trained on is found again nevertheless."""
    net, description = load_described(resolve(str(teacher)))
    net.add_uem_heads("released")
    description["backbone"] |= {"uem": "released"}
    with_heads = tmp_path / "heads.safetensors"
    save_backbone(with_heads, net.state_dict(), description)
    short = (LORA, "--config.train.steps=1", "--config.distill.adversarial_scale=0", "--config.train.lr=0.1")
    assert distil(with_heads, tmp_path / "first", *short) == 0
    assert distil(tmp_path / "first", tmp_path / "second", *short, "--config.distill.guidance=1") == 0
    once, twice = (load_described(resolve(str(tmp_path / name)))[0] for name in ("first", "second"))
    assert once.lte_classifer is None
    name = "mid_block.attn.qkv.weight"
    found = [each.state_dict()[name] for each in (net, once, twice)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_two_processes_learn_what_one_does(teacher, lora, tmp_path):
    """Their batches in two parts each. The network that learns is its own teacher."""
    run_in_two(distillate.main, [*FLASH, LORA, "--config.train.accumulate=2", f"--checkpoint={teacher}",
                                 f"--workdir={tmp_path}"])
    one, two = saved(lora), saved(tmp_path)
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=1e-3, atol=1e-5)
    for name, value in one.state["beside"].items():
        torch.testing.assert_close(two.state["beside"][name], value, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(rows(lora), rows(tmp_path), strict=True):
        for term in ("distil", "dmd", "adversarial", "discriminator"):
            assert theirs.get(term, 0) == pytest.approx(mine.get(term, 0), rel=1e-3)


def test_pictures_show_the_teacher_and_three_numbers_of_steps(teacher, lora, tmp_path):
    """And change nothing, though the network that learns makes all of them."""
    assert distil(teacher, tmp_path, LORA, "--config.train.preview_every=2", "--config.train.preview_images=3",
                  "--config.train.log_every=4") == 0
    with Image.open(tmp_path / "previews" / "00000004.png") as picture:
        width, height = picture.size
    assert height == 4 * (64 + 4) + 4
    assert width > 3 * (64 + 4)
    assert_equal_states(saved(tmp_path).weights, saved(lora).weights)
    [told], others = rows(tmp_path), rows(lora)
    for term in ("distil", "dmd", "adversarial", "discriminator"):
        values = [row[term] for row in others if term in row]  # the first stage has one loss, and does not count
        assert told[term] == pytest.approx(sum(values) / len(values), rel=1e-4), term


def test_the_teachers_roll_outs_can_be_cached(teacher, lora, tmp_path):
    """The student learns something else then, by a network whose hooks are off when it learns."""
    assert distil(teacher, tmp_path, LORA, "--config.distill.teacher_policy=clockwork:2") == 0
    one, other = saved(lora).weights, saved(tmp_path).weights
    assert any(not torch.equal(other[name], value) for name, value in one.items())


def test_the_average_of_a_lora_on_a_base_in_half_precision(teacher, tmp_path):
    assert distil(teacher, tmp_path, LORA, "--config.compute.precision=bf16", "--config.train.ema=0.5",
                  "--config.train.steps=2") == 0
    weights, average = saved(tmp_path, 2).weights, saved(tmp_path, 2).ema
    assert {each.dtype for each in average.values()} == {torch.float32}
    assert any(not torch.equal(average[name], value) for name, value in weights.items())


def test_a_compiled_lora_that_recomputes_learns_what_an_eager_one_does(teacher, lora, tmp_path, monkeypatch,
                                                                       fresh_compiler):
    """The compiler's own backward pass recomputes a graph into which the LoRA, on, is built."""
    compiled, graphs = torch.compile, counters["stats"]
    monkeypatch.setattr(torch, "compile", lambda net: compiled(net, backend="aot_eager"))
    assert distil(teacher, tmp_path, LORA, "--config.train.grad_checkpoint=true", "--config.compute.compile=true") == 0
    assert graphs["unique_graphs"] == 2  # with gradients and without
    assert not counters["graph_break"]
    for one, other in zip(rows(lora), rows(tmp_path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    one, other = saved(lora).weights, saved(tmp_path).weights
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_what_a_teacher_is_guided_against():
    def images(*parts, null_label=-1):
        conditioners = Conditioners(parts, null_label)
        conditioners({"image": torch.zeros(1, 1, 8, 8), "label": torch.tensor([3])}, draws)
        return null_condition({"kind": "image", "drop": 0.0}, None, conditioners)

    draws = Draws(*torch.zeros(2, 1, dtype=torch.long))
    held = {"y": torch.tensor([1, 2]), "concat": torch.ones(2, 1, 4, 4)}
    null = images(SuperResolution(2, (4, 4), rate=0.1), Label(0.2), null_label=10)(held)
    assert null["y"].tolist() == [10, 10]
    assert not null["concat"].any()
    assert images(SuperResolution(2, (4, 4))) is None, "one that always saw its condition"
    assert images(Label(0.2)) is None, "one without a label for none"
    label = {"kind": "label", "null_label": 3}
    assert null_condition(label, None)({"y": torch.tensor([1, 2])})["y"].tolist() == [3, 3]
    assert null_condition(label | {"null_label": -1}, None) is None
    assert null_condition({"kind": "text"}, torch.zeros(3, 2))({"context": torch.ones(2, 3, 2)})["context"].sum() == 0
    assert null_condition({"kind": "text"}, None) is None


def test_a_teacher_that_takes_the_scale_as_an_input_is_refused(teacher, tmp_path, run_main):
    net, description = load_described(resolve(str(teacher)))
    net.add_guidance_input()
    description["backbone"] |= {"guidance_embed": True}
    description["cond"] |= {"guidance": [1.0, 4.0]}
    save_backbone(tmp_path / "teacher.safetensors", net.state_dict(), description)
    ran = run_main(distillate.main, *FLASH, f"--checkpoint={tmp_path / 'teacher.safetensors'}",
                   f"--workdir={tmp_path / 'run'}")
    assert ran.status == 2
    assert "the teacher takes the guidance scale as an input" in ran.stderr.splitlines()[-1]


def test_policies_of_roll_outs():
    assert rollout_policy("full") is None
    assert rollout_policy("clockwork:3")["clock"] == 3
    assert rollout_policy("encoder_propagation:every:4")["key_steps"] == "every:4"


@pytest.mark.parametrize(("fields", "message"), [
    (["--config.distill.dmd_scale=0,.1"], "distill.dmd_scale=0,.1: 2 values for 4 stages"),
    (["--config.distill.teacher_steps=6"], "a grid of 6 steps does not hold the 4 modes"),
    (["--config.distill.student_steps=3"], "--config.distill.student_steps=3: a student is trained at 4 times"),
    (["--config.distill.guidance=3,1"], "want the lowest and the highest scale"),
    (["--config.distill.lora_rank=-1"], "--config.distill.lora_rank=-1 must be at least 0"),
    ([LORA, "--config.distill.lora_targets=nowhere"], "lora_targets='nowhere'"),
    (["--config.distill.teacher_policy=half"], "distill.teacher_policy='half' is unknown"),
    (["--config.distill.discriminator_lr=0"], "--config.distill.discriminator_lr=0.0 must be positive"),
    (["--config.distill.gan=best"], "--config.distill.gan='best' is unknown"),
    (["--config.policy.name=early_exit"], "policy"),
])
def test_what_makes_no_training_is_refused(fields, message, teacher, tmp_path, run_main):
    ran = run_main(distillate.main, *FLASH, *fields, f"--checkpoint={teacher}", f"--workdir={tmp_path / 'run'}")
    assert ran.status == 2
    assert message in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "ckpts").exists()
