"""The caching tools that `safety` compares, ours and the installed peers, each switched on as its users are told to."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from ..policies.clockwork import Clockwork
from ..policies.encoder_propagation import EncoderPropagation
from .apply import apply_policy

STEPS = 8  # of the images that are drawn with them; T-GATE asks for it


class Running(NamedTuple):
    """A tool that was switched on.

    draw    makes an image: the pipeline itself, or a method that the tool added
    off     what its users are told to do to be rid of it
    again   switches it on once more; None: by the same lines as before
    """

    draw: Callable[..., Any]
    off: Callable[[], Any]
    again: Callable[[], Any] | None = None


class Tool(NamedTuple):
    """A row. `package` must be installed for it; "" is our own."""

    label: str
    switch_on: Callable[[Any], Running]
    package: str = ""


def ours(settings: Clockwork | EncoderPropagation) -> Callable[[Any], Running]:
    return lambda pipe: Running(pipe, apply_policy(pipe, settings).disable)


def deepcache(pipe: Any) -> Running:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return Running(pipe, helper.disable, helper.enable)


def tomesd(use_rand: bool) -> Callable[[Any], Running]:
    """use_rand: tokens to merge into are drawn at random, its default."""
    def switch_on(pipe: Any) -> Running:
        import tomesd

        tomesd.apply_patch(pipe, ratio=0.5, use_rand=use_rand)
        return Running(pipe, lambda: tomesd.remove_patch(pipe))

    return switch_on


def tgate(pipe: Any) -> Running:
    from tgate import TgateSDLoader

    gate = STEPS // 2
    pipe = TgateSDLoader(pipe, gate_step=gate, num_inference_steps=STEPS)
    return Running(partial(pipe.tgate, gate_step=gate), lambda: None)  # the plain pipe(...) is all that it offers


def pyramid_attention_broadcast(pipe: Any) -> Running:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    # The pipeline does not tell its time, so the callback gives one at which attention may be skipped.
    apply_pyramid_attention_broadcast(pipe.unet, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=4,
        current_timestep_callback=lambda: 500))
    return _hooks_off(pipe, "pyramid_attention_broadcast")


def first_block_cache(pipe: Any) -> Running:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipe.unet, FirstBlockCacheConfig(threshold=0.2))
    return _hooks_off(pipe, "fbc_leader_block_hook", "fbc_block_hook")


def taylorseer(pipe: Any) -> Running:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    apply_taylorseer_cache(pipe.unet, TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2))
    return _hooks_off(pipe, "taylorseer_cache")


def _hooks_off(pipe: Any, *names: str) -> Running:
    """What `disable_cache` of diffusers' transformers does; UNets lack that method."""
    from diffusers.hooks import HookRegistry

    def off() -> None:
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
        for name in names:
            registry.remove_hook(name, recurse=True)

    return Running(pipe, off)


TOOLS = {
    "clockwork": Tool("`Clockwork(2)`", ours(Clockwork(2))),
    "encoder_propagation": Tool('`EncoderPropagation("every:4")`', ours(EncoderPropagation("every:4"))),
    "encoder_propagation_parallel": Tool("the same, parallel", ours(EncoderPropagation("every:4", parallel=True))),
    "deepcache": Tool("DeepCache", deepcache, "DeepCache"),
    "tomesd": Tool("tomesd", tomesd(use_rand=True), "tomesd"),
    "tomesd_fixed": Tool("tomesd, `use_rand=False`,", tomesd(use_rand=False), "tomesd"),
    "tgate": Tool("T-GATE", tgate, "tgate"),
    "pab": Tool("diffusers' pyramid attention broadcast", pyramid_attention_broadcast, "diffusers"),
    "first_block_cache": Tool("diffusers' first block cache", first_block_cache, "diffusers"),
    "taylorseer": Tool("diffusers' TaylorSeer", taylorseer, "diffusers"),
}


def installed(tool: Tool) -> str | None:
    """Version of a tool's package; "" for our own, None if it is not installed."""
    try:
        return version(tool.package) if tool.package else ""
    except PackageNotFoundError:
        return None
