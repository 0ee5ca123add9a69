"""Stable Diffusion 1.5, text to image: 512 x 512 pixels, a UNet of 860 M parameters, with or without feature reuse.

Reproduces, on MS-COCO's validation captions (scripts/mscoco_sd15.sh prepares and runs both protocols):
  Faster Diffusion (2312.09608), 10,000 captions of COCO 2017, DDIM 50 steps, guidance 7.5:
    FID 21.75 -> 21.08 and CLIP score 0.773 -> 0.783 (2.5 cos) with encoder propagation, 0.74 of the multiply-adds
  Clockwork (2312.08128), COCO 2017-5K, DPM-Solver++ 8 steps, clock 2 with the learned adaptor:
    FID 24.64 -> 24.11 and CLIP score 0.300 -> 0.295 (cos), 0.68 of the multiply-adds
Neither paper says how it resized the real images or which it took, so expect the differences, not the FIDs.

Sample plain, with encoder propagation decoded in parallel, and with Clockwork:
    python sample.py --config=configs/sd15.py --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sd15
    python sample.py --config=configs/sd15.py:encoder_propagation --config.policy.parallel=true --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sd15_encoder_propagation --compare
    python sample.py --config=configs/sd15.py:clockwork --config.policy.clock=4 --config.compute.precision=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sd15_clockwork --compare
Sample and score COCO's captions, once they lie in data/coco:
    python sample.py --config=configs/sd15.py:clockwork --config.pipeline.scheduler=dpm_solver_pp --config.pipeline.steps=8 --prompts=data/coco/annotations/captions_val2017.json --seeds=0-4999 --out=outputs/sd15_coco
    python eval.py --config=configs/sd15.py --images=outputs/sd15_coco --config.eval.metrics=fid --image_size=256 --config.eval.reference=data/coco/val2017 --out=outputs/sd15_coco.fid.json
    python eval.py --config=configs/sd15.py --images=outputs/sd15_coco --config.eval.metrics=clip_score --prompts=data/coco/annotations/captions_val2017.json --out=outputs/sd15_coco.clip.json
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(methods, "sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5")
