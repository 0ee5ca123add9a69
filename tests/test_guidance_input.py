"""The guidance scale as an input of a network: absent unless asked for, nothing at first, one call a step."""

import copy
import json

import pytest
import torch
from torch import nn

import sample
from libs import build
from libs import config as config_files
from libs.backbones import UNet2D, UViT
from libs.backbones.guidance import add_guidance_input
from libs.checkpoint import RELEASED, build_backbone, load_backbone, read, save_backbone
from libs.cost import gmacs_per_image
from libs.errors import UserError

OWN = {f"guidance_embedding.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
CPU = torch.device("cpu")
SECTIONS = {
    "uvit": {"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 32, "depth": 4, "num_heads": 2,
             "num_classes": 11},
    "unet2d": {"name": "unet2d", "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
               "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
               "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "attention_head_dim": 8,
               "num_class_embeds": 11},
}
both = pytest.mark.parametrize("kind", SECTIONS)


def tiny(kind, **options):
    torch.manual_seed(1)
    return build_backbone({**SECTIONS[kind], **options}).eval()


def trained(kind):
    """A network whose output depends on the guidance scale."""
    net = add_guidance_input(tiny(kind))
    nn.init.normal_(net.guidance_embedding.fc2.weight)
    return net


def inputs(rows=3):
    torch.manual_seed(2)
    return torch.randn(rows, 3, 8, 8), torch.linspace(1, 900, rows), torch.arange(rows)


@pytest.mark.parametrize("name", ["cifar10_unet_v", "cifar10_uvit_tiny", "digits_uvit"])
def test_released_weights_have_no_key_of_it(name):
    tensors, description = read(RELEASED / f"{name}.safetensors")
    with torch.device("meta"):
        net = build_backbone(description["backbone"])
        grown = build_backbone({**description["backbone"], "guidance_embed": True})
    assert set(net.state_dict()) == set(tensors)
    assert set(grown.state_dict()) == set(tensors) | OWN
    assert set(add_guidance_input(net).state_dict()) == set(tensors) | OWN


@both
def test_a_network_that_is_given_the_input_stays_what_it_was(kind):
    net, (x, t, y) = tiny(kind), inputs()
    grown = add_guidance_input(net)
    for precision in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision):
            expect = net(x, t, y)
            for w in (None, torch.tensor([0.0, 1.0, 7.5])):
                assert torch.equal(grown(x, t, y, guidance=w), expect)
    assert net.guidance_embedding is None  # the copy grew, not the network
    nn.init.ones_(grown.patch_embed.proj.bias if kind == "uvit" else grown.conv_in.bias)
    with torch.no_grad():
        assert torch.equal(net(x, t, y), tiny(kind)(x, t, y))
    again = add_guidance_input(grown)  # a student that becomes a teacher
    assert set(again.state_dict()) == set(grown.state_dict())


@both
def test_every_row_follows_its_own_scale(kind):
    net, (x, t, y) = trained(kind), inputs()
    w = torch.tensor([1.0, 2.0, 7.5])
    with torch.no_grad():
        out = net(x, t, y, guidance=w)
        for i in range(3):
            alone = net(x[i:i + 1], t[i:i + 1], y[i:i + 1], guidance=w[i:i + 1])
            torch.testing.assert_close(alone, out[i:i + 1], rtol=1e-5, atol=1e-5)
        none = net(x, t, y)
        assert torch.equal(none, net(x, t, y, guidance=torch.ones(3)))
        change = (out - none).abs().amax(dim=(1, 2, 3))
    assert change[0] < 1e-5  # w = 1
    assert (change[1:] > 1e-3).all()


@both
def test_the_input_learns_from_the_first_step(kind):
    net, (x, t, y) = add_guidance_input(tiny(kind)), inputs()
    net.train()(x, t, y, guidance=torch.tensor([1.0, 2.0, 3.0])).square().mean().backward()
    assert net.guidance_embedding.fc2.weight.grad.abs().max() > 0
    labels = net.label_emb if kind == "uvit" else net.class_embedding
    assert labels.weight.grad[:3].abs().amax(dim=1).min() > 0


