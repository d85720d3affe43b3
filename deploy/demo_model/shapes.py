"""Captioned pictures of one coloured shape on a plain background.

A `Scene` names what a picture shows, `render` draws it, and `write_caption` says it in one of many
ways, so that the text encoder learns the words and not one sentence.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 30),
    "orange": (245, 130, 20),
    "purple": (130, 45, 180),
    "pink": (250, 130, 180),
    "cyan": (40, 200, 215),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "brown": (120, 72, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")

# Centre of the shape, in half picture widths from the middle: x to the right, y down.
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (0.0, 0.0),
    "left": (-0.42, 0.0),
    "right": (0.42, 0.0),
    "top": (0.0, -0.42),
    "bottom": (0.0, 0.42),
}
# Radius of the shape, in half picture widths.
SIZES: dict[str, float] = {"small": 0.34, "medium": 0.52, "large": 0.78}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "circle": ("circle", "disc", "dot"),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}
OPENINGS = ("a picture of", "a photo of", "an image of", "a drawing of", "an icon of", "simple")
# Words the demo knows nothing about. All of them share one empty token embedding, so that it
# learns to pass over any word of a longer prompt.
FILLERS = (
    "masterpiece", "best quality", "8k", "highly detailed", "sharp focus", "beautiful", "trending",
    "digital art", "minimal", "vector", "studio lighting", "very nice", "clean", "astronaut",
    "please", "style of an old painter", "mountain landscape", "modern", "horse",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a picture shows; each field is a key of the tables above."""

    shape: str
    color: str
    background: str
    position: str = "center"
    size: str = "medium"


# The values a caption can ask for, by `Scene` field.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(COLORS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
}


def random_scene(rng: random.Random) -> Scene:
    """A scene whose shape fits the picture: large ones are in the centre only."""
    color, background = rng.sample(sorted(COLORS), 2)
    position = "center" if rng.random() < 0.45 else rng.choice(sorted(POSITIONS))
    sizes = ["small", "medium", "large"] if position == "center" else ["small", "medium"]
    return Scene(rng.choice(SHAPES), color, background, position, rng.choice(sizes))


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance from the outline of `shape`, negative inside; all lengths share one unit.

    `x` and `y` are measured from the centre of the shape, y down. The star and the heart follow
    Inigo Quilez, "2D distance functions" (https://iquilezles.org/articles/distfunctions2d/).
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "diamond":
        return (1.25 * x.abs() + y.abs() - 1.1 * radius) / 1.6
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * radius).abs() - 0.26 * radius
    if shape == "cross":
        long, short = radius, 0.33 * radius
        flat = torch.maximum(x.abs() - long, y.abs() - short)
        upright = torch.maximum(x.abs() - short, y.abs() - long)
        return torch.minimum(flat, upright)
    if shape == "triangle":
        y = y - 0.2 * radius
        slope = torch.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)
        return torch.maximum(slope, y) - 0.58 * radius
    if shape == "star":
        return _star_distance(x, y, radius)
    if shape == "heart":
        return _heart_distance(x, y, radius)
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Five points up; folded into one half of one point, whose edge is a straight line."""
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    length = torch.hypot(x, y)
    across, along = length * angle.sin().abs(), length * angle.cos()
    tip, notch = 1.1 * radius, 0.46 * radius
    edge_x, edge_y = notch * math.sin(sector / 2), notch * math.cos(sector / 2) - tip
    return ((along - tip) * edge_x - across * edge_y) / math.hypot(edge_x, edge_y)


def _heart_distance(x: Tensor, y: Tensor, radius: float) -> Tensor:
    unit = 1.5 * radius
    x, y = x.abs() / unit, 0.56 - y / unit
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * torch.clamp(x + y, min=0)
    tip = torch.minimum(x**2 + (y - 1) ** 2, (x - fold) ** 2 + (y - fold) ** 2)
    return torch.where(x + y > 1, lobe, tip.sqrt() * torch.sign(x - y)) * unit


def coverage(
    shape: str, resolution: int, center: tuple[float, float] = (0.0, 0.0), radius: float = 0.52
) -> Tensor:
    """How much of each pixel the shape covers, 0..1, as (resolution, resolution).

    `center` and `radius` are in half picture widths, like `POSITIONS` and `SIZES`.
    """
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = signed_distance(shape, x - center[0], y - center[1], radius)
    return torch.clamp(0.5 - distance * resolution / 2, 0, 1)


def render(scene: Scene, resolution: int, rng: random.Random | None = None) -> Tensor:
    """The picture of a scene, (3, resolution, resolution) in -1..1.

    With `rng`, place, size and colours vary a little around their named values.
    """
    center_x, center_y = POSITIONS[scene.position]
    radius = SIZES[scene.size]
    color, background = COLORS[scene.color], COLORS[scene.background]
    if rng is not None:
        center_x += rng.uniform(-0.03, 0.03)
        center_y += rng.uniform(-0.03, 0.03)
        radius *= rng.uniform(0.94, 1.06)
        color, background = _vary(color, rng), _vary(background, rng)
    covered = coverage(scene.shape, resolution, (center_x, center_y), radius)
    ink = torch.tensor(color)[:, None, None] / 127.5 - 1
    paper = torch.tensor(background)[:, None, None] / 127.5 - 1
    return paper + (ink - paper) * covered


def _vary(color: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in color)
    return red, green, blue


def render_batch(scenes: Sequence[Scene], resolution: int, rng: random.Random) -> Tensor:
    """(len(scenes), 3, resolution, resolution) in -1..1."""
    return torch.stack([render(scene, resolution, rng) for scene in scenes])


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A text about a scene, and the attributes it asks for.

    A text may leave out the shape or a colour (that attribute is then absent from `asked`); no
    word about place or size means the centre and medium.
    """

    text: str
    asked: dict[str, str]


