"""The methods named after the colon of `--config=configs/NAME.py:clockwork,progressive`."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from .config import fields
from .errors import UserError, choose

Method = Callable[[ConfigDict], None]  # fills its own section of the config


def full(config: ConfigDict) -> None:
    """The whole network in every call: what the other policies are compared with, and the default."""
    config.policy = ConfigDict({"name": "full"})


def _last_time(config: ConfigDict) -> float:
    """Where DPM-Solver stops on the logSNR grid: step 0 of a discrete schedule, 1e-4 in continuous time."""
    return 1 / config.schedule.steps if "steps" in config.schedule else 1e-4


def dpm_solver(config: ConfigDict) -> None:
    """DPM-Solver-fast of order 3 as U-ViT evaluates with it (2206.00927)."""
    config.sampler.update(name="dpm_solver", order=3, grid="logsnr", t_end=_last_time(config), threshold="none")


def dpm_solver_pp(config: ConfigDict) -> None:
    """DPM-Solver++ 2M with x_0 clipped (2211.01095)."""
    config.sampler.update(name="dpm_solver_pp", order=2, grid="logsnr", t_end=_last_time(config), threshold="static",
                          threshold_value=1.0)


def progressive(config: ConfigDict) -> None:
    """One halving of progressive distillation with the paper's optimization on CIFAR-10 (2202.00512, appendix)."""
    config.distill = ConfigDict({
        "name": "progressive",
        "steps": config.sampler.steps // 2,  # of the student; its teacher makes twice as many
        "weighting": "snr_trunc",  # of the squared error of x_0: const, snr, snr_trunc, snr+1
    })
    config.train.update(steps=50_000, lr=5e-5, warmup=0, decay_from=0.0, weight_decay=0.0, clip_norm=1.0, ema=0.0)


def clockwork(config: ConfigDict) -> None:
    """Clockwork with the identity adaptor, every second step in full (2312.08128)."""
    config.policy = ConfigDict({
        "name": "clockwork",
        "clock": 2,  # every clock-th step runs the whole network
        "depth": 0,  # encoder blocks that always run; 0 is the network family's own
        "adaptor": "identity",  # identity, extrapolation, or the file of an adaptor
        "protect_first": 0,  # steps at the start, and at the end, that run in full
        "protect_last": 0,
        "cut": "auto",  # before or after the upsampler of the last deep block
    })


def clockwork_adaptor(config: ConfigDict) -> None:
    """Training of Clockwork's learned adaptor with the paper's optimization (2312.08128, section 4.1).

    For pipelines, as many prompts as the paper's 50,000 captions. For the chain, as much as fits ten minutes of a CPU:
    fewer channels, and a higher learning rate that falls to 0.
    """
    large = "pipeline" in config
    config.distill = ConfigDict({
        "name": "clockwork_adaptor",
        "adaptor": "resnet",  # resnet, unet, unet_light, and ridge, which is fitted in closed form
        "width": 0 if large else 128,  # channels inside; 0 is the adaptor's own
        "clock": 2,  # every clock-th step runs the whole network
        "depth": 0,  # encoder blocks that always run; 0 is the network family's own
        "protect_first": 0,  # steps at the start, and at the end, that run in full
        "protect_last": 0,
        "trajectories": 32 if large else 64,  # new ones a round: seeds, each with a label or prompt
        "updates": 64 if large else 400,  # in a round
        "rounds_kept": 4,  # newest rounds that an update draws from; ridge is fitted on as many
    })
    config.train.update(steps=100_000 if large else 4000, batch_size=16, lr=1e-4, betas=(0.9, 0.999), warmup=0,
                        weight_decay=0.0, decay_from=1.0, clip_norm=0.0, ema=0.0, log_every=50, save_every=500,
                        preview_every=0, eval_every=0)
    if not large:
        config.train.update(lr=1e-3, decay_from=0.5)


def encoder_propagation(config: ConfigDict) -> None:
    """Faster Diffusion with the paper's key steps, one step after another and without prior noise (2312.09608)."""
    config.policy = ConfigDict({
        "name": "encoder_propagation",
        "key_steps": "paper",  # paper, every:4, 0,1,2,3,5,10: steps that run the encoder
        "parallel": False,  # decode the steps between two key steps in one batch
        "max_parallel": 64,  # steps in such a batch at most
        "prior_noise": 0.0,  # alpha of prior noise injection; the paper's is 0.003
        "prior_from": 0.5,  # below this t
    })


METHODS: dict[str, Method] = {"full": full, "dpm_solver": dpm_solver, "dpm_solver_pp": dpm_solver_pp,
                              "progressive": progressive, "clockwork": clockwork,
                              "clockwork_adaptor": clockwork_adaptor,
                              "encoder_propagation": encoder_propagation}


def apply_methods(config: ConfigDict, methods: str, table: Mapping[str, Method]) -> None:
    """Let each named method fill its section of the config.

    `methods` is a comma list of names of `table`; "" names none. Raises UserError for an unknown name and for
    two methods that set one field to different values (two policies), since the later would silently win.

    >>> config = ConfigDict({"policy": {"name": "full", "clock": 1}})
    >>> table = {"clockwork": lambda config: config.policy.update(name="clockwork", clock=4)}
    >>> apply_methods(config, "clockwork", table)
    >>> config.policy.name, config.policy.clock
    ('clockwork', 4)
    """
    owners: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in methods.split(","))):
        method = choose("method after the colon of --config", name, table)
        before = fields(config)
        method(config)
        after = fields(config)
        for field in after:
            if field in before and before[field] == after[field]:
                continue
            if field in owners:
                both = f"{owners[field]} and {name} both set {field}"
                raise UserError(f"methods {methods!r} after the colon of --config: {both}; name one of them")
            owners[field] = name
