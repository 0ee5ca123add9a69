"""The methods named after the colon of `--config=configs/NAME.py:clockwork,progressive`."""

from collections.abc import Callable, Mapping
from functools import partial

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


def clipped(config: ConfigDict) -> None:
    """diffusion_distiller's clipped sampler: DDIM with x_0 and eps clipped at +-clipping_value."""
    config.sampler.update(name="clipped", threshold="none")
    config.sampler.clipping_value = 1.2


def cosine(config: ConfigDict) -> None:
    """The cosine schedule in continuous time, and log SNR as the network's time input (2202.00512, appendix)."""
    config.schedule = ConfigDict({"name": "cosine"})
    config.denoiser.time_input = "logsnr"


def progressive(config: ConfigDict) -> None:
    """Progressive distillation with the paper's objective and learning rate (2202.00512, appendix); Adam's betas and
    the batch are those with which the model was trained.

    One halving, unless two of start_steps, end_steps and stages are given. The fields of the train section are a
    stage's.
    """
    config.distill = ConfigDict({
        "name": "progressive",
        "start_steps": 0,  # of the first teacher; 0: the number it was distilled to, else sampler.steps
        "end_steps": 0,  # of the last student; 0: by `stages`
        "stages": 0,  # halvings; 0: from start_steps to end_steps, else 1
        "updates": (),  # of each stage, or one number for all; () is train.steps, twice that for 2 steps and 1
        "lr": (),  # likewise; () is train.lr
        "ema": (),  # likewise; () is train.ema
        "target": "ddim2",  # where two DDIM steps of the teacher end; x2 is the teacher's second estimate
        "weighting": "snr_trunc",  # of the squared error of x_0: const, snr, snr_trunc, snr+1, gamma
        "gamma": 0.0,  # exponent of the weighting gamma
        "prediction": "",  # of the students: v, x_0, eps, eps_damped, both; "" is the teacher's, but v for one of eps
        "convert_updates": 10_000,  # of stage 0, which trains such a teacher on to that prediction
        "convert_lr": 2e-4,
        "convert_ema": 0.999,
        "clip_teacher": False,  # the teacher's x_0 to -1 ... 1
        "time_label": "exact",  # the teacher's own times; legacy: diffusion_distiller's, which fall behind
        "sampler": "ddim",  # by which students sample; ddpm is diffusion_distiller's
        "cfg_scale": 1.0,  # of the first teacher's guidance, taken over by students that need none
        "cfg_range": (),  # lowest and highest scale: an input of the students, which need one call a step
        "pair_images": 16,  # seeds in the picture of each student below its teacher; 0 draws none
        "report_images": 0,  # images by which each student, and in the end the model itself, is measured; 0 is none
    })
    config.train.update(steps=50_000, lr=5e-5, warmup=0, decay_from=0.0, weight_decay=0.0, clip_norm=1.0, ema=0.0,
                        eval_every=0)


def paper(config: ConfigDict) -> None:
    """Progressive distillation with the paper's whole optimization on CIFAR-10 (2202.00512, appendix)."""
    progressive(config)
    config.train.update(batch_size=128, betas=(0.9, 0.999))


def hramchenko(config: ConfigDict) -> None:
    """Progressive distillation as diffusion_distiller does it: other target, labels, clipping, sampler.

    Its lengths are in images, 5,000 a halving in batches of 3.
    """
    progressive(config)
    config.distill.update(target="x2", weighting="gamma", time_label="legacy", clip_teacher=True, sampler="ddpm")
    config.train.update(steps=1667, batch_size=3, lr=1.5e-5, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=0.0,
                        ema=0.999)


def flash(config: ConfigDict, **published) -> None:
    """Flash Diffusion (2406.02347): a student of a few steps, from a teacher's solutions, its score and its features.

    Lists are strings: a value for each stage, or one for all; `;` parts stages whose values are lists themselves.
    published: fields of the distill section, and as `train` of the train section, that were published for a model.
    """
    train = published.pop("train", {})
    config.distill = ConfigDict({
        "name": "flash",
        "student_steps": 4,  # by which the student samples; its times are the modes below
        "stage_updates": "5000,5000,5000,5000",  # the last stage goes on to train.steps
        "teacher_steps": "32",  # K, of the teacher's grid, on which the student starts
        "mode_weights": "0,0,.5,.5; .1,.3,.3,.3; .25,.25,.25,.25; .4,.2,.2,.2",  # of t = 1, 3/4, 1/2, 1/4
        "spread": 0.5,  # of each mode over its neighbours on the grid
        "start": "modes",  # modes, uniform: any step of the grid
        "start_per": "image",  # image; batch: one start for all, as released
        "guidance": "1",  # lowest,highest scale of the teacher; 1 is none
        "distil_scale": "1",  # of the three losses
        "dmd_scale": "0,.3,.5,.7",
        "adversarial_scale": "0,.1,.2,.3",
        "distance": "l2",  # of the distillation loss: l2, l1, lpips
        "gan": "lsgan",  # hinge, vanilla, non_saturating, wgan, lsgan
        "adversarial_times": "10,250,500,750",  # steps of 1,000 at which the discriminator looks
        "real": "data",  # what it takes for real: data, teacher
        "teacher_solver": "dpm_solver_pp",  # dpm_solver_pp, ddim (Euler under flow matching)
        "teacher_policy": "full",  # of its roll-outs: full, clockwork:2 (the clock), encoder_propagation:every:2 (keys)
        "lora_rank": 0,  # of a LoRA student, which needs no second network; 0 trains the whole network
        "lora_alpha": 0,  # 0 is the rank
        "lora_targets": "",  # layers by the ends of their names; "" is the family's own
        "discriminator_width": 64,  # channels after its first layer
        "discriminator_layers": 0,  # 0 is what the size of the features asks for
        "discriminator_features": "middle",  # of the teacher: middle, output (as released for transformers)
        "discriminator_lr": 1e-5,
        **published,
    })
    config.train.update({"steps": 20_000, "batch_size": 64, "lr": 1e-5, "betas": (0.9, 0.999), "warmup": 0,
                         "decay_from": 1.0, "weight_decay": 0.01, "clip_norm": 0.0, "ema": 0.0, "eval_every": 0,
                         **train})


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


