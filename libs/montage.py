"""Pictures that compare: rows of images of the same seeds, each with its caption.

    python -m libs.montage --seeds=0-7 --out=outputs/steps.png "1,024 steps=outputs/full" "8 steps=outputs/few"

A row is CAPTION=FOLDER, the folder's images bear their seeds as names (sample.py --out=FOLDER).
"""

import sys
import textwrap
from collections.abc import Sequence
from copy import copy
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
import torch
from absl import flags as absl_flags
from absl import logging
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import cli
from .data.images import BACKGROUND, image_grid, save_png
from .errors import UserError
from .files import reason
from .generate import Chain
from .samplers import state_times
from .samplers.after_step import watched
from .seeds import parse_seeds

Row = tuple[str, Tensor]  # caption, images

SMALLEST = 64  # pixels of a side below which an image is enlarged
CAPTION = 24  # characters in a line of a caption, unless its lines would be too many
NAMED = 8  # seeds that an error names


def montage(rows: Sequence[Row], pad: int = 4) -> Tensor:
    """One picture of captioned rows: (caption, uint8 images n h w c) each -> uint8 (H, W, c).

    All rows have the same number of images of one size; c is 1 or 3, and 3 as soon as one row has 3. Images below 64
    pixels are enlarged by a whole factor. Raises UserError for rows that do not match.
    """
    assert rows
    size = tuple(rows[0][1].shape[:3])
    for caption, images in rows:
        if tuple(images.shape[:3]) != size:
            here, there = (" x ".join(map(str, each.shape[:3])) for each in (images, rows[0][1]))
            raise UserError(f"rows of a picture must match: {caption!r} has {here} (images, height, width), "
                            f"{rows[0][0]!r} {there}")
    channels = max(images.shape[3] for _, images in rows)
    images = torch.cat([images.cpu().expand(-1, -1, -1, channels) for _, images in rows])
    upscale = -(-SMALLEST // min(size[1:]))
    grid = image_grid(images, size[0], pad, upscale)
    return torch.cat([_captions([caption for caption, _ in rows], size[1] * upscale, pad, channels), grid], dim=1)


def _captions(captions: Sequence[str], height: int, pad: int, channels: int) -> Tensor:
    """The column of captions left of rows of `height` pixels, uint8 (H, w, channels)."""
    # DejaVu Sans comes with matplotlib and has every letter and sign that a caption may need.
    size = min(max(14, height // 8), 28)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    texts = [_wrap(caption, height // round(1.4 * size)) for caption in captions]
    width = max(ruler.multiline_textbbox((0, 0), text, font)[2] for text in texts)
    picture = Image.new("L", (round(width) + size, pad + len(captions) * (height + pad)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        middle = pad + i * (height + pad) + height / 2
        draw.multiline_text((round(width) + size // 2, middle), text, 0, font, anchor="rm", align="right")
    return torch.from_numpy(np.array(picture))[:, :, None].expand(-1, -1, channels)


def _wrap(caption: str, lines: int) -> str:
    """A caption in at most so many lines, which are longer than usual where they must be."""
    width = CAPTION
    while len(wrapped := textwrap.wrap(caption, width)) > max(1, lines):
        width += 1
    return "\n".join(wrapped)


def capture_indices(chain: Chain, number: int) -> list[int]:
    """Which of the chain's states to show: `number` of them, evenly spaced from x_T to x_0.

    Raises UserError, naming --captures, for more than there are and for fewer than those two.
    """
    states = len(state_times(chain.sampler, chain.ts, chain.denoiser.schedule))
    if not 2 <= number <= states:
        raise UserError(f"--captures={number} must be 2 (noise and image) to {states} (all states of this sampler)")
    return [round(k * (states - 1) / (number - 1)) for k in range(number)]


def captures(chain: Chain, seeds: list[int], labels: list[int] | None, indices: Sequence[int]) -> list[Row]:
    """Rows of a montage: the states x_t of these seeds as images, one row each of `indices`.

    The seeds are sampled anew, through every link of the chain, so that the last state is the image itself.
    """
    times = state_times(chain.sampler, chain.ts, chain.denoiser.schedule)
    images: dict[int, list[Tensor]] = {index: [] for index in indices}
    states = count()

    def watch(x_t: Tensor, t: Tensor) -> None:
        index = next(states)
        if index in images:
            images[index].append(chain.codec.decode(x_t[:len(group)]).cpu())

    own = copy(chain)
    own.sampler = watched(chain.sampler, watch)
    for start in range(0, len(seeds), chain.rows):
        group, states = seeds[start:start + chain.rows], count()
        own.sample(group, None if labels is None else labels[start:start + chain.rows])
    return [(f"t = {float(times[index]):.3g}", torch.cat(parts)) for index, parts in images.items()]


def read_images(folder: str | Path, seeds: Sequence[int]) -> Tensor:
    """The PNG files of `seeds` in a folder, as uint8 (n, h, w, c); 7.png is seed 7 like 000007.png.

    Raises UserError for a folder that is missing, for seeds that it has no image of and for unequal images.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder")
    files = {int(path.stem): path for path in sorted(Path(folder).glob("*.png")) if path.stem.isdecimal()}
    missing = [str(seed) for seed in seeds if seed not in files]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(f"{folder} has no image of seed {', '.join(missing[:NAMED])}{more}; it has {len(files)} "
                        "with a seed as name, such as 000007.png")
    pixels = [_read(files[seed]) for seed in seeds]
    for seed, each in zip(seeds, pixels, strict=True):
        if each.shape != pixels[0].shape:
            raise UserError(f"{files[seed]} and {files[seeds[0]]} are of different size or number of channels")
    return torch.from_numpy(np.stack(pixels))


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L")
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({reason(error)})") from error
    return pixels[:, :, None] if grey else pixels


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", "0-7", "columns: 0-7 or 1,5,7-9", flag_values=fv)
    absl_flags.DEFINE_string("out", "outputs/montage.png", "the picture, a PNG file", flag_values=fv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    named = [arg for arg in argv if not arg.startswith("-")]

    def compose(config, flags) -> None:
        seeds, rows = parse_seeds(flags.seeds), []
        if not flags.out.endswith(".png"):
            raise UserError(f"--out={flags.out} must end in .png")
        if not named:
            raise UserError("no rows given; each is written 'CAPTION=FOLDER'")
        for text in named:
            caption, equals, folder = text.rpartition("=")
            if not equals:
                raise UserError(f"{text!r} is no row; a row is written 'CAPTION=FOLDER'")
            rows.append((caption, read_images(folder, seeds)))
        save_png(flags.out, montage(rows))
        logging.info("%d rows of %d images: %s", len(rows), len(seeds), flags.out)

    return cli.run(compose, define_flags, [arg for arg in argv if arg.startswith("-")], takes_config="no")


if __name__ == "__main__":
    sys.exit(main())
