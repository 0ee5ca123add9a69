"""Caching policies do not make the host wait for the device: they read no more tensors' values than the plain network.

On a CPU nothing waits, but what would is the same: operators that hand a tensor's value to Python.
"""

from collections import Counter

import pytest
import torch
from small_pipeline import image, small, small_unet
from test_policies import chain
from tiny_pipelines import CROSS, TOKENS, controlnet, t2i_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from libs.denoiser import Denoiser, guided
from libs.pipelines import Clockwork, EncoderPropagation, apply_policy
from libs.pipelines.networks import StableDiffusionNet
from libs.policies import Full
from libs.schedule import scaled_linear

READS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero")
STEPS = 12
POLICIES = {
    "clockwork": Clockwork(4),
    "extrapolation": Clockwork(4, adaptor="extrapolation"),
    "sequential": EncoderPropagation("paper", prior_noise=0.003),
    "parallel": EncoderPropagation("every:4", parallel=True, prior_noise=0.003),
}


class Reads(TorchDispatchMode):
    """Counts the operators that read a tensor's value."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        if name in READS:
            self.counts[name] += 1
        return function(*args, **kwargs or {})


def reads(run) -> Counter:
    with Reads() as mode:
        run()
    return mode.counts


def test_reads_are_counted():
    x = torch.ones(2)
    assert reads(lambda: (float(x.sum()), torch.equal(x, x), bool(x.any()))) == {READS[0]: 2, READS[1]: 1}


@pytest.mark.parametrize(("kind", "policy"), [*((small, policy) for policy in POLICIES), (controlnet, "sequential"),
                                              (controlnet, "parallel"), (t2i_adapter, "parallel")])
def test_a_pipeline(kind, policy):
    pipe, kwargs = kind()
    kwargs["num_inference_steps"] = STEPS
    plain = reads(lambda: image(pipe, kwargs))
    with apply_policy(pipe, POLICIES[policy]) as handle:
        assert reads(lambda: image(pipe, kwargs)) == plain
        assert handle.stats()["reuse_calls"] >= 5


CHAINS = {
    "clockwork": {"policy__clock": 4},
    "encoder_propagation": {"policy__key_steps": "every:4", "policy__parallel": True},
}


@pytest.mark.parametrize("method", CHAINS)
@pytest.mark.parametrize("kind", ["unet", "uvit"])
def test_a_guided_chain(kind, method):
    fields = {"sampler__steps": STEPS, "sampler__cfg_scale": 2.0}
    plain, reusing = chain(kind, **fields), chain(kind, method, **fields, **CHAINS[method])
    counts = [reads(lambda each=each: each.sample([3, 4], [1, 2])) for each in (plain, reusing)]
    assert counts[0] == counts[1]
    assert reusing.policy.stats()["reuse_calls"] == 9


def test_a_guided_pipeline_net_in_half_precision():
    """Guidance and the cast to the network's precision make the conditions anew at every step."""
    schedule = scaled_linear()
    ts = torch.linspace(1, 1 / 1000, STEPS, dtype=torch.float64)
    cond, null = ({"context": torch.randn(1, TOKENS, CROSS)} for _ in range(2))

    net = StableDiffusionNet(small_unet().bfloat16())
    denoiser = Denoiser(net, schedule, time_input="index")
    denoise = guided(denoiser, 2.0, null)

    @torch.no_grad()
    def sample(policy: Full) -> None:
        policy.start(denoiser.time_input(ts), rows_per_image=2)
        for t in ts:
            denoise(torch.randn(1, 4, 8, 8), t, cond)

    plain = reads(lambda: sample(Full(net)))
    policy = EncoderPropagation("every:4", parallel=True).attach(net)
    assert reads(lambda: sample(policy)) == plain
    assert (policy.stats()["full_calls"], policy.stats()["decoded_steps"]) == (3, 9)
