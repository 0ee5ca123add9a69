"""Get data ready, once, before training or evaluation.

    python prepare_data.py stats --config=configs/cifar10_uvit_tiny.py --out=assets/features/cifar10_train_stats.npz
    python prepare_data.py stats --images=DIR --features=inception --out=outputs/fid_stats.npz
    python prepare_data.py held_out --config=configs/cifar10_super_resolution.py --out=data/cifar10_held_out
    python prepare_data.py lmdb --size=256 --out=data/celeba_256 DIR
    python prepare_data.py latents --config=configs/imagenet256_uvit_large.py --images=data/imagenet/train \
        --out=data/imagenet256_features
    python prepare_data.py latents --config=configs/mscoco_uvit_small.py --images=data/coco/train2014.zip \
        --captions=data/coco/annotations_trainval2014.zip --split=train --out=data/coco256_features
    python prepare_data.py text --config=configs/mscoco_uvit_small.py \
        --captions=data/coco/annotations_trainval2014.zip --split=train --out=data/coco256_features
    python prepare_data.py text --config=configs/mscoco_uvit_small.py --prompts=prompts.txt --out=data/coco256_features
    python prepare_data.py latents --config=configs/sd15.py --images=data/shards --out=data/sd15_features
    python prepare_data.py text --config=configs/sd15.py --images=data/shards --out=data/sd15_features
    python prepare_data.py webdataset --out=data/emoji_shards data/emoji64
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags

from libs import cli
from libs.build import DTYPES
from libs.codecs import KLCodec, make_codec
from libs.data import hold_out, load_section
from libs.data.feature_data import PARTS, RECORDS, made_by
from libs.data.image_files import list_images, open_files
from libs.data.images import save_png
from libs.data.lmdb_images import RESAMPLE, pack_images
from libs.data.make_features import write_empty, write_latents, write_prompts, write_texts
from libs.data.make_shards import write_shards
from libs.data.pictures import Pictures
from libs.data.raw import captioned, imagenet, read_captions
from libs.data.shard_cache import CACHE_BYTES, ShardCache, default_folder
from libs.data.shard_files import FolderShard, TarShard
from libs.data.shard_filters import at_least
from libs.data.shard_urls import list_shards
from libs.data.shards import ShardData
from libs.defaults import base_config
from libs.errors import UserError, choose
from libs.metrics import EXTRACTORS, make_extractor
from libs.metrics.statistics import reference_statistics
from libs.processes import Processes
from libs.prompts import read_prompts
from libs.text import make_text_encoder

CHUNK = 4  # images of a pipeline, 1024 pixels wide, that its autoencoder encodes at once
SPLITS = {folder: split for split, folder in PARTS.items()}  # MS-COCO's parts, as the folders are called


def define_stats_flags(fv) -> None:
    absl_flags.DEFINE_enum("features", "cifar10_resnet", list(EXTRACTORS), "kind of features", flag_values=fv)
    absl_flags.DEFINE_string("images", None, "folder of images, instead of the config's data set", flag_values=fv)
    absl_flags.DEFINE_string("inception_weights", None, "file of FID's network; else fetched", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 256, "images at a time", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_string("out", None, "file to write (.npz)", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def stats(config, flags) -> None:
    """Write the feature statistics (mu, sigma, n) of a data set or an image folder, for eval.reference.

    The images are those of the config's data section (--config.data.path=DIR), or of --images with pixels as they
    are. FID's convention is the config's eval.fid_mode. Image files are decoded one after another, and not kept.
    """
    if not flags.out.endswith(".npz"):
        raise UserError(f"--out={flags.out} must end in .npz")
    if config is None and flags.images is None:
        raise UserError("give --config, whose data set is read, or --images=DIR")
    if flags.images is None and "data" not in config:
        raise UserError(f"--config={flags.config}: a pipeline has no data set; give --images=DIR")
    if flags.images is None and config.data.name == "features":
        raise UserError("data.name='features' holds latents; statistics are those of images: give --images=DIR, or "
                        "another data.name")
    cli.output_dir(Path(flags.out).parent)
    if flags.images is None:
        source = load_section(config.data, stream=True)
    else:
        source = flags.images
        list_images(source, "--images")
    settings = config or base_config()
    options = {"weights": flags.inception_weights, "mode": settings.eval.fid_mode}
    extractor = make_extractor(flags.features, device=cli.choose_device(settings.compute.device),
                               **(options if flags.features == "inception" else {}))
    statistics = reference_statistics(source, extractor, flags.batch_size, field="--images")
    statistics.save(flags.out, np.float32)  # changes a distance by less than 1e-6, at half the size
    print(f"{flags.out}: mu and sigma of {statistics.n:,} images, {statistics.dim} features of {statistics.features}")


def define_held_out_flags(fv) -> None:
    absl_flags.DEFINE_string("out", None, "folder of the images", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def held_out(config, flags) -> None:
    """Write the images that training leaves out, every data.hold_out-th of the config's data set, as a folder.

    They are numbered by their places in the data set, and are what eval.py and sample.py take as --images.
    """
    if "pipeline" in config:
        raise UserError(f"--config={flags.config}: a pipeline has no data set of its own; take a config with a "
                        "backbone")
    section = config.data
    if not section.hold_out:
        raise UserError("--config.data.hold_out=0: training leaves out no image; choose every so-many-th, such as 100")
    images = hold_out(load_section(section), section.hold_out)[1].images
    folder = cli.output_dir(flags.out)
    for i, image in enumerate(images):
        save_png(folder / f"{(i + 1) * section.hold_out - 1:06d}.png", image)
    print(f"{folder}: {len(images):,} images")


def define_lmdb_flags(fv) -> None:
    absl_flags.DEFINE_string("images", None, "folder of images; --images= may be left out", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the database", flag_values=fv)
    absl_flags.DEFINE_string("size", "128,256,512,1024", "width and height of the images; one size or several",
                             flag_values=fv)
    absl_flags.DEFINE_enum("resample", "lanczos", list(RESAMPLE), "filter of the resizing", flag_values=fv)
    absl_flags.DEFINE_integer("n_worker", 8, "processes, at most one a core", lower_bound=1, flag_values=fv)
    absl_flags.mark_flags_as_required(["images", "out"], fv)


def pack_lmdb(config, flags) -> None:
    """Pack a folder of images into an LMDB of JPEG files, for data.name=lmdb (diffusion_distiller's format).

    Sub-folders are searched too. The short side is resized to --size and the centre is cut out; images that cannot be
    read or are smaller are skipped, and named at the end. The same command goes on where it was stopped; another
    --size is added to a finished database.
    """
    sizes = _sizes(flags.size)
    list_images(flags.images, "--images")  # before a folder is made
    record = pack_images(flags.images, cli.output_dir(flags.out), sizes, flags.resample, flags.n_worker)
    print(f"{flags.out}: {record.length:,} images at each of {', '.join(map(str, record.finished))}, "
          f"{len(record.skipped):,} skipped")
    for _, why in record.skipped:
        print(f"skipped {why}")


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--size={text}: want whole numbers, as in 128,256")
    return sorted({int(part) for part in parts})


def define_feature_flags(fv) -> None:
    absl_flags.DEFINE_string("captions", None, "captions in COCO's format: a .json file, or the zip of annotations",
                             flag_values=fv)
    absl_flags.DEFINE_enum("split", "train", list(SPLITS), "the part of MS-COCO; a folder in --out", flag_values=fv)
    absl_flags.DEFINE_integer("limit", None, "only so many images, the first ones", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the features: data.path of data.name=features", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def define_latents_flags(fv) -> None:
    define_feature_flags(fv)
    absl_flags.DEFINE_string("images", None, "folder of images, or a zip of them; of a pipeline also shards",
                             flag_values=fv)
    absl_flags.DEFINE_boolean("flips", None, "mirrored images too; default: if the network has labels", flag_values=fv)
    absl_flags.mark_flag_as_required("images", fv)


def latents(config, flags) -> None:
    """Encode images by the config's autoencoder into U-ViT's feature files, for data.name=features.

    A config with labels (cond.kind=label) takes images as ImageNet's: class folders, or names such as
    n01440764_10026.JPEG, guided-diffusion's centre crop, and writes OUT/{i}.npy, mirrored images too. With --captions
    they are those that the captions name, in the order of their id, in OUT/train or OUT/val. Else all images of the
    folder, sorted, without labels. The same command goes on where it stopped; accelerate launch shares the images
    among GPUs. Of a pipeline's config, --images may also be webdataset shards, or a folder of images with captions.
    """
    if "pipeline" in config:
        pipeline_latents(config, flags)
        return
    section, cond = config.data, config.cond
    if cond.kind == "text" and not flags.captions:
        raise UserError("--captions is missing: cond.kind is text, and the latents stand in the order of the captions' "
                        "images")
    pictures = _pictures(flags, labelled=cond.kind == "label")
    if pictures.labels is not None and max(pictures.labels) >= cond.num_classes:
        raise UserError(f"--images={flags.images} has {len(pictures.class_names)} classes; cond.num_classes is "
                        f"{cond.num_classes}")
    processes = Processes(cli.choose_device(config.compute.device))
    codec = make_codec(config.codec, processes.device)
    if not isinstance(codec, KLCodec):
        raise UserError(f"codec.name={config.codec.name!r} has no latents; choose kl")
    flips = pictures.labels is not None if flags.flips is None else flags.flips
    folder = cli.output_dir(Path(flags.out, flags.split) if flags.captions else flags.out)
    written = write_latents(pictures, codec.moments, folder, section.image_size, section.channels, flips,
                            made_by("autoencoder", config.codec.pretrained, *codec.encoder()), processes)
    if processes.is_main:
        print(f"{folder}: latents of {written:,} images" + f", {written // 2:,} of them mirrored" * flips)
    processes.close()


def pipeline_latents(config, flags) -> None:
    from libs.pipelines.model import PipelineCodec  # diffusers takes seconds to import

    if flags.flips:
        raise UserError("--flips: mirrored images would have no captions; leave it out")
    processes = Processes(cli.choose_device(config.compute.device))
    model = _pipeline_model(config)
    codec = PipelineCodec(model.pipe.vae, processes.device, chunk=CHUNK)
    folder, made_from = Path(flags.out), made_by("autoencoder", config.pipeline.path, *codec.encoder())
    if flags.captions:
        folder, pictures = folder / flags.split, _pictures(flags, labelled=False)
    else:
        pictures = _samples(config, flags, model.image_size)
        made_from["samples"] = _same_samples(folder, pictures)
    written = write_latents(pictures, codec.moments, cli.output_dir(folder), model.image_size, 3, False, made_from,
                            processes)
    if processes.is_main:
        print(f"{folder}: latents of {written:,} images")
    processes.close()


def pipeline_text(config, flags) -> None:
    if flags.prompts:
        raise UserError(f"--prompts={flags.prompts}: the previews of a pipeline's student show its captions; give "
                        "--captions or --images")
    if (flags.captions is None) == (flags.images is None):
        raise UserError("give --captions=FILE or --images=SHARDS, one of them")
    processes = Processes(cli.choose_device(config.compute.device))
    model = _pipeline_model(config)
    model.encoders_to(processes.device)
    root = folder = cli.output_dir(flags.out)
    made_from = {**made_by("text_encoder", config.pipeline.path, *model.text_encoders()),
                 "precision": config.compute.precision}
    if flags.captions:
        folder, captions = root / flags.split, _coco_texts(flags)
    else:
        samples = _samples(config, flags, model.image_size)
        made_from["samples"], captions = _same_samples(folder, samples), samples.captions()
    written = write_texts(captions, model.encode_stored, cli.output_dir(folder), made_from, processes)
    if processes.is_main:
        write_empty(model.encode_stored([""])[0][0], root)
        print(f"{folder}: {written:,} captions of {len(captions):,} images")
    processes.close()


def _pipeline_model(config):
    """The model of a pipeline on the host, for images of the size that distillate.py would take."""
    from libs.pipelines.model import load_pipeline_model

    dtype = choose("compute.precision", config.compute.precision, DTYPES) or torch.float32
    size = config.get("data", {}).get("image_size", 0)
    return load_pipeline_model(dict(config.pipeline) | ({"height": size, "width": size} if size else {}), dtype=dtype)


def _samples(config, flags, size: int) -> ShardData:
    """The images with captions of --images: shards, or a folder of such images; filtered as the config's data section
    says, where it has one.
    """
    folder = Path(flags.images).expanduser()
    name = "captioned_folder" if folder.is_dir() and not any(folder.glob("*.tar")) else "webdataset"
    section = dict(config.get("data", base_config().data)) | {"name": name, "path": flags.images, "image_size": size}
    try:
        return load_section(section).first(flags.limit)
    except UserError as error:  # which knows the path by the section's field
        raise UserError(str(error).replace("data.path", "--images")) from error


def _same_samples(folder: Path, samples: ShardData) -> str:
    """What they are. Raises UserError where the folder holds latents or texts of others, since these go by number."""
    digest = samples.digest()
    for record, command in RECORDS.items():
        if (folder / record).is_file() and json.loads((folder / record).read_text()).get("samples", digest) != digest:
            raise UserError(f"--out={folder}: what prepare_data.py {command} wrote there is of other images; give the "
                            "same --images, filters and --limit, or choose another folder")
    return digest


def _pictures(flags, labelled: bool) -> Pictures:
    path = Path(flags.images).expanduser()
    if flags.captions:
        pictures = captioned(path, Path(flags.captions).expanduser(), SPLITS[flags.split])
    elif labelled:
        pictures = imagenet(path, "train", "--images")
    else:
        files = open_files(path, "--images")
        pictures = Pictures(files, files.names())
    names, labels = pictures.names[:flags.limit], pictures.labels and pictures.labels[:flags.limit]
    return dataclasses.replace(pictures, names=names, labels=labels)


def define_text_flags(fv) -> None:
    define_feature_flags(fv)
    absl_flags.DEFINE_string("images", None, "instead, of a pipeline: shards, or a folder of images with captions",
                             flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "instead: a text, a file with one a line, COCO's captions (.json)",
                             flag_values=fv)


def text(config, flags) -> None:
    """Encode captions or prompts by the config's text encoder into U-ViT's feature files.

    --captions writes OUT/train/{i}_{k}.npy (or val), caption k of image i in the order of the images' id; --prompts
    writes OUT/run_vis/{j}.npy, the prompts that previews show. Either writes OUT/empty_context.npy, the empty text. The
    same command goes on where it stopped; accelerate launch shares the captions among GPUs. Of a pipeline's config,
    --images names the shards, or the folder, whose captions are encoded.
    """
    if "pipeline" in config:
        pipeline_text(config, flags)
        return
    if flags.images:
        raise UserError(f"--images={flags.images} belongs to a pipeline's config; give --captions=FILE")
    if (flags.captions is None) == (flags.prompts is None):
        raise UserError("give --captions=FILE or --prompts=FILE, one of them")
    captions = prompts = None
    if flags.captions:
        captions = _coco_texts(flags)
    else:
        prompts = read_prompts(flags.prompts)[:flags.limit]
    processes = Processes(cli.choose_device(config.compute.device))
    encoder = make_text_encoder(config.cond, processes.device)
    root = cli.output_dir(flags.out)
    if captions:
        written = write_texts(captions, encoder, root / flags.split,
                              {**made_by("text_encoder", config.cond.text_encoder, encoder.net),
                               "tokens": config.cond.tokens}, processes)
    if processes.is_main:
        write_empty(encoder.empty, root)
        if captions:
            print(f"{root / flags.split}: {written:,} captions of {len(captions):,} images")
        else:
            write_prompts(prompts, encoder, root)
            print(f"{root / 'run_vis'}: {len(prompts):,} prompts")
    processes.close()


def _coco_texts(flags) -> list[list[str]]:
    listed = read_captions(Path(flags.captions).expanduser(), SPLITS[flags.split])
    return [texts for _, texts in listed[:flags.limit]]


def define_webdataset_flags(fv) -> None:
    absl_flags.DEFINE_string("images", None, "folder of images with captions, or addresses of shards; --images= may be "
                             "left out", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the shards", flag_values=fv)
    absl_flags.DEFINE_float("shard_mb", 1000, "size of a shard, in 10^6 bytes", lower_bound=0.02, flag_values=fv)
    absl_flags.DEFINE_integer("shard_images", 10_000, "images in a shard, at most", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_string("caption_key", "caption", "field of a sample's json; a txt needs none", flag_values=fv)
    absl_flags.DEFINE_string("score_key", "aesthetic_score", "field of a sample's json", flag_values=fv)
    absl_flags.DEFINE_float("min_score", 0, "leave out samples with a lower score, or none; 0 takes all",
                            flag_values=fv)
    absl_flags.mark_flags_as_required(["images", "out"], fv)


def webdataset(config, flags) -> None:
    """Pack a folder of images with captions beside them into webdataset shards, for data.name=webdataset.

    The captions of a.png are the lines of a.txt, or a.json holds one. Sub-folders are searched too. Shards are packed
    anew, by their addresses as in libs/data/shard_urls.py. What cannot be used is left out, counted, and named. The
    same command goes on where it was stopped.
    """
    cache = ShardCache(default_folder(), CACHE_BYTES, "--images")
    folder = Path(flags.images).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        source = [FolderShard(folder, cache, "--images")]
        list_images(folder, "--images")  # before a folder is made
    else:
        source = [TarShard(address, cache) for address in list_shards(flags.images, "--images")]
    filters = [at_least(flags.score_key, flags.min_score, "--min_score")] if flags.min_score else []
    written = write_shards(source, cli.output_dir(flags.out), int(flags.shard_mb * 1e6), flags.shard_images, filters,
                           flags.caption_key)
    print(f"{flags.out}: {written.samples:,} images in {written.shards:,} shards, {written.bytes / 1e6:.1f} MB")
    for line in written.left_out.lines():
        print(f"left out: {line}")


COMMANDS = {"stats": cli.Command(stats, define_stats_flags, "optional"),
            "held_out": cli.Command(held_out, define_held_out_flags, "required"),
            "lmdb": cli.Command(pack_lmdb, define_lmdb_flags, positional="images"),
            "latents": cli.Command(latents, define_latents_flags, "required"),
            "text": cli.Command(text, define_text_flags, "required"),
            "webdataset": cli.Command(webdataset, define_webdataset_flags, positional="images")}


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
