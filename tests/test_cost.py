"""Multiply-adds: the published numbers on the meta device, and what a sampling loop really runs."""

import pytest
import torch
import torch.nn.functional as F

from libs import build
from libs import config as config_files
from libs.backbones.attention import sdpa_attention
from libs.checkpoint import build_backbone
from libs.cost import MacCounter, countable, gmacs_per_image
from libs.policies import Full

# config: GMACs of one forward of one image with attention products, and those of the attention products
PUBLISHED = {
    "cifar10_uvit_small": (12.20, 0.88),
    "cifar10_unet": (3.53, 0.13),
    "imagenet64_uvit_mid": (35.24, 1.74),
    "imagenet256_uvit_large": (76.46, 2.86),
    "imagenet256_uvit_huge": (133.20, 4.45),
    "mscoco_uvit_small": (16.23, 1.49),
}


def forward_macs(section, device="meta", rows=1):
    """(all, attention products) of one forward of `rows` images through a config's backbone."""
    with torch.device(device):
        net = build_backbone(section).eval()
        channels, size = (section.get(a, section.get(b)) for a, b in (("in_chans", "in_channels"),
                                                                      ("img_size", "sample_size")))
        cond = {}
        if section.get("num_classes", -1) > 0 or section.get("num_class_embeds"):
            cond["y"] = torch.zeros(rows, dtype=torch.int64)
        if section.get("clip_dim"):
            cond["context"] = torch.zeros(rows, section["num_clip_token"], section["clip_dim"])
        with torch.inference_mode(), MacCounter() as counter:
            net(torch.zeros(rows, channels, size, size), torch.zeros(rows), **cond)
    return counter.total, counter.attention


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    total, attention = forward_macs(config_files.load(f"configs/{name}.py").backbone)
    assert (round(total / 1e9, 2), round(attention / 1e9, 2)) == PUBLISHED[name]


TINY = {"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_uvit_by_hand(attention, device):
    l, d, blocks, rows = 17, 32, 3, 2  # 16 patches and the time
    products = blocks * 2 * l * l * d  # Q K^T and the weights times V
    layers = blocks * 12 * l * d * d + l * 2 * d * d  # qkv, projection, MLP of 4 d; one long skip
    ends = 16 * d * 12 + l * d * 12 + 64 * 27 * 3  # patch embedding, decoder of every token, 3 x 3 convolution
    total, counted = forward_macs({**TINY, "attention": attention}, device, rows)
    assert counted == rows * products
    assert total == rows * (products + layers + ends)


def test_every_way_to_multiply_activations():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 7)
    flat_q, flat_k, bias = q.flatten(0, 1), k.flatten(0, 1), torch.zeros(6, 5, 7)
    calls = [lambda: q @ k, lambda: torch.matmul(q, k), lambda: q.matmul(k), lambda: torch.bmm(flat_q, flat_k),
             lambda: flat_q.bmm(flat_k), lambda: torch.baddbmm(bias, flat_q, flat_k)]
    for call in calls:
        with torch.inference_mode(), MacCounter() as counter:
            call()
        assert counter.total == counter.attention == 6 * 5 * 8 * 7
    # a layer on transposed activations becomes a batched product inside torch, and is still a layer
    with torch.inference_mode(), MacCounter() as counter:
        F.linear(torch.randn(4, 8, 5).transpose(1, 2), torch.randn(7, 8))
    assert (counter.total, counter.attention) == (4 * 5 * 8 * 7, 0)


def tiny_chain(policy=Full, **sampler):
    config = config_files.load("configs/cifar10_uvit_tiny.py")
    config.unlock()
    config.backbone = {**TINY, "num_classes": 4}
    config.cond.update(kind="label", num_classes=3, null_label=3)
    config.data.image_size = 8
    config.compute.rows = 4
    config.sampler.update(**{"name": "ddim", "steps": 4, **sampler})
    net = build_backbone(config.backbone).eval()
    chain = build.make_chain(config, net, build.describe(config), torch.device("cpu"))
    chain.policy = chain.denoiser.net = policy(net)
    return chain


FORWARD = forward_macs({**TINY, "num_classes": 4})


@pytest.mark.parametrize(("sampler", "calls"), [
    ({}, 4),
    ({"cfg_scale": 2.0}, 8),  # both rows of a guided pair
    ({"name": "dpm_solver", "order": 3, "steps": 7, "t_end": 1e-3}, 7),
])
@pytest.mark.parametrize("policy", [Full, type("Watched", (Full,), {})])  # by one call, and by all of them
def test_calls_of_a_loop(policy, sampler, calls):
    chain = tiny_chain(policy, **sampler)
    gmacs = gmacs_per_image(chain, [0, 1, 7], [0, 1, 2])
    assert chain.policy.calls == (1 if policy is Full else chain.nfe)
    total, attention = FORWARD
    assert gmacs["with_attention_products"] == pytest.approx(calls * total / 1e9, rel=1e-12)
    assert gmacs["without_attention_products"] == pytest.approx(calls * (total - attention) / 1e9, rel=1e-12)
    assert gmacs["counted_images"] == 3


class EverySecond(Full):
    """Repeats its last output in every second call."""

    def __call__(self, x, timesteps, y=None, context=None):
        if self.calls % 2 == 0:
            self.held = super().__call__(x, timesteps, y, context)
        else:
            self.calls += 1
        return self.held


def test_a_policy_that_skips_calls_is_counted_by_what_ran():
    gmacs = gmacs_per_image(tiny_chain(EverySecond), [0], [0])
    assert gmacs["with_attention_products"] == pytest.approx(2 * FORWARD[0] / 1e9, rel=1e-12)


def test_counting_leaves_images_and_network_as_they_are():
    chain = tiny_chain()
    before = chain.sample([3, 4], [0, 1])
    layers = [block.attn for block in chain.policy.net.block_list()]

    def another(q, k, v):
        raise AssertionError("a kernel that the counter does not know")

    for layer in layers:
        layer.attention_function = another
    gmacs_per_image(chain, [3, 4], [0, 1])
    assert all(layer.attention_function is another for layer in layers)
    for layer in layers:
        layer.attention_function = sdpa_attention
    with MacCounter():
        assert torch.equal(chain.sample([3, 4], [0, 1]), before)
    assert torch.equal(chain.sample([3, 4], [0, 1]), before)


def test_compiled_networks_are_counted_uncompiled():
    net = build_backbone(TINY).eval()
    compiled = torch.compile(net, backend=lambda graph, inputs: pytest.fail("the compiler ran"))
    x, time = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    with torch.inference_mode():
        with countable(net), MacCounter() as plain:
            net(x, time)
        with countable(compiled), MacCounter() as counter:
            compiled(x, time)
    assert counter.total == plain.total > 0
    assert counter.attention == plain.attention > 0
