"""How many times the images a second a student of Flash Diffusion makes of its teacher's guided DDIM, in one run.

    python -m libs.distillation.flash_sampling_speed --config=configs/cifar10_unet.py --checkpoint=cifar10_unet_flash \\
        --rows=16 --out=outputs/flash_sampling_speed.json

Whole loops from seeds to images, of the student and of the network of the config's checkpoint (--teacher names
another), in turns: a busy machine slows both. The ratio is the median over rounds.
"""

import sys
from statistics import median

from absl import flags as absl_flags

from .. import cli
from ..benchmark import timed_loop
from ..build import load_chain
from ..cost import gmacs_per_image
from ..errors import UserError
from ..files import require_json
from ..generate import Chain
from ..provenance import machine, origin
from ..seeds import parse_labels
from .speed import WARM_UP, tell

FLAGS = ("checkpoint", "teacher", "prompts", "steps", "teacher_steps", "guidance", "rows", "repeats", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "the student: released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("teacher", None, "the same of its teacher; the config's own unless given", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of models of texts: a text, or a file", flag_values=fv)
    absl_flags.DEFINE_integer("steps", 4, "of the student", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("teacher_steps", 50, "of the teacher's DDIM", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_float("guidance", 2.0, "the teacher's cfg_scale", flag_values=fv)
    absl_flags.DEFINE_integer("rows", 16, "images in a loop", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("repeats", 3, "rounds that count", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)
    absl_flags.mark_flag_as_required("checkpoint", fv)


def chain_of(config, checkpoint: str | None, device, prompts: str | None, rows: int, **sampler) -> Chain:
    """The chain with these fields of the sampler, whatever the checkpoint says."""
    own = config.copy_and_resolve_references()
    own.sampler.update(sampler)
    own.compute.rows = rows
    return load_chain(own, checkpoint, device, [f"sampler.{name}" for name in sampler], prompts)[0]


def measure(student: Chain, teacher: Chain, rows: int, repeats: int) -> dict:
    """Seconds of a loop over the same seeds and labels, images a second, and the ratio of these."""
    seeds = list(range(rows))
    chains, seconds = {"student": student, "teacher": teacher}, {"student": [], "teacher": []}
    labels = parse_labels(None, seeds, student.num_classes)
    for _ in range(WARM_UP + repeats):
        for name, chain in chains.items():
            seconds[name].append(timed_loop(chain, seeds, labels)[0])
    counted = {name: times[WARM_UP:] for name, times in seconds.items()}
    return {"ratio": median(slow / fast for fast, slow in zip(counted["student"], counted["teacher"], strict=True)),
            **{name: {"seconds": median(counted[name]), "images_per_second": rows / median(counted[name]),
                      "nfe": chain.nfe, "cfg_scale": chain.cfg_scale,
                      "gmacs_per_image": gmacs_per_image(chain, seeds[:1], labels and labels[:1])}
               for name, chain in chains.items()},
            "rows": rows, "repeats": repeats}


def speed(config, flags) -> int:
    if "pipeline" in config:
        raise UserError(f"--config={flags.config}: a pipeline's student is timed by sample.py --compare; take a config "
                        "without a pipeline")
    if config.policy.name != "full":
        raise UserError(f"policy.name={config.policy.name!r}: the whole network is timed; leave the policy out")
    if flags.guidance == 1:
        raise UserError("--guidance=1 is none; give the scale of a guided teacher")
    require_json(flags.out)
    device = cli.choose_device(config.compute.device)
    student = chain_of(config, flags.checkpoint, device, flags.prompts, flags.rows, steps=flags.steps)
    teacher = chain_of(config, flags.teacher, device, flags.prompts, flags.rows, name="ddim", steps=flags.teacher_steps,
                       cfg_scale=flags.guidance)
    result = measure(student, teacher, flags.rows, flags.repeats)
    result |= {"checkpoint": flags.checkpoint, "compute": config.compute.to_dict(), "machine": machine(device),
               **origin("-m libs.distillation.flash_sampling_speed", config, flags, FLAGS)}
    tell(f"{flags.steps} steps {result['student']['images_per_second']:.4g} images/s, {flags.teacher_steps} guided "
         f"steps {result['teacher']['images_per_second']:.4g} images/s: {result['ratio']:.1f} x", result, flags.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())
