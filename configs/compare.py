"""The grid of `bash scripts/compare.sh`: the released CIFAR-10 UNet x caching policy x sampler x steps.

Cheap cells come first. Plain sampling at the same sampler and steps, and with the steps that cost what a method costs
(equal multiply-adds, rounded to the nearest whole step, at least 1), join every method by themselves.

A method is a policy with its settings (fields of config.policy); `needs` is a file without which it is left out. The
students of progressive distillation are models of their own, which sample in their own number of steps; policies come on
top of them.
"""

RESNET = "assets/adaptors/clockwork_resnet_cifar10_unet.safetensors"
NOISE = {"prior_noise": 0.003}

METHODS = [
    {"label": "full", "policy": "full"},
    *({"label": f"clockwork_{clock}", "policy": "clockwork", "settings": {"clock": clock}} for clock in (2, 3, 4)),
    {"label": "clockwork_2_extrapolation", "policy": "clockwork",
     "settings": {"clock": 2, "adaptor": "extrapolation"}},
    {"label": "clockwork_2_resnet", "policy": "clockwork", "settings": {"clock": 2, "adaptor": RESNET}, "needs": RESNET},
]
for keys, label in (("every:2", "every2"), ("every:4", "every4"), ("paper", "paper")):
    METHODS += [
        {"label": f"encoder_{label}", "policy": "encoder_propagation", "settings": {"key_steps": keys}},
        {"label": f"encoder_{label}_noise", "policy": "encoder_propagation", "settings": {"key_steps": keys} | NOISE},
    ]

ON_STUDENTS = [method for method in METHODS if method["label"] in ("full", "clockwork_2", "encoder_every2")]
STUDENTS = [{"checkpoint": f"cifar10_unet_student_{steps}", "steps": steps} for steps in (4, 8)]
SAMPLERS = [("dpm_solver_pp", 8), ("dpm_solver_pp", 20), ("ddim", 50)]


def get_grid() -> list[dict]:
    unet = {"config": "configs/cifar10_unet.py"}
    students = [unet | {"sampler": "ddim", "fixed": True} | student | method
                for student in STUDENTS for method in ON_STUDENTS]
    return students + [unet | {"sampler": sampler, "steps": steps} | method
                       for sampler, steps in SAMPLERS for method in METHODS]