def test_unet2d_without_labels():
    net, (x, t, _) = tiny("unet2d", num_class_embeds=None), inputs()
    grown = add_guidance_input(net)
    with torch.no_grad():
        assert torch.equal(grown(x, t, guidance=torch.tensor([1.0, 2.0, 3.0])), net(x, t))
        nn.init.normal_(grown.guidance_embedding.fc2.weight)
        assert not torch.allclose(grown(x, t, guidance=torch.full((3,), 2.0)), grown(x, t))


@both
def test_files(kind, tmp_path):
    net, (x, t, y) = trained(kind), inputs()
    w = torch.tensor([1.0, 2.0, 7.5])
    path = tmp_path / "student.safetensors"
    save_backbone(path, net.state_dict(), {"backbone": {**SECTIONS[kind], "guidance_embed": True}})
    assert torch.equal(load_backbone(path)(x, t, y, guidance=w), net(x, t, y, guidance=w))
    if kind == "unet2d":
        net.save_pretrained(tmp_path / "unet")
        assert json.loads((tmp_path / "unet" / "config.json").read_text())["guidance_embed"] is True
        loaded = load_backbone(tmp_path / "unet")
        assert type(loaded) is UNet2D
        assert torch.equal(loaded(x, t, y, guidance=w), net(x, t, y, guidance=w))
        tiny(kind).save_pretrained(tmp_path / "plain")
        assert "guidance_embed" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        assert load_backbone(tmp_path / "plain").guidance_embedding is None


@both
def test_networks_that_do_not_take_it(kind):
    x, t, y = inputs()
    with pytest.raises(ValueError, match="built without guidance_embed"):
        tiny(kind)(x, t, y, guidance=torch.ones(3))
    with pytest.raises(UserError, match="a Conv2d cannot take the guidance scale as an input; uvit and unet2d can"):
        add_guidance_input(nn.Conv2d(3, 3, 3))
    with pytest.raises(UserError, match="guidance_embed=True does not go with class_embed_type='timestep'"):
        tiny("unet2d", class_embed_type="timestep", num_class_embeds=None, guidance_embed=True)


@both
def test_compiles_without_a_break(kind):
    net, (x, t, y) = trained(kind), inputs()
    w = torch.tensor([1.0, 2.0, 7.5])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, t, y, guidance=w), net(x, t, y, guidance=w))


def settings(kind, methods="", guidance=(1.0, 4.0), **sampler):
    """A config of a tiny network, as it would describe a student that takes scales of the range `guidance`."""
    config = config_files.load(f"configs/cifar10_unet.py:{methods}")
    config.unlock()
    config.backbone = {**SECTIONS[kind], "guidance_embed": True}
    config.data.image_size = 8
    config.compute.rows = 4
    config.sampler.update(steps=4, **sampler)
    if guidance is not None:
        config.cond.guidance = guidance
    return config.lock()


def make_chain(config, net):
    return build.make_chain(config, net, build.describe(config), CPU)


@both
def test_the_chain_gives_the_scale_to_the_network(kind):
    net = trained(kind)
    chain = make_chain(settings(kind, cfg_scale=3.0), net)
    seen = []
    hook = net.register_forward_pre_hook(lambda net, args, inputs: seen.append((len(args[0]), inputs["guidance"])),
                                         with_kwargs=True)
    images = chain.sample([3, 4, 5], [1, 2, 3])
    hook.remove()
    assert len(seen) == chain.nfe == 4
    assert chain.policy.rows_per_image == 1
    for rows, w in seen:
        assert rows == 4
        assert w.dtype == torch.float32
        assert w.tolist() == [3.0] * 4
    assert torch.equal(chain.sample([4], [2])[0], images[1])

    plain = make_chain(settings(kind, guidance=None), net)  # the same network behind w = 3, without guidance
    plain.denoiser.net = lambda x, t, y: net(x, t, y, guidance=torch.full((4,), 3.0))
    assert torch.equal(plain.sample([3, 4, 5], [1, 2, 3]), images)
    assert not torch.equal(make_chain(settings(kind, cfg_scale=2.0), net).sample([3, 4, 5], [1, 2, 3]), images)


@both
def test_without_the_range_the_chain_guides_by_pairs(kind):
    """A network with the input in a description without `cond.guidance` is called as any other."""
    images = [make_chain(settings(kind, guidance=None, cfg_scale=3.0), net).sample([3, 4], [1, 2])
              for net in (tiny(kind), add_guidance_input(tiny(kind)))]
    assert torch.equal(*images)


