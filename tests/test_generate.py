"""An image is a function of its seed: any batch size, any order, any company."""

import pytest
import torch

from libs import config as config_files
from libs.backbones import UViT
from libs.build import adopt_sampler, describe, make_chain
from libs.errors import UserError
from libs.policies import Full
from libs.random import Stream, normal


def tiny_config(**sampler):
    config = config_files.load("configs/cifar10_uvit_tiny.py")
    config.unlock()
    config.backbone.update(img_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=4)
    config.cond.update(kind="label", num_classes=3, null_label=3)
    config.data.image_size = 8
    config.compute.rows = 4
    config.sampler.update(**{"name": "ddim", "steps": 3, **sampler})
    return config.lock()


def tiny_chain(config):
    torch.manual_seed(0)
    net = UViT(**{k: v for k, v in config.backbone.items() if k != "name"}).eval()
    return make_chain(config, net, describe(config), torch.device("cpu"))


def all_images(chain, seeds, labels=None, batch_size=None):
    parts = list(chain.images(seeds, labels, batch_size))
    assert [seed for batch, _ in parts for seed in batch] == list(seeds)
    return torch.cat([images for _, images in parts])


SEEDS = [5, 0, 900, 3, 2**40, 17, 8, 1, 4, 2]
LABELS = [seed % 3 for seed in SEEDS]


@pytest.mark.parametrize("sampler", [{"name": "ddim", "eta": 1.0}, {"name": "dpm_solver_pp"}, {"cfg_scale": 2.0}])
def test_bit_equal_in_any_batch_and_order(sampler):
    chain = tiny_chain(tiny_config(**sampler))
    reference = all_images(chain, SEEDS, LABELS)
    for batch_size in (1, 3, 4, 7, 100):
        assert torch.equal(all_images(chain, SEEDS, LABELS, batch_size), reference)
    order = [7, 2, 9, 0, 4, 6, 1, 3, 8, 5]
    shuffled = all_images(chain, [SEEDS[i] for i in order], [LABELS[i] for i in order])
    assert torch.equal(shuffled, reference[order])
    one = chain.sample([SEEDS[2]], [LABELS[2]])
    assert torch.equal(chain.codec.decode(one)[0], reference[2])
    latents = chain.sample(SEEDS[:4], LABELS[:4])  # before rounding to uint8, too
    assert torch.equal(latents[[2]], one)
    assert len({image.numpy().tobytes() for image in reference}) == len(SEEDS)


def test_network_always_sees_the_same_number_of_rows():
    for scale, rows in ((1.0, 4), (2.0, 8)):
        chain = tiny_chain(tiny_config(cfg_scale=scale))
        seen = []
        chain.policy.net.register_forward_pre_hook(lambda net, args, seen=seen: seen.append(len(args[0])))
        all_images(chain, SEEDS, LABELS, batch_size=3)
        assert set(seen) == {rows}
        assert chain.policy.stats() == {"calls": len(seen), "rows": rows * len(seen)}


def test_the_policy_hears_the_times_before_the_first_call():
    events = []

    class Spy(Full):
        def start(self, times, rows_per_image=1):
            events.append((times.tolist(), rows_per_image))

        def __call__(self, x, timesteps, y=None, context=None):
            events.append(float(timesteps[0]))
            return super().__call__(x, timesteps, y, context)

    for scale in (1.0, 3.0):
        chain = tiny_chain(tiny_config(name="dpm_solver", order=3, steps=5, grid="logsnr", t_end=1e-3,
                                       cfg_scale=scale))
        chain.policy = chain.denoiser.net = Spy(chain.policy.net)
        events.clear()
        chain.sample([1, 2], [0, 1])
        (times, rows_per_image), *calls = events
        assert calls == pytest.approx(times)
        assert len(times) == chain.nfe == 5
        assert rows_per_image == (2 if scale != 1 else 1)


def test_full_policy_is_the_backbone():
    chain = tiny_chain(tiny_config())
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    assert torch.equal(chain.policy(x, t, y), chain.policy.net(x, t, y))
    assert chain.policy.disable() is chain.policy.net


def test_noise_streams_do_not_meet():
    """x_T and the noise of a step are different draws of one seed."""
    seeds = torch.tensor([3])
    assert not torch.isclose(normal(seeds, 0, (8,), Stream.START), normal(seeds, 0, (8,), Stream.STEP)).any()


def test_adopt_sampler_leaves_what_the_user_set():
    config = tiny_config(steps=7)
    adopt_sampler(config, {"sampler": {"name": "ddpm", "steps": 4}}, overrides={"sampler.steps"})
    assert (config.sampler.name, config.sampler.steps) == ("ddpm", 7)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("name", "plms", "sampler.name='plms' is unknown"),
    ("threshold", "soft", "sampler.threshold='soft' is unknown; choose from none, static, dynamic"),
    ("steps", 0, "sampler.steps=0 must be at least 1"),
])
def test_bad_sampler(field, value, message):
    with pytest.raises(UserError, match=message):
        tiny_chain(tiny_config(**{field: value}))


def test_guidance_needs_a_null_class():
    config = tiny_config(cfg_scale=2.0)
    config.cond.null_label = -1
    with pytest.raises(UserError, match="no null class to guide against"):
        tiny_chain(config)
    config = tiny_config()
    config.denoiser.time_input = "index"
    with pytest.raises(UserError, match="denoiser.time_input='index' needs a discrete schedule, not vp_linear"):
        tiny_chain(config)
    config = tiny_config()
    config.compute.rows = 0
    with pytest.raises(UserError, match="compute.rows=0 must be at least 1"):
        tiny_chain(config)
