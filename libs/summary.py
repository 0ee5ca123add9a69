"""One table and one picture of several folders of sample.py: python -m libs.summary FOLDER

Reads FOLDER/*/summary.json and grid.png; writes FOLDER/table.md and FOLDER/grids.png, and prints the table.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from .errors import UserError
from .files import atomic_path
from .markdown import markdown_table

GAP, TITLE = 12, 16  # pixels between grids, and above each for its name


def rows_of(folder: Path) -> list[dict[str, str]]:
    """One row a summary.json below `folder`, in the order in which they were written."""
    paths = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{folder}: no */summary.json there; sample.py writes them")
    table = []
    for path in paths:
        held = json.loads(path.read_text())
        gmacs = held.get("gmacs_per_image", {}).get("with_attention_products")
        table.append({
            "samples": path.parent.name, "model": held["model"], "sampler": held["sampler"], "NFE": str(held["nfe"]),
            "GMACs per image": "" if gmacs is None else f"{gmacs:.3g}",
            "seconds per image": f"{held['seconds_per_image']:.3g}", "images": str(held["images"]),
        })
    return table


def join_grids(folder: Path, names: list[str], width: int = 340) -> Image.Image:
    """The grids below `folder` side by side, each of one width under its name."""
    grids = [Image.open(folder / name / "grid.png").convert("RGB") for name in names]
    grids = [grid.resize((width, round(grid.height * width / grid.width)), Image.Resampling.NEAREST) for grid in grids]
    columns = min(3, len(grids))
    rows = [grids[i:i + columns] for i in range(0, len(grids), columns)]
    heights = [max(grid.height for grid in row) + TITLE + GAP for row in rows]
    picture = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(picture), GAP
    for row, height in zip(rows, heights, strict=True):
        for i, grid in enumerate(row):
            left = GAP + i * (width + GAP)
            draw.text((left, top), names[grids.index(grid)], fill="black")
            picture.paste(grid, (left, top + TITLE))
        top += height
    return picture


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m libs.summary FOLDER", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    try:
        rows = rows_of(folder)
        text = markdown_table(rows)
        with atomic_path(folder / "table.md") as temporary:
            temporary.write_text(text + "\n")
        with atomic_path(folder / "grids.png") as temporary:
            join_grids(folder, [row["samples"] for row in rows]).save(temporary, format="PNG")
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(text, f"\n{folder}/grids.png shows the images, */grid.png each set, digits/loss.png the training's loss.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
