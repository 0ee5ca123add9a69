"""A model and images of your own, each from a function in a file of yours; trained, distilled and sampled as all others.

The model: `make_model()` returns an nn.Module with `image_size = [1, C, H, W]`; its call is `net(x, t)`, x (b, C, H, W)
and t (b,) float32, 0 to 1023, and it returns v, shaped as x. With labels the call is `net(x, t, y=y)`. The images:
`make_dataset()`, see libs/data/loaders.py; or --config.data.name=folder and a --config.data.path.

    python train.py --config=configs/own_model.py --config.backbone.factory=my_model.py:make_model --config.data.factory=my_model.py:make_dataset --config.data.image_size=64 --workdir=runs/own
    python distillate.py --config=configs/own_model.py:progressive --config.backbone.factory=my_model.py:make_model --config.data.factory=my_model.py:make_dataset --config.data.image_size=64 --config.distill.start_steps=64 --config.distill.end_steps=4 --checkpoint=runs/own --workdir=runs/own_students
    python sample.py --config=configs/own_model.py --config.backbone.factory=my_model.py:make_model --config.data.image_size=64 --checkpoint=runs/own_students --seeds=0-15 --out=outputs/own

diffusion_distiller's module files and their `checkpoint.pt` are read as they are. Its CelebA weights know images as BGR,
and its make_dataset hands them over so, where RGB is expected here: with those take --config.data.name=lmdb and
--config.codec.order=bgr. Weights never choose the code that runs: every command names the model. The hyperparameters
are a start, not a recipe.
"""

from libs.defaults import base_config
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.backbone = {"name": "factory", "factory": ""}  # path/to/module.py:function
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.codec.order = "rgb"
    config.data.update(name="factory", path="")
    config.data.factory = ""  # path/to/module.py:function
    config.sampler.update(name="ddim", steps=64, grid="trailing", threshold="static")
    config.train.update(
        steps=100_000, batch_size=64, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, warmup=500, clip_norm=1.0,
        ema=0.999,
    )
    config.eval.metrics = ()
    apply_methods(config, methods, METHODS)
    return config
