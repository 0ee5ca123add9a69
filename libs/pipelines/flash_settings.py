"""Flash Diffusion's published settings (2406.02347) of each pipeline: what the method `flash` is given for it.

Fields of the `distill` section, and as `train` of the train section. Two are not as released, for the reasons that the
paper's ablation and its text give: the distillation loss is l2, not LPIPS, and the discriminator of a transformer sees
the middle of the teacher, not its output. Batches are those of all GPUs.

The unconditional text that guides the teacher is `negative_prompt`, see `PipelineModel`: "" is the empty text for
Stable Diffusion 1.5 and PixArt-alpha, and zeros for SDXL. Stable Diffusion 3's is a text of flaws; the wording is ours.
"""

from typing import Any

FLAWS = "low quality, blurry, out of focus, deformed, extra limbs, bad anatomy, watermark, text, jpeg artifacts"


def _settings(rank: int, guidance: str, batch_size: int, updates: int = 5000, **distill) -> dict[str, Any]:
    """updates: of each of the four stages."""
    return {
        "stage_updates": ",".join([str(updates)] * 4),
        "teacher_steps": "32",
        "guidance": guidance,
        "distil_scale": "1",
        "dmd_scale": "0,.3,.5,.7",
        "adversarial_scale": "0,.1,.2,.3",
        "lora_rank": rank,
        "discriminator_width": 64,
        "discriminator_lr": 1e-5,
        "negative_prompt": "",
        **distill,
        "train": {"steps": 4 * updates, "batch_size": batch_size, "lr": 1e-5},
    }


FLASH: dict[str, dict[str, Any]] = {  # by pipeline.name
    "sd15": _settings(rank=128, guidance="3,13", batch_size=8),
    "sdxl": _settings(rank=64, guidance="3,13", batch_size=8, discriminator_width=256),
    "sdxl_adapter": _settings(rank=64, guidance="3,13", batch_size=8, teacher_steps="16"),
    "pixart": _settings(rank=64, guidance="2,9", batch_size=8, updates=10_000, teacher_steps="16", lora_alpha=8,
                        adversarial_scale="0,.05,.1,.2"),
    "sd3": _settings(rank=64, guidance="7,13", batch_size=4, lora_alpha=8, adversarial_scale="0,.1,.3,.5",
                     teacher_solver="ddim", negative_prompt=FLAWS),
}
