"""LoRA on every backbone: what it leaves alone, what it trains, how it travels."""

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from small_pipeline import small_unet
from tiny_pipelines import CROSS
from torch import nn

from libs.backbones import DDPMUNet, UViT
from libs.backbones.recompute import recompute_activations
from libs.backbones.unet2d import UNet2D
from libs.errors import UserError
from libs.lora import (
    AdaptersOff,
    add_lora,
    attach_lora,
    fingerprint,
    load_lora,
    lora_state,
    merge_lora,
    remove_lora,
    same_weights,
)


class Texts(nn.Module):
    """A diffusers UNet behind the call of our backbones."""

    def __init__(self):
        super().__init__()
        self.unet = small_unet(levels=2)

    def forward(self, x, timesteps):
        context = torch.ones(len(x), 3, CROSS)
        return self.unet(x, timesteps, context, return_dict=False)[0]


class Transformer(nn.Module):
    """PixArt-alpha's or SD3's."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.pixart = kind is PixArtTransformer2DModel
        if self.pixart:
            self.transformer = kind(num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
                                    caption_channels=CROSS, sample_size=8)
        else:
            self.transformer = kind(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                                    num_attention_heads=2, joint_attention_dim=CROSS, caption_projection_dim=16,
                                    pooled_projection_dim=CROSS, pos_embed_max_size=8)

    def forward(self, x, timesteps):
        context = torch.ones(len(x), 3, CROSS)
        if self.pixart:
            options = {"resolution": None, "aspect_ratio": None}
            return self.transformer(x, context, timesteps, added_cond_kwargs=options, return_dict=False)[0][:, :4]
        return self.transformer(x, context, context[:, 0], timesteps, return_dict=False)[0]


def uvit():
    return UViT(img_size=8, patch_size=2, in_chans=4, embed_dim=16, depth=2, num_heads=2)


def ddpm_unet():
    return DDPMUNet(in_channels=4, channel=8, channel_multiplier=(1, 2), n_res_blocks=1, attn_strides=(2,))


def unet2d():
    return UNet2D(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
                  down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                  attention_head_dim=8, norm_num_groups=4)


def pixart():
    return Transformer(PixArtTransformer2DModel)


def sd3():
    return Transformer(SD3Transformer2DModel)


KINDS = (uvit, ddpm_unet, unet2d, Texts, pixart, sd3)
every = pytest.mark.parametrize("kind", KINDS)


def build(kind, rank=4, **options):
    torch.manual_seed(0)
    net = kind()
    with torch.no_grad():  # what starts at zero hides what is before it
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net, add_lora(net, rank, **options)


def trained(kind, **options):
    """A network whose LoRA does something."""
    net, _ = build(kind, **options)
    for name, tensor in lora_state(net).items():
        if ".lora_B." in name:
            tensor.normal_(std=0.1)
    return net


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([999.0, 249.0])


@every
def test_with_lora_off_it_is_the_network_that_it_was(kind):
    torch.manual_seed(0)
    net = kind().requires_grad_(False)  # as every teacher is: for frozen weights torch may take other kernels
    before, base = net(*inputs()), {name: each.clone() for name, each in net.state_dict().items()}
    add_lora(net, 4)
    teacher = AdaptersOff(net)
    assert teacher.net is net
    assert torch.equal(teacher(*inputs()), before)
    assert torch.equal(net(*inputs()), before)  # B is 0
    learned = [each for each in net.parameters() if each.requires_grad]
    assert sum(each.numel() for each in learned) == sum(each.numel() for each in lora_state(net).values())
    optimizer = torch.optim.SGD(learned, lr=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        net(*inputs()).square().sum().backward()
        optimizer.step()
    assert torch.equal(teacher(*inputs()), before)
    assert not torch.equal(net(*inputs()), before)
    for name, each in net.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(each, base[name.replace(".base_layer.", ".")])


@every
def test_gradients_reach_the_lora_alone(kind):
    net = trained(kind)
    net(*inputs()).square().sum().backward()
    with_gradient = {name for name, each in net.named_parameters() if each.grad is not None and each.grad.any()}
    assert with_gradient == {name for name, _ in net.named_parameters() if ".lora_" in name}


def test_a_teacher_passes_gradients_to_its_input_and_to_no_weight():
    net = trained(unet2d)
    x, t = inputs()
    AdaptersOff(net)(x.requires_grad_(True), t).sum().backward()
    assert x.grad.any()
    assert all(each.grad is None for each in net.parameters())


def test_lora_is_on_again_after_an_error():
    net = trained(uvit)
    student, teacher = net(*inputs()), AdaptersOff(net)
    with pytest.raises(TypeError):
        teacher(*inputs(), unknown=1)
    assert torch.equal(net(*inputs()), student)
    assert not torch.equal(teacher(*inputs()), student)
    with pytest.raises(ValueError, match="no LoRA"):
        AdaptersOff(uvit())


@every
def test_removed_is_the_network_before_and_merged_the_one_after(kind):
    net = trained(kind, alpha=2)
    names = [name for name, _ in kind().named_modules()]
    student, teacher = net(*inputs()), AdaptersOff(net)(*inputs())
    removed = remove_lora(copy.deepcopy(net))
    assert torch.equal(removed(*inputs()), teacher)
    assert merge_lora(net) is net
    merged = net(*inputs())
    scale = student.abs().max()
    assert (merged - student).abs().max() < 1e-5 * scale < (teacher - student).abs().max()
    for each in (removed, net):
        assert [name for name, _ in each.named_modules()] == names
        assert not hasattr(each, "peft_config")
        assert not lora_state(each)


@every
def test_recomputed_gradients_are_those_of_the_forward_pass(kind):
    """Also where the LoRA was off in the forward pass, as in a teacher's features, and is on in the backward pass."""
    net, (x, t), calls = trained(kind).train(), inputs(), []
    for module in net.modules():
        module.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))

    def gradients(called):
        wanted = [x.requires_grad_(True), *(each for each in net.parameters() if each.requires_grad)]
        loss = called(x, t).square().sum()
        calls.clear()
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    on_and_off = net, AdaptersOff(net)
    kept = [gradients(called) for called in on_and_off]
    assert not calls
    recompute_activations(net)
    for off, called in enumerate(on_and_off):
        recomputed = gradients(called)
        assert calls
        assert [each is None for each in recomputed] == [off and i > 0 for i in range(len(recomputed))]
        for one, other in zip(kept[off], recomputed, strict=True):
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def attached(net, held, alpha):
    attach_lora(net, held, alpha, "file")
    return net


