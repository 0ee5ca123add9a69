"""What the configs of diffusers pipelines share."""

from ml_collections import ConfigDict

from ..defaults import base_config
from ..methods import METHODS, apply_methods, flash
from .flash_settings import FLASH

# Of a chain of our own links: a pipeline brings them along. The methods that fill them do not apply to it.
CHAIN_SECTIONS = ("checkpoint", "backbone", "schedule", "denoiser", "cond", "codec", "data", "sampler")
PIPELINE_METHODS = ("full", "clockwork", "encoder_propagation", "clockwork_adaptor", "flash")
TRANSFORMER_METHODS = ("full", "flash")  # feature reuse needs the skips of a UNet
TRANSFORMERS = ("pixart", "sd3")


def flash_pipeline(config: ConfigDict) -> None:
    """Flash Diffusion as published for this pipeline, and the images with captions that it learns from."""
    flash(config, **FLASH[config.pipeline.name])
    config.distill.text_encoder_device = "auto"  # cpu: its memory stays free, and a step waits for it
    chain = base_config()
    config.data, config.sampler = chain.data, chain.sampler
    # image_size: 0 is what the model was made for. flip: as published; a mirrored picture may contradict its caption.
    config.data.update(name="webdataset", path="", image_size=0, flip=False)


def pipeline_config(methods: str, name: str, path: str, **options) -> ConfigDict:
    """A config that samples from prompts with the diffusers pipeline `path` (folder or hub id).

    methods: what stands after the colon of --config. name: the kind of pipeline, see libs/pipelines/loading.py.
    options: fields of the `pipeline` section that differ from what is set here, or that this kind has more.
    """
    config = base_config()
    for section in CHAIN_SECTIONS:
        del config[section]
    del config.compute.attention
    config.compute.rows = 1
    config.pipeline = {
        "name": name,
        "path": path,
        "variant": "",  # of the weights' files, such as fp16
        "student": "",  # few-step student to sample with: folder, WORKDIR of distillate.py, or hub id; it brings its
        # scheduler, steps and guidance along
        "other_base": False,  # a student also on weights that it was not trained on
        "scheduler": "ddim",  # see libs/pipelines/loading.py; own is that of the pipeline, or its student
        "steps": 50,
        "guidance": 7.5,  # w of uncond + w (cond - uncond); 1 is no guidance
        "negative_prompt": "",
        "height": 0,  # pixels; 0 is what the model was made for
        "width": 0,
        **options,
    }
    config.eval.metrics = ("fid", "clip_score")
    known = TRANSFORMER_METHODS if name in TRANSFORMERS else PIPELINE_METHODS
    table = METHODS | {"flash": flash_pipeline}
    apply_methods(config, methods, {method: table[method] for method in known
                                    if method != "flash" or name in FLASH})
    return config
