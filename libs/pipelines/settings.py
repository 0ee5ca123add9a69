"""What the configs of diffusers pipelines share."""

from ml_collections import ConfigDict

from ..defaults import base_config
from ..methods import METHODS, apply_methods

# Of a chain of our own links: a pipeline brings them along. The methods that fill them do not apply to it.
CHAIN_SECTIONS = ("checkpoint", "backbone", "schedule", "denoiser", "cond", "codec", "data", "sampler")
PIPELINE_METHODS = ("full", "clockwork", "encoder_propagation", "clockwork_adaptor")
TRANSFORMER_METHODS = ("full",)  # feature reuse needs the skips of a UNet
TRANSFORMERS = ("pixart", "sd3")


def pipeline_config(methods: str, name: str, path: str, **options) -> ConfigDict:
    """A config that samples from prompts with the diffusers pipeline `path` (folder or hub id).

    methods: what stands after the colon of --config. name: the kind of pipeline, see libs/pipelines/sampling.py.
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
        "scheduler": "ddim",  # see libs/pipelines/sampling.py; own is the one that the pipeline comes with
        "steps": 50,
        "guidance": 7.5,  # w of uncond + w (cond - uncond); 1 is no guidance
        "negative_prompt": "",
        "height": 0,  # pixels; 0 is what the model was made for
        "width": 0,
        **options,
    }
    config.eval.metrics = ("fid", "clip_score")
    known = TRANSFORMER_METHODS if name in TRANSFORMERS else PIPELINE_METHODS
    apply_methods(config, methods, {method: METHODS[method] for method in known})
    return config