def test_a_lora_goes_from_one_network_to_another():
    source, target = trained(ddpm_unet), build(ddpm_unet)[0]
    held = {name: each.clone() for name, each in lora_state(source).items()}
    assert {"mid.0.attention.qkv.lora_A.weight", "down.1.resblocks.conv1.lora_B.weight"} < held.keys()
    load_lora(target, held, "file")
    assert torch.equal(target(*inputs()), source(*inputs()))
    attached = remove_lora(build(ddpm_unet)[0]).requires_grad_(True)
    attach_lora(attached, held, 0, "file")
    assert torch.equal(attached(*inputs()), source(*inputs()))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_lora_of_another_network_is_refused_in_one_line(change):
    net = trained(ddpm_unet)
    held = dict(lora_state(net))
    name = "mid.0.attention.qkv.lora_B.weight"
    tensor = held.pop(name)
    if change == "unknown":
        held |= {name: tensor, "mid.9.conv1.lora_B.weight": tensor}
    if change == "shape":
        held[name] = tensor[:-1]
    with pytest.raises(UserError, match=r"^file is a LoRA of another network[^\n]*$"):
        load_lora(net, held, "file")
    plain = remove_lora(copy.deepcopy(net)).requires_grad_(True)
    before = plain(*inputs())
    with pytest.raises(UserError, match=r"^file is a LoRA of another network[^\n]*$"):
        attach_lora(plain, held, 0, "file")
    assert torch.equal(plain(*inputs()), before)
    assert not lora_state(plain)
    assert all(each.requires_grad for each in plain.parameters())


