"""Text to image in pixels: a U-ViT of 32 x 32 pixels that learns from shards of captioned pictures. No paper's row.

scripts/emoji32_text.sh makes the text encoder of the captions' words, trains, distils a LoRA of a few steps
(:flash, 2406.02347) and draws the teacher's pictures above the student's. Its commands are of this form:
    python train.py --config=configs/emoji32_text.py --config.data.path=data/emoji64.tar --workdir=runs/emoji32_text/teacher
    python distillate.py --config=configs/emoji32_text.py:flash --config.data.path=data/emoji64.tar --checkpoint=runs/emoji32_text/teacher --workdir=runs/emoji32_text/student
    python sample.py --config=configs/emoji32_text.py --checkpoint=runs/emoji32_text/student --prompts="emoji of purple heart" --seeds=0-15 --out=outputs/emoji32_text
Of 243 emoji 9,000 updates of 16 learn all but the busiest pictures by heart (a loss of 0.064); of 1,660 emoji 4,500 gave
blotches.
"""

from functools import partial

from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods, flash

FLASH = partial(
    flash, lora_rank=32, guidance="1.5,3", teacher_steps="8", stage_updates="60,60,80,100", discriminator_lr=1e-4,
    train={"steps": 300, "batch_size": 16, "lr": 5e-4, "decay_from": 0.5, "log_every": 10, "save_every": 50,
           "preview_every": 100, "preview_images": 8},
)


def get_config(methods: str = ""):
    config = base_config()
    config.compute.update(rows=32, attention="plain")  # on a CPU the fused kernel's backward pass takes longer
    config.backbone = uvit_backbone(32, 4, 256, 6, 4, clip_dim=64, num_clip_token=16)
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="text", text_encoder="runs/emoji32_text/text_encoder", tokens=16, drop=0.1)
    config.data.update(name="webdataset", path="data/emoji64.tar", image_size=32, flip=False)
    config.sampler.update(name="dpm_solver_pp", order=2, steps=25, grid="logsnr", t_end=1 / 1024, threshold="static",
                          cfg_scale=2.0)
    config.train.update(
        steps=9000, batch_size=16, lr=7e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay_from=0.4,
        clip_norm=1.0, ema=0.998, log_every=50, save_every=500, preview_every=0,
    )
    config.eval.metrics = ()
    apply_methods(config, methods, METHODS | {"flash": FLASH})
    return config
