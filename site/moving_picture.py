"""Make nbs/images/tour.gif, the moving picture of the README: strokes on a photograph and what is learnt from each, then clicks in the explorer of relations. Takes a minute on two cores."""
import io
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image
from skimage.data import coffee
from skimage.draw import line

from spml_kit.core import UNLABELLED, Classes
from spml_kit.data.batches import weak_dls
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.infer.interactive import LiveSegmenter
from spml_kit.learn.learner import spml_learner
from spml_kit.look.explore import explore_relations
from spml_kit.look.plot import overlay

OUT = Path(__file__).parents[1] / "nbs" / "images" / "tour.gif"
WIDTH, SHOWN = 900, 1800  # pixels of the picture; milliseconds of a frame
NAMES = "table", "saucer", "cup", "spoon"
STROKES = [(0, (270, 20), (310, 130)), (1, (60, 100), (90, 165)), (2, (112, 85), (150, 105)), (2, (105, 40), (150, 15)), (3, (193, 140), (200, 155)),
           (0, (20, 80), (60, 40)), (1, (130, 185), (190, 188)), (3, (214, 60), (218, 46))]  # class, from x, y to x, y, at 320 pixels


def frame(figure):
    "A figure as a picture of the common width"
    with io.BytesIO() as f:
        figure.savefig(f, format="png", dpi=110)
        picture = Image.open(f).convert("RGB")
    return picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)


def drawing(folder):
    "One frame for each stroke from the second class on: strokes, label map, uncertainty"
    Image.fromarray(coffee()).resize((320, 213), Image.Resampling.LANCZOS).save(folder / "coffee.png")
    classes = Classes(NAMES)
    images = FolderSet(folder, classes=classes)
    image, segmenter = images.image(0), LiveSegmenter(images)
    drawn = np.full(image.shape[:2], UNLABELLED, np.uint8)
    for k, (c, start, end) in enumerate(STROKES):
        rows, columns = line(*start[::-1], *end[::-1])
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1): drawn[(rows + dy).clip(0, 212), (columns + dx).clip(0, 319)] = c
        if not k: continue
        opinion = segmenter.update(0, drawn, steps=10).predict(0)
        fig, axs = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
        axs[0].imshow(overlay(image, drawn, classes, 1.))
        axs[1].imshow(overlay(image, opinion.labels, classes, .75))
        axs[2].imshow(opinion.doubt, cmap="magma", vmin=0, vmax=1)
        axs[2].plot(*opinion.place, "w+", ms=14, mew=3)
        for ax, title in zip(axs, (f"{k + 1} strokes", "label map", "uncertainty; cross: draw here")):
            ax.set_title(title, fontsize=14)
            ax.axis("off")
        fig.legend(handles=[Patch(fc=classes.palette[i] / 255, label=n) for i, n in enumerate(NAMES)], loc="outside lower center", ncols=4, frameon=False, fontsize=13)
        plt.close(fig)
        yield frame(fig)


def exploring():
    "Three pixels in the explorer of relations"
    weak = WeakSet(SceneSet(24, seed=3, size=96), "scribbles", regions=24)
    held_out = SceneSet(4, seed=3, size=96, start=1000)
    learn = spml_learner(weak_dls(weak, held_out, bs=4, crop=96, steps=20, scale=(.75, 1.5)), "scribbles", path=tempfile.mkdtemp())
    with learn.no_bar(), learn.no_logging(): learn.fit_poly(3)
    explorer = explore_relations(learn, weak)
    for second, point in (("annotation", explorer.point), ("cooccurrence", (1, 72, 32)), ("similarity", (1, 72, 32))):
        with explorer.hold(): explorer.second.value, explorer.point = second, point
        whole = frame(explorer.figure())
        yield whole.crop((0, 0, WIDTH, round(.595 * whole.height)))  # without bars and tables


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: frames = [*drawing(Path(folder)), *exploring()]
    height = max(f.height for f in frames)
    pages = []
    for f in frames:
        page = Image.new("RGB", (WIDTH, height), "white")
        page.paste(f, (0, (height - f.height) // 2))
        pages.append(page.quantize(128, dither=Image.Dither.NONE))
    pages[0].save(OUT, save_all=True, append_images=pages[1:], duration=SHOWN, loop=0, optimize=True)
    print(f"{OUT}: {len(pages)} frames, {OUT.stat().st_size/1e6:.1f} MB")