def early_exit(config: ConfigDict, threshold: float = 0.92, **train) -> None:
    """AdaDiff's early exit with the released code's loss (2309.17074).

    threshold, train   certainty and fields of the train section that were published for a data set
    """
    if config.backbone.get("name") != "uvit":
        raise UserError(f"method early_exit: it leaves a U-ViT between two blocks; this config's backbone.name is "
                        f"{config.backbone.get('name')!r}")
    with config.unlocked():
        config.backbone.uem = "released"  # the uncertainty heads' form; paper: they see the timestep embedding too
    config.policy = ConfigDict({
        "name": "early_exit",
        "mode": "per_sample",  # per_sample; batch_mean, as released; schedule: a fixed depth a step
        "threshold": threshold,  # certainty above which an image leaves; 1 is never
        "target_layer_ratio": 0.0,  # share of the layers to run: finds the threshold; 0 takes the one above
        "by_step": False,  # count uncertainty by how far it moves the image in the call's step
        "check_every": 1,  # layers between two looks at the certainty
        "compact_from": 0.125,  # share of the rows that must be done before the others move together
        "patience": 1,  # in-blocks that must be certain, of which the last is the exit; released: 2
        "joint": True,  # the rows of a guided pair leave together
        "schedule": "",  # of mode schedule: a file, or layers x steps as 7x30,13x20; "" calibrates one
        "calibration_images": 16,  # for target_layer_ratio and such a schedule
        "quantile": 0.5,  # of these images' exit layers, which becomes the step's depth
    })
    config.early_exit = ConfigDict({
        "lambda_u": 1.0,  # of the uncertainty loss
        "beta_ual": 1.0,  # of the layer-wise loss
        "target": "eps_error",  # of the heads: eps_error, final_gap
        "u_reduction": "mean",  # over the layers: mean, sum
        "ual_norm": "sum1",  # weights of the layers sum to 1; none: they are the certainties
        "ual_per_sample": False,  # weights of each image; else of the batch's mean
        "ual_last_layer": True,  # the layer-wise loss counts the last layer too
        "ual_detach": False,  # no gradient through those weights
        "ual_from": 0.0,  # t below which the layer-wise loss does not count
        "noise_power": 0.0,  # p: errors count max(1, SNR^-p) times; 0 as published, 1 as errors of x_0
        "freeze_backbone": False,  # train the heads alone
        "learn_from": "data",  # start: the target is what the network said before; for students of few steps; or a
        # checkpoint, such as that of which a training that goes on started
        "angle_power": 0.0,  # p: a student's times are drawn in proportion to the angles of its steps, to the power p
        "prediction": "",  # what the layers learn to predict: v, x_0, eps, ...; "" is what the network predicts already
    })
    config.eval.benchmark_rows = (1, 16, 128)  # its claim is time at any number of rows
    config.train.update(train)


def early_exit_paper(config: ConfigDict, **published) -> None:
    """AdaDiff's early exit with the paper's loss and heads that see the time (2309.17074, equations 5 to 9)."""
    early_exit(config, **published)
    config.backbone.uem = "paper"
    config.early_exit.update(u_reduction="sum", ual_norm="none", ual_per_sample=True, ual_last_layer=False)


METHODS: dict[str, Method] = {
    "full": full, "dpm_solver": dpm_solver, "dpm_solver_pp": dpm_solver_pp, "clipped": clipped,
    "cosine": cosine, "progressive": progressive, "paper": paper, "hramchenko": hramchenko, "flash": flash,
    "clockwork": clockwork, "clockwork_adaptor": clockwork_adaptor, "encoder_propagation": encoder_propagation,
    "early_exit": early_exit, "early_exit_paper": early_exit_paper,
}


def with_early_exit(threshold: float, **train) -> dict[str, Method]:
    """All methods, those of early exit with what was published for a data set."""
    return METHODS | {name: partial(METHODS[name], threshold=threshold, **train)
                      for name in ("early_exit", "early_exit_paper")}


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
