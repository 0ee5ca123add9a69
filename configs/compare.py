"""The grid of `bash scripts/compare.sh`: the released CIFAR-10 UNet x caching policy x sampler x steps.

Cheap cells come first. Plain sampling at the same sampler and steps, and with the steps that cost what a method costs
(equal multiply-adds, rounded to the nearest whole step, at least 1), join every method by themselves.

A method is a policy with its settings (fields of config.policy); `needs` is a file without which it is left out. The
students of progressive distillation and of Flash Diffusion are models of their own, which sample in their own number of
steps; policies come on top of them. Of early exit on U-ViT here are a few cells of configs/early_exit.py, which has them all.
"""

RESNET, RIDGE = (f"assets/adaptors/clockwork_{kind}_cifar10_unet.safetensors" for kind in ("resnet", "ridge"))
NOISE = {"prior_noise": 0.003}

METHODS = [
    {"label": "full", "policy": "full"},
    *({"label": f"clockwork_{clock}", "policy": "clockwork", "settings": {"clock": clock}} for clock in (2, 3, 4)),
    {"label": "clockwork_2_extrapolation", "policy": "clockwork",
     "settings": {"clock": 2, "adaptor": "extrapolation"}},
    {"label": "clockwork_2_resnet", "policy": "clockwork", "settings": {"clock": 2, "adaptor": RESNET}, "needs": RESNET},
    {"label": "clockwork_2_ridge", "policy": "clockwork", "settings": {"clock": 2, "adaptor": RIDGE}, "needs": RIDGE},
]
for keys, label in (("every:2", "every2"), ("every:4", "every4"), ("paper", "paper")):
    METHODS += [
        {"label": f"encoder_{label}", "policy": "encoder_propagation", "settings": {"key_steps": keys}},
        {"label": f"encoder_{label}_noise", "policy": "encoder_propagation", "settings": {"key_steps": keys} | NOISE},
    ]

ON_STUDENTS = [method for method in METHODS if method["label"] in ("full", "clockwork_2", "encoder_every2")]
STUDENTS = [{"checkpoint": f"cifar10_unet_student_{steps}", "sampler": "ddim", "steps": steps} for steps in (4, 8)]
STUDENTS += [{"checkpoint": "cifar10_unet_flash", "sampler": "lcm", "steps": steps} for steps in (2, 4)]
SAMPLERS = [("dpm_solver_pp", 8), ("dpm_solver_pp", 20), ("ddim", 50)]

UVIT = {"config": "configs/cifar10_uvit_tiny.py"}
UVIT_STUDENTS = [UVIT | {"checkpoint": f"cifar10_uvit_student_{steps}", "sampler": "ddim", "steps": steps, "fixed": True}
                 for steps in (4, 8)]
AS_MANY_CALLS = [("ddim", 4), ("dpm_solver_pp", 4), ("ddim", 8)]  # as the students; their 8 of DPM-Solver++ are there
EXIT = UVIT | {"checkpoint": "cifar10_uvit_tiny_early_exit"}
EARLY_EXIT = {"policy": "early_exit", "cost_images": 32}
SCHEDULE = {"label": "by_step_schedule_0.6",
            "settings": {"by_step": True, "mode": "schedule", "target_layer_ratio": 0.6}}
PER_SAMPLE = {"label": "by_step_threshold_0.98", "settings": {"by_step": True, "threshold": 0.98}}
SPLIT = {"label": "split_1_0.5", "settings": {"mode": "schedule", "schedule": "1x4,13x4"}}
ON_UVIT = [UVIT, EXIT, *(EXIT | EARLY_EXIT | exits for exits in (PER_SAMPLE, SCHEDULE))]
EXIT_STUDENT = UVIT | {"checkpoint": "cifar10_uvit_student_8_early_exit", "sampler": "ddim", "steps": 8, "fixed": True}
UVIT_SAMPLERS = [("dpm_solver_pp", 8), ("dpm_solver_pp", 20), ("ddim", 50), ("dpm_solver", 50)]


def get_grid() -> list[dict]:
    unet = {"config": "configs/cifar10_unet.py"}
    students = [unet | {"fixed": True} | student | method
                for student in STUDENTS for method in ON_STUDENTS]
    cells = students + [unet | {"sampler": sampler, "steps": steps} | method
                        for sampler, steps in SAMPLERS for method in METHODS]
    cells += [student | method for student in UVIT_STUDENTS for method in ON_STUDENTS]
    cells += [UVIT | {"sampler": sampler, "steps": steps} for sampler, steps in AS_MANY_CALLS]
    cells += [unet | {"sampler": sampler, "steps": steps}
              for sampler, steps in [("ddim", 2), ("dpm_solver_pp", 2), *AS_MANY_CALLS]]
    cells += [EXIT_STUDENT, *(EXIT_STUDENT | EARLY_EXIT | exits for exits in (PER_SAMPLE, SCHEDULE, SPLIT))]
    cells += [uvit | {"sampler": sampler, "steps": steps} for sampler, steps in UVIT_SAMPLERS for uvit in ON_UVIT]
    return sorted(cells, key=lambda cell: cell["steps"])
