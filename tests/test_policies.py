"""The caching policies in the chain: exact when they reuse nothing, cheaper by what the formula says, and forgetful."""

import pytest
import torch

from libs import build
from libs.backbones import UNet2D, UViT
from libs.config import load, override
from libs.cost import MacCounter, gmacs_per_image
from libs.errors import UserError
from libs.policies import make_policy, make_spec
from libs.policies.clockwork import Clockwork
from libs.policies.encoder_propagation import EncoderPropagation
from libs.policies.key_steps import PUBLISHED, key_steps

CPU = torch.device("cpu")
SOLVERS = ("ddim", "ddpm", "euler_sde", "euler_ode", "dpm_solver", "dpm_solver_pp_singlestep", "dpm_solver_pp")


def tiny(kind: str):
    """A random network with labels, its config's description of which fits `chain`."""
    torch.manual_seed(0)
    if kind == "uvit":
        return UViT(img_size=8, patch_size=2, in_chans=3, embed_dim=32, depth=4, num_heads=2, num_classes=11).eval()
    return UNet2D(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=1,
                  down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
                  up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11,
                  norm_num_groups=8).eval()


def chain(kind: str, methods: str = "", net=None, **fields):
    config = load(f"configs/cifar10_unet.py:{methods}")
    for name, value in {"sampler__steps": 8, "compute__rows": 2, **fields}.items():
        override(config, name.replace("__", "."), str(value))
    config.data.image_size = 8
    return build.make_chain(config, tiny(kind) if net is None else net, build.describe(config), CPU)


def image(kind: str, methods: str = "", **fields) -> torch.Tensor:
    return chain(kind, methods, **fields).sample([3, 4], [1, 2])