def test_one_of_two_loras_comes_and_goes():
    """The other stays as it is, in the layers that they share and in its own; so it does where the first is refused."""
    net, held = trained(ddpm_unet), dict(lora_state(trained(ddpm_unet, targets=["conv1", "attention.qkv"], rank=2)))
    net.requires_grad_(True)
    before, gradients = net(*inputs()), [each.requires_grad for each in net.parameters()]
    first = {name: each.clone() for name, each in lora_state(net).items()}
    attach_lora(net, held, 4, "file", "student")
    assert not any(each.requires_grad for name, each in net.named_parameters() if ".student." in name)
    assert lora_state(net, "student").keys() == held.keys()
    assert all(torch.equal(each, first[name]) for name, each in lora_state(net, "default").items())
    both = net(*inputs())
    merged = merge_lora(attached(merge_lora(trained(ddpm_unet)), held, 4))(*inputs())
    torch.testing.assert_close(both, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, before, atol=1e-3)

    remove_lora(net, "student")
    assert torch.equal(net(*inputs()), before)
    assert [each.requires_grad for each in net.parameters()] == gradients
    held["mid.0.attention.qkv.lora_B.weight"] = held["mid.0.attention.qkv.lora_B.weight"][:-1]
    with pytest.raises(UserError, match="is a LoRA of another network"):
        attach_lora(net, held, 0, "file", "student")
    assert torch.equal(net(*inputs()), before)
    assert list(net.peft_config) == ["default"]
    assert not any(".student." in name for name in net.state_dict())


@pytest.mark.parametrize("change", ["merge", "disable"])
def test_beside_a_lora_that_is_not_at_work_none_is_attached(change):
    net, held = trained(ddpm_unet), dict(lora_state(trained(ddpm_unet)))
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            layer.merge() if change == "merge" else layer.enable_adapters(False)
    with pytest.raises(UserError, match=r"^file: this DDPMUNet has a LoRA that is fused or disabled; undo that, or"):
        attach_lora(net, held, 0, "file", "student")


def test_targets_of_the_user():
    net, used = build(uvit, targets=["attn.qkv", "mlp.fc1"])
    assert used == ["attn.qkv", "mlp.fc1"]
    assert {name.rsplit(".lora_")[0].split(".", 1)[1] for name in lora_state(net) if "mid" in name} == set(used)
    own = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    assert add_lora(own, 2, targets=["0"]) == ["0"]


def test_what_cannot_have_the_lora_says_so():
    with pytest.raises(UserError, match=r"^--config.distill.lora_targets='qkw'[^\n]*choose from [^\n]*fc1[^\n]*qkv"):
        add_lora(uvit(), 4, targets=["qkw"])
    with pytest.raises(UserError, match=r"^--config.distill.lora_targets: the layers of a Conv2d [^\n]*UViT"):
        add_lora(nn.Conv2d(4, 4, 1), 4)
    with pytest.raises(UserError, match="lora_rank=0"):
        add_lora(uvit(), 0)
    net, _ = build(uvit)
    with pytest.raises(UserError, match="has a LoRA already"):
        add_lora(net, 4)


def test_a_lora_learns_in_float32():
    torch.manual_seed(0)
    net = uvit().to(torch.bfloat16)
    add_lora(net, 4)
    assert {each.dtype for each in lora_state(net).values()} == {torch.float32}
    assert net.mid_block.attn.qkv.base_layer.weight.dtype is torch.bfloat16


def test_a_fingerprint_tells_weights_and_not_precisions():
    torch.manual_seed(0)
    net = unet2d()
    held = fingerprint(net)
    assert fingerprint(net.state_dict()) == held == fingerprint(copy.deepcopy(net))
    assert same_weights(held, fingerprint(copy.deepcopy(net).half()))
    assert same_weights(held, fingerprint(copy.deepcopy(net).bfloat16()))
    assert not same_weights(held, fingerprint(unet2d()))  # of another seed
    assert not same_weights(held, fingerprint(uvit()))
    add_lora(net, 4)
    assert fingerprint(net) == held


def sd15_unet():
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl_unet():
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)


def pixart_1024():
    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096)


def sd3_medium():
    return SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, out_channels=16,
                                 pos_embed_max_size=192)


@pytest.mark.parametrize(("kind", "rank", "parameters", "millions"), [
    (sd15_unet, 128, 859_520_964, 25.51), (sdxl_unet, 64, 2_567_463_684, 92.90),
    (pixart_1024, 64, 611_349_152, 55.24), (sd3_medium, 64, 2_028_328_000, 87.65)])
def test_parameters_at_full_size(kind, rank, parameters, millions):
    """The published LoRAs of 2406.02347, with its ranks and targets."""
    with torch.device("meta"):
        net = kind()
        assert sum(each.numel() for each in net.parameters()) == parameters
        add_lora(net, rank)
    assert f"{sum(each.numel() for each in lora_state(net).values()) / 1e6:.2f}" == f"{millions:.2f}"