def write_caption(scene: Scene, rng: random.Random, filler_chance: float = 0.25) -> Caption:
    """One of many ways to ask for the scene: a sentence or a list of tags, sometimes incomplete."""
    asked = {field: getattr(scene, field) for field in ATTRIBUTES}
    for field, chance in (("shape", 0.04), ("color", 0.06), ("background", 0.08)):
        if rng.random() < chance:
            del asked[field]

    parts = _as_sentence(asked, rng) if rng.random() < 0.7 else _as_tags(asked, rng)
    if rng.random() < filler_chance:
        for filler in rng.sample(FILLERS, rng.randint(1, 5)):
            parts.insert(rng.choice((0, len(parts), rng.randint(0, len(parts)))), f", {filler},")
    text = " ".join(part for part in parts if part)
    return Caption(text.replace(" ,", ",").replace(",,", ",").strip(", "), asked)


def _word(value: str, rng: random.Random) -> str:
    if rng.random() < 0.85:
        return value
    return rng.choice(SYNONYMS.get(value, (value,)))


def _subject_words(asked: dict[str, str], rng: random.Random) -> list[str]:
    size = _word(asked["size"], rng)
    words = [
        size if size != "medium" or rng.random() < 0.1 else "",
        _word(asked["color"], rng) if "color" in asked else "",
    ]
    if rng.random() < 0.15:
        words.reverse()
    shape = _word(asked["shape"], rng) if "shape" in asked else rng.choice(("", "shape", "thing"))
    return [*words, shape]


def _as_sentence(asked: dict[str, str], rng: random.Random) -> list[str]:
    place = asked["position"]
    if place == "center":
        where = rng.choice(
            ("", "", "", "", "in the center", "in the middle", "centered", "at the center")
        )
    elif place in ("left", "right"):
        where = rng.choice(
            ("on the {}", "on the {}", "at the {}", "on the {} side", "to the {}", "{}", "at {}")
        ).format(place)
    else:
        where = rng.choice(
            ("at the {}", "at the {}", "on the {}", "near the {}", "on {}", "{}", "in the {} half")
        ).format(place)

    subject = [rng.choice(("a", "a", "a", "one", "the", "")), *_subject_words(asked, rng)]
    opening = rng.choice(OPENINGS) if rng.random() < 0.2 else ""
    behind = ""
    if "background" in asked:
        behind = rng.choice(
            ("on a {} background",) * 4
            + (", {} background",) * 3
            + ("with a {} background", "on {} background", "against a {} background", "on {}")
            + ("in front of a {} background", ", {} backdrop", ", background {}")
        ).format(_word(asked["background"], rng))
    order = rng.random()
    if order < 0.8:
        return [opening, *subject, where, behind]
    if order < 0.9:
        return [opening, *subject, behind, f", {where}" if where else ""]
    return [behind.strip(", "), ",", opening, *subject, where]


def _as_tags(asked: dict[str, str], rng: random.Random) -> list[str]:
    subject = _subject_words(asked, rng)
    tags = [" ".join(word for word in subject if word)]
    if "background" in asked:
        name = _word(asked["background"], rng)
        tags.append(rng.choice((f"{name} background",) * 4 + (f"background: {name}",)))
    if asked["position"] != "center" or rng.random() < 0.1:
        tags.append("centered" if asked["position"] == "center" else asked["position"])
    rng.shuffle(tags)
    return [f"{tag}," for tag in tags if tag]