@pytest.mark.parametrize("kind", ["unet", "uvit"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_reuses_nothing_is_the_plain_network_bit_for_bit(kind, solver):
    fields = {"sampler__name": solver, "sampler__grid": "logsnr", "sampler__t_end": 0.001, "sampler__steps": 5}
    plain = image(kind, **fields)
    assert torch.equal(image(kind, "clockwork", policy__clock=1, **fields), plain)
    for parallel in (False, True):
        same = image(kind, "encoder_propagation", policy__key_steps="every:1", policy__parallel=parallel, **fields)
        assert torch.equal(same, plain)
    assert not torch.equal(image(kind, "clockwork", policy__clock=4, **fields), plain)


@pytest.mark.parametrize("kind", ["unet", "uvit"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_parallel_decoding_equals_one_step_after_another(kind, scale):
    fields = {"policy__key_steps": "0,1,5", "sampler__cfg_scale": scale}
    one_by_one = image(kind, "encoder_propagation", **fields)
    for window, batches in ((64, 2), (2, 3), (1, 5)):
        parallel = chain(kind, "encoder_propagation", policy__parallel=True, policy__max_parallel=window, **fields)
        torch.testing.assert_close(parallel.sample([3, 4], [1, 2]), one_by_one, rtol=1e-5, atol=1e-5)
        stats = parallel.policy.stats()
        assert (stats["full_calls"], stats["reuse_calls"], stats["decoder_batches"]) == (3, 5, batches)


def test_both_cuts_hand_back_the_same_features_for_the_identity_adaptor():
    after, before = (image("unet", "clockwork", policy__clock=3, policy__cut=cut) for cut in ("after", "before"))
    assert torch.equal(after, before)


@pytest.mark.parametrize("kind", ["unet", "uvit"])
@pytest.mark.parametrize("methods", ["clockwork", "encoder_propagation"])
def test_every_loop_starts_afresh(kind, methods):
    used = chain(kind, methods)
    first = used.sample([3, 4], [1, 2])
    used.sample([7, 8], [5, 6])
    with pytest.raises(ZeroDivisionError):  # an interruption in the middle of a loop
        interrupt(used)
    assert torch.equal(used.sample([3, 4], [1, 2]), first)
    assert used.policy.stats()["loops"] == 4


def interrupt(used) -> None:
    calls = []

    def denoise(x, t, cond):
        calls.append(t)
        return 1 / 0 if len(calls) == 4 else original(x, t, cond)

    original = used.denoiser
    used.denoiser = denoise
    denoise.time_input, denoise.schedule = original.time_input, original.schedule
    try:
        used.sample([9, 10], [5, 6])
    finally:
        used.denoiser = original


@pytest.mark.parametrize("kind", ["unet", "uvit"])
@pytest.mark.parametrize("methods", ["clockwork", "encoder_propagation"])
def test_disabling_gives_back_the_network(kind, methods):
    net = tiny(kind)
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    used = chain(kind, methods, net=net)
    used.sample([3], [1])
    assert used.policy.disable() is net
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    assert torch.equal(chain(kind, net=net).sample([3], [1]), chain(kind).sample([3], [1]))


def test_uvit_decodes_at_its_own_time():
    """On steps between key steps nothing but the time token differs, and the output follows it."""
    net = tiny("uvit")
    policy = EncoderPropagation("0").attach(net)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    times = torch.tensor([900.0, 900.0, 500.0])
    policy.start(times)
    key, same, later = (policy(x if i == 0 else torch.randn_like(x), t.expand(2), y) for i, t in enumerate(times))
    torch.testing.assert_close(same, key, rtol=1e-5, atol=1e-6)
    assert (later - key).abs().max() > 1e-4


def test_prior_noise_is_added_between_steps_below_its_time():
    policy = EncoderPropagation(prior_noise=0.5, prior_from=0.5)
    x, x_T = torch.zeros(1, 3), torch.ones(1, 3)
    after = policy.after_step(x_T)
    added = [after(x, torch.tensor(t, dtype=torch.float64)).mean().item() for t in (0.75, 0.5, 0.25, 0.0)]
    assert added == [0, 0, 0.5, 0]
    assert after(x, torch.tensor([0.75, 0.25], dtype=torch.float64)[:1]).mean() == 0  # one time a row
    assert EncoderPropagation().after_step(x_T) is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_prior_noise_reaches_every_sampler(solver):
    fields = {"sampler__name": solver, "sampler__grid": "logsnr", "sampler__t_end": 0.001, "sampler__steps": 6}
    plain = image("unet", **fields)
    fields["policy__key_steps"] = "every:1"
    assert not torch.equal(image("unet", "encoder_propagation", policy__prior_noise=0.05, **fields), plain)


def test_gmacs_of_a_loop_are_those_of_its_full_and_reuse_calls():
    plain, cached = chain("unet"), chain("unet", "clockwork", policy__clock=4)
    full = gmacs_per_image(plain, [0], [1])["with_attention_products"] / 8
    whole = gmacs_per_image(cached, [0], [1])["with_attention_products"]
    reuse = gmacs_per_image(chain("unet", "clockwork", policy__clock=8), [0], [1])["with_attention_products"]
    reuse = (reuse - full) / 7
    assert whole == pytest.approx(2 * full + 6 * reuse)
    assert reuse < 0.7 * full


SD15 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


@pytest.fixture(scope="module")
def sd15():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SD15).eval()


def macs_of_calls(net, settings, calls: int) -> list[int]:
    """Multiply-adds of each of `calls` calls of SD 1.5's UNet, a guided pair of 64 x 64 latents."""
    inputs = torch.empty(2, 4, 64, 64, device="meta"), torch.empty(2, 77, 768, device="meta")
    policy = settings.attach(net) if settings is not None else None
    counted = []
    with torch.no_grad():
        for i in range(calls):
            if policy is not None and i == 0:
                policy.start(torch.arange(50.0, 0, -1))
            with MacCounter() as counter:
                net(inputs[0], 50 - i, encoder_hidden_states=inputs[1])
            counted.append(counter.total)
    if policy is not None:
        policy.disable()
    return counted


@pytest.mark.parametrize(("settings", "total", "expected"), [
    (EncoderPropagation("paper"), 50, 0.733),  # DDIM, 9 key steps
    (EncoderPropagation("paper"), 20, 0.788),  # DPM-Solver, 7 key steps
    (Clockwork(4), 50, 0.543),
    (Clockwork(2), 8, 0.691),
])
def test_mac_ratios_of_stable_diffusion(sd15, settings, total, expected):
    """Attention products counted. One full and one reuse call stand for all of the schedule."""
    assert sum(each.numel() for each in sd15.parameters()) == 859_520_964
    one_key = Clockwork(50) if isinstance(settings, Clockwork) else EncoderPropagation("0")
    full, reuse = macs_of_calls(sd15, one_key, 2)
    assert full == macs_of_calls(sd15, None, 1)[0]
    keys = sum(settings.is_full(i, total) for i in range(total))
    assert (keys * full + (total - keys) * reuse) / (total * full) == pytest.approx(expected, abs=0.0006)


def test_key_steps_beyond_the_loop_are_refused_before_anything_is_sampled():
    with pytest.raises(UserError, match=r"policy\.key_steps='0,8': step 8 is out of range; the loop has steps 0 to 7"):
        chain("uvit", "encoder_propagation", policy__key_steps="0,8")


def test_published_key_steps_at_their_own_number_of_steps():
    assert sorted(key_steps("paper", 50)) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert sorted(key_steps("paper", 20)) == [0, 1, 2, 3, 5, 10, 15]
    assert sorted(key_steps("pro", 75)) == [0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65]
    for name, (made_for, steps) in PUBLISHED.items():
        assert sorted(key_steps(name, made_for)) == sorted(steps)
        for total in range(1, 120):
            chosen = key_steps(name, total)
            assert min(chosen) == 0
            assert max(chosen) < total


def test_clock_counts_from_the_end_of_what_is_protected():
    def full(total, **options):
        return [i for i in range(total) if Clockwork(**options).is_full(i, total)]

    assert full(8, clock=2) == [0, 2, 4, 6]
    assert full(9, clock=3, protect_first=1) == [0, 3, 6]
    assert full(9, clock=3, protect_first=3) == [0, 1, 2, 5, 8]
    assert full(8, clock=4, protect_last=2) == [0, 4, 6, 7]


@pytest.mark.parametrize(("section", "named"), [
    ({"name": "clockwork", "clock": 0}, "policy.clock=0 must be at least 1"),
    ({"name": "clockwork", "clock": "4"}, "policy.clock='4' must be a whole number"),
    ({"name": "clockwork", "depth": -1}, "policy.depth=-1"),
    ({"name": "clockwork", "depth": 3}, "policy.depth=3: this UNet2D has 3 levels; choose from 1, 2"),
    ({"name": "clockwork", "cut": "middle"}, "policy.cut='middle' is unknown; choose from auto, before, after"),
    ({"name": "clockwork", "adaptor": "nowhere.safetensors"}, "nowhere.safetensors"),
    ({"name": "encoder_propagation", "key_steps": "1,2"}, "step 0 must be a key step"),
    ({"name": "encoder_propagation", "key_steps": "every:0"}, "the interval must be at least 1"),
    ({"name": "encoder_propagation", "key_steps": "fast"}, "policy.key_steps='fast' is unknown; write every:4"),
    ({"name": "encoder_propagation", "max_parallel": 0}, "policy.max_parallel=0"),
    ({"name": "encoder_propagation", "prior_noise": -1.0}, "policy.prior_noise=-1.0"),
    ({"name": "deepcache"}, "policy.name='deepcache' is unknown; choose from full, clockwork, encoder_propagation"),
])
def test_bad_settings_are_refused_in_one_line(section, named):
    net = tiny("unet")
    with pytest.raises(UserError) as error:
        make_policy(section, net)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(hasattr(module, "_diffusers_hook") for module in net.modules())


def test_key_steps_beyond_the_loop_are_refused_when_it_starts():
    with pytest.raises(UserError, match="step 9 is out of range; the loop has steps 0 to 7"):
        image("unet", "encoder_propagation", policy__key_steps="0,9")


def test_one_caching_policy_a_network():
    net = tiny("unet")
    first = Clockwork().attach(net)
    with pytest.raises(UserError, match="UNet2D has a caching policy already"):
        EncoderPropagation().attach(net)
    first.disable()
    EncoderPropagation().attach(net).disable()


def test_the_plain_network_has_no_settings():
    assert make_spec({"name": "full"}) is None
    with pytest.raises(UserError, match="cannot serve a Linear"):
        Clockwork().attach(torch.nn.Linear(2, 2))
