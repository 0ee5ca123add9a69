"""The fields that every config has. A file in configs/ starts from here and changes what differs."""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """All sections with their defaults; `backbone` and `schedule` are filled by the config file."""
    return ConfigDict({
        "seed": 0,  # of training; images have seeds of their own
        "checkpoint": "",  # weights that sample.py and eval.py use: a name in assets/checkpoints, or a path
        "compute": {
            "device": "auto",  # auto, cpu, cuda, cuda:1, mps
            "precision": "fp32",  # fp32, bf16, fp16: of the network; samplers and losses stay in fp32
            "compile": False,  # torch.compile the network
            "compile_mode": "default",  # of sampling; reduce-overhead, max-autotune: into CUDA graphs
            "attention": "sdpa",  # sdpa, xformers, plain (U-ViT)
            "rows": 16,  # images in one call of the network when sampling
        },
        "backbone": {"name": "uvit"},
        "schedule": {"name": "vp_linear"},
        "denoiser": {"prediction": "eps", "time_input": "999t"},
        "cond": {
            "kind": "none",  # none, label, text, image
            "num_classes": 0,  # labels go from 0 to num_classes - 1
            "null_label": -1,  # the label that means no class; -1 if the network has none
            "drop": 0.0,  # rate at which training replaces a label by the null label, a text by the empty one, an
            # image's condition by zeros
            "task": "super_resolution",  # of images: super_resolution, inpainting, label, text, pooled_text,
            # path/to/module.py:function; a comma list joins several
            "factor": 4,  # of super-resolution
            "masks": ("boxes", "halves", "strokes"),  # of inpainting, one drawn for every image
            "text_encoder": "openai/clip-vit-large-patch14",  # of a text: hub id or folder of CLIP's or T5's encoder
            "tokens": 77,  # to which a text is cut off or padded
            "text_null": "empty",  # of a task: what stands for no text, the empty one's embedding or zeros
            "text_drop": -1.0,  # of a task: rate at which training leaves texts out; -1 is cond.drop
        },
        "codec": {"name": "pixel"},
        "data": {
            "name": "cifar10",  # see libs/data/loaders.py; features: what prepare_data.py latents wrote
            "path": "data/cifar10",
            "split": "train",  # train, test: of the data sets that have both
            "image_size": 32,
            "channels": 3,
            "labels": "none",  # of an image folder: none, or folders
            "download": False,
            "flip": True,  # horizontal flips in training
            "hold_out": 0,  # every so-many-th image is not learnt from, see prepare_data.py held_out; 0 is none
            # Of webdataset (path: addresses of shards, see libs/data/shard_urls.py) and captioned_folder:
            "keys": "",  # extensions that each sample has to have, as in "json edge.png"
            "caption_key": "caption",  # field of a sample's json; a txt needs none
            "score_key": "aesthetic_score",  # field of a sample's json
            "min_score": 0.0,  # samples with a lower score, or without one, are left out; 0 takes all
            "maps": "",  # before an image is cut and resized, as in "crop 1024; canny": libs/data/shard_filters.py
            "shard_cache": "",  # folder of fetched shards; empty: one in ~/.cache
            "shard_cache_gb": 50.0,  # of which so much stays
        },
        "policy": {"name": "full"},
        "sampler": {
            "name": "ddim",  # see libs/samplers
            "steps": 50,  # network evaluations an image
            "grid": "uniform",  # uniform, logsnr, trailing
            "t_start": 1.0,
            "t_end": 0.0,  # 0 is clean data; the logsnr grid needs more
            "order": 2,  # DPM-Solver's: 1, 2, 3
            "eta": 0.0,  # DDIM's noise: 0 none, 1 as much as DDPM
            "variance": "small",  # DDPM's: small, large
            "lower_order_final": True,  # DPM-Solver++ multistep, fewer than 15 steps
            "exact_third": False,  # DPM-Solver++ multistep of order 3: see libs/samplers/dpm_solver_pp.py
            "threshold": "none",  # of x_0: none, static, dynamic
            "threshold_value": 1.0,  # static: clip at +-value; dynamic: the quantile
            "cfg_scale": 1.0,  # w of uncond + w (cond - uncond); 1 is no guidance
        },
        "train": {
            "steps": 500_000,  # optimizer updates
            "batch_size": 128,  # images in an update, over all processes
            "accumulate": 1,  # parts that a process cuts its share of the batch into
            "lr": 2e-4,
            "betas": (0.99, 0.999),
            "weight_decay": 0.03,  # not on norms, biases and position embeddings
            "warmup": 2500,  # steps from 0 to lr
            "decay_from": 1.0,  # fraction of the steps from which lr falls linearly to 0; 1 is never
            "clip_norm": 0.0,  # of the gradient; 0 is none
            "ema": 0.9999,  # weight of the past in the average of the weights; 0 is no average
            "grad_checkpoint": False,  # recompute activations in the backward pass: less memory, more time
            "log_every": 50,  # steps between log lines, rows of stats.jsonl
            "save_every": 5000,  # steps between checkpoints
            "keep": 2,  # newest checkpoints kept, beside the best
            "preview_every": 5000,  # steps between pictures from the EMA; 0 is none
            "preview_images": 16,
            "eval_every": 0,  # steps between measurements of the EMA; 0 is none
            "eval_images": 500,  # seeds 0, 1, ...
            "max_minutes": 0.0,  # stop cleanly after so long; 0 is no limit
        },
        "eval": {
            "metrics": ("frechet_cifar10",),  # see libs/evaluation.py
            "reference": "",  # an npz with mu and sigma, an image folder, or empty: the data set (or what ships)
            "fid_mode": "legacy_pytorch",  # U-ViT's convention; clean, legacy_tensorflow
            "features": "cifar10_resnet",  # of precision and recall; inception
            "clip_model": "openai/clip-vit-large-patch14",  # of clip_score: a folder or a hub id
            "cost_images": 4,  # over which GMACs are counted; more for a policy that decides by the image
            "benchmark_rows": (1, 16),  # rows of the timed loops; 1, the latency, is always timed
            "benchmark_steps": 0,  # sampler steps of a timed loop, 0 for all; few on a slow machine
            "benchmark_repeats": 5,  # timed loops, after one to warm up
        },
    })


def uvit_backbone(img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int,
                  **options) -> dict:
    """The `backbone` section of a published U-ViT; options replace what most of them share."""
    return {"name": "uvit", "img_size": img_size, "patch_size": patch_size, "in_chans": 3,
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": 4.0,
            "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1, "conv": True, "skip": True} | options


def cifar10_unet_backbone(**options) -> dict:
    """The `backbone` section of the released CIFAR-10 UNets; options replace it and add to it."""
    return {"name": "unet2d", "sample_size": 32, "in_channels": 3, "out_channels": 3,
            "block_out_channels": (96, 192, 192, 192), "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "num_class_embeds": 11, "norm_num_groups": 32, "attention_head_dim": 64} | options