@both
def test_one_call_a_step_costs_half_a_pair(kind):
    net, at = trained(kind), {"cfg_scale": 3.0}
    one, pair = (gmacs_per_image(make_chain(settings(kind, guidance=scales, **at), net), [0], [1])
                 for scales in ((1.0, 4.0), None))
    assert one["with_attention_products"] == pytest.approx(pair["with_attention_products"] / 2, rel=1e-9)


@both
def test_caching_policies_hand_the_scale_on(kind):
    net, at = trained(kind), {"cfg_scale": 3.0}
    expect = make_chain(settings(kind, **at), copy.deepcopy(net)).sample([3, 4], [1, 2])

    def image(methods, w=3.0, **policy):
        config = settings(kind, methods, cfg_scale=w)
        for name, value in policy.items():
            config_files.override(config, f"policy.{name}", str(value))
        return make_chain(config, copy.deepcopy(net)).sample([3, 4], [1, 2])

    assert torch.equal(image("clockwork", clock=1), expect)
    assert torch.equal(image("encoder_propagation", key_steps="every:1"), expect)
    one_by_one = image("encoder_propagation", key_steps="0,1")
    assert not torch.equal(one_by_one, expect)
    assert not torch.equal(image("encoder_propagation", w=2.0, key_steps="0,1"), one_by_one)
    together = image("encoder_propagation", key_steps="0,1", parallel=True)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guidance", "scale", "message"), [
    ((2.0, 4.0), 1.0, "sampler.cfg_scale=1.0: this network takes the guidance scale as an input, from 2 to 4"),
    ((1.0, 4.0), 4.5, "sampler.cfg_scale=4.5: this network takes the guidance scale as an input, from 1 to 4"),
    ((4.0, 1.0), 2.0, "cond.guidance=.* must be two numbers, the lowest and the highest guidance scale"),
    ((1.0,), 1.0, "cond.guidance=.* must be two numbers"),
    ("none", 1.0, "cond.guidance='none' must be two numbers"),
])
def test_scales_outside_the_range(guidance, scale, message):
    with pytest.raises(UserError, match=message) as error:
        make_chain(settings("uvit", guidance=guidance, cfg_scale=scale), trained("uvit"))
    assert "\n" not in str(error.value)


def test_a_range_for_a_network_without_the_input():
    with pytest.raises(UserError, match=r"cond.guidance=.*: the network was built without backbone.guidance_embed"):
        make_chain(settings("uvit"), tiny("uvit"))


CONFIG = '''
from libs.defaults import base_config, uvit_backbone

def get_config():
    config = base_config()
    config.backbone = uvit_backbone(8, 2, 32, 2, 2, num_classes=4)
    config.cond.update(kind="label", num_classes=3, null_label=3)
    config.data.image_size = 8
    config.compute.update(rows=4, device="cpu")
    config.sampler.steps = 3
    return config
'''


def test_sample_py_reads_the_range_from_the_student(tmp_path, run_main):
    """The config is the teacher's; the checkpoint says what its network takes, and how it is sampled."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    config = config_files.load(str(path))
    net = UViT(**{name: value for name, value in config.backbone.items() if name != "name"}, guidance_embed=True)
    nn.init.normal_(net.guidance_embedding.fc2.weight)
    description = build.describe(config)
    description["backbone"]["guidance_embed"] = True
    description["cond"]["guidance"] = [2.0, 4.0]
    description["sampler"] = {"steps": 2, "cfg_scale": 3.0}
    save_backbone(tmp_path / "student.safetensors", net.state_dict(), description)

    def run(name, *flags):
        return run_main(sample.main, f"--config={path}", f"--checkpoint={tmp_path / 'student.safetensors'}",
                        "--seeds=0-1", f"--out={tmp_path / name}", *flags)

    def written(name):
        return [(tmp_path / name / f"{seed:06d}.png").read_bytes() for seed in (0, 1)]

    ran = run("own")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert (summary["nfe"], summary["cfg_scale"], summary["stats"]) == (2, 3.0, {"calls": 2, "rows": 8})
    assert run("two", "--config.sampler.cfg_scale=2").status == 0
    assert written("two") != written("own")
    ran = run("one", "--config.sampler.cfg_scale=1")
    assert ran.status == 2
    assert ran.stderr.splitlines()[-1] == ("error: sampler.cfg_scale=1.0: this network takes the guidance scale as an "
                                           "input, from 2 to 4")
