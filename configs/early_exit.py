"""The sweep of `python -m libs.compare --grid=configs/early_exit.py`: quality and cost of early exit on CIFAR-10.

The released U-ViT before fine-tuning and the early-exit model after it, both at full depth; then the latter
    per_sample  at several thresholds
    schedule    a fixed depth a step, calibrated for several layer ratios
    by_step     both again, with uncertainty counted by how far it moves the image in its step (policy.by_step)
    fixed       one exit layer for all steps
    split       1 or 3 layers in the first steps and all in the rest, as DuoDiff samples with two networks (2410.09633)
each beside plain sampling with the steps that cost as much. The same of the released student of 8 steps, beside it before
fine-tuning and beside the student of 4 steps. With fewer steps than it was distilled to a student is out of its element, but
that is what its early exits compete with. The cells of a checkpoint that is not there are left out.

    python -m libs.compare --grid=configs/early_exit.py --cells='*student_8*'
"""

LAYERS = 13  # of the U-ViT: depth + 1
CONFIG = "configs/cifar10_uvit_tiny.py"
MODEL = "cifar10_uvit_tiny_early_exit"
STUDENT = "cifar10_uvit_student_8_early_exit"
SAMPLERS = [("dpm_solver_pp", 8), ("dpm_solver_pp", 20), ("ddim", 50), ("dpm_solver", 50)]
THRESHOLDS = (0.8, 0.85, 0.9, 0.92, 0.95, 0.98)
STUDENT_THRESHOLDS = (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)  # its heads learned final_gap, which is nearer to 1
RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8)
BY_STEP_THRESHOLDS = (0.96, 0.97, 0.98, 0.99)
BY_STEP_RATIOS = (0.4, 0.5, 0.6, 0.7)
FIXED = (5, 7, 9, 11)
SPLITS = {3: (0.3, 0.5, 0.7), 1: (0.5,)}  # layers of DuoDiff's small network: its shares of the steps


def exits(label: str, family: str, **settings) -> dict:
    return {"policy": "early_exit", "label": label, "family": family, "settings": settings, "cost_images": 32}


def per_sample(threshold: float) -> dict:
    return exits(f"threshold_{threshold}", "early exit, per sample", threshold=threshold)


def schedule(ratio: float) -> dict:
    return exits(f"schedule_{ratio}", "early exit, schedule", mode="schedule", target_layer_ratio=ratio)


def by_step() -> list[dict]:
    """Thresholds and schedules with uncertainty counted by how far it moves the image in its step."""
    return [*(exits(f"by_step_threshold_{threshold}", "per sample, by step", by_step=True, threshold=threshold)
              for threshold in BY_STEP_THRESHOLDS),
            *(exits(f"by_step_schedule_{ratio}", "schedule, by step", by_step=True, mode="schedule",
                    target_layer_ratio=ratio) for ratio in BY_STEP_RATIOS)]


def depths(label: str, family: str, text: str) -> dict:
    """`text` is a schedule, LAYERSxSTEPS of each part."""
    return exits(label, family, mode="schedule", schedule=text)


def methods(steps: int, thresholds: tuple[float, ...] = THRESHOLDS) -> list[dict]:
    """All of the sweep at so many steps."""
    table = [{"label": "full"}, *map(per_sample, thresholds), *map(schedule, RATIOS), *by_step()]
    table += [depths(f"layers_{layers}", "fixed exit layer", f"{layers}x{steps}") for layers in FIXED]
    for layers, shares in SPLITS.items():
        for share in shares:
            first = round(share * steps)
            text = f"{layers}x{first},{LAYERS}x{steps - first}"
            table.append(depths(f"split_{layers}_{share}", f"{layers} of the layers, then all", text))
    return table


def get_grid() -> list[dict]:
    students = {"config": CONFIG, "sampler": "ddim"}
    cells = [students | {"checkpoint": f"cifar10_uvit_student_{steps}", "steps": steps, "fixed": True} for steps in (4, 8)]
    cells += [students | {"checkpoint": STUDENT, "steps": 8} | method for method in methods(8, STUDENT_THRESHOLDS)]
    for sampler, steps in SAMPLERS:
        at = {"config": CONFIG, "sampler": sampler, "steps": steps}
        cells += [at, *(at | {"checkpoint": MODEL} | method for method in methods(steps))]
    return cells
