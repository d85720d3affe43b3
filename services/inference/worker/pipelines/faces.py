"""Faces: found in a picture, restored one by one by a model from the registry, and put back.

A face is turned and scaled so that its eyes, nose and mouth lie where those of FFHQ's pictures do,
which is what the models have learned, and is put back with soft edges. Done as facexlib does it,
but for who finds the faces, and without the segmentation of hair and skin in their borders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.library import Library, Models
from services.inference.worker.pipelines.memory import is_of_the_device, is_out_of_memory
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.image_models import (
    EXTRA_ARCHITECTURES,
    has_extra_architectures,
)
from services.inference.worker.pipelines.params.reading import short
from shared.weights.kinds import (
    CODEFORMER,
    FACE_RESTORATION,
    GFPGAN,
    RESTOREFORMER,
    recognise,
)

DETECTOR = Path(__file__).parent / "face_detector" / "face_detection_yunet_2023mar.onnx"
LEAST_SCORE = 0.8
DETECTION_SIDES = (512, 1024)
"""The longer side, in pixels, of a picture in which faces are looked for, large ones and small
ones: the detector was made for faces of up to 300 pixels."""
LARGEST_DETECTION_SIDE = 2048
"""Of a picture that is larger than those, and is searched as it is."""
SAME_FACE = 0.3
"""Of two boxes: how much of them both have, over what they cover together."""
LEAST_EYE_DISTANCE = 5
"""Pixels: a smaller face has nothing to go by."""
SIDE = 512
TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ],
    np.float32,
)
"""Where the eyes, the tip of the nose and the corners of the mouth lie in FFHQ's pictures of 512
pixels: (x, y), from left to right and from above."""
GROUND = (132.0, 133.0, 135.0)
"""What a face is completed with beyond the border of its picture."""

# OpenCV's engine warns of every network that it opens.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB"""
Landmarks = NDArray[np.float32]
"""(5, 2): x and y of the points of `TEMPLATE`, in pixels"""

_CALLS: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    # Its noise is that of its file, so that the same picture comes out again.
    GFPGAN: lambda net, face, weight: net(face, return_rgb=False, randomize_noise=False)[0],
    RESTOREFORMER: lambda net, face, weight: net(face)[0],
    CODEFORMER: lambda net, face, weight: net(face, weight=weight, adain=True)[0],
}


class FaceRestorer(msgspec.Struct, frozen=True, eq=False):
    """`name`: of its kind of models, as GFPGAN. `weight`: of CodeFormer, from 0, where it makes the
    most of a face, to 1, where it keeps the most of it."""

    name: str
    library: Library
    file: ModelFile
    weight: float = 0.5

    def restore(self, picture: Image.Image) -> tuple[Image.Image, int]:
        """A picture of the same size, and how many faces were found in it. Transparency stays."""
        pixels = np.asarray(picture.convert("RGB"))
        faces = find_faces(pixels)
        if not faces:
            return picture, 0
        result = pixels.astype(np.float32)
        for landmarks in faces:
            matrix = to_template(landmarks)
            restored = self._restored(aligned(pixels, matrix))
            put_back(result, restored, matrix)
        restored_picture = Image.fromarray(result.round().clip(0, 255).astype(np.uint8))
        if "A" in picture.getbands():
            restored_picture.putalpha(picture.getchannel("A"))
        return restored_picture, len(faces)

    @torch.no_grad()
    def _restored(self, face: Pixels) -> Pixels:
        """(512, 512, 3) both."""
        device = self.library.place.device
        net = self.library.image_model(self.file).model
        levels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
        try:
            restored = _CALLS[self.name](net, levels, self.weight)[0].float().clamp(-1, 1)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error) or is_of_the_device(error):
                raise
            # Its sizes are its file's: they may make up a network that fits no face.
            line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise JobFailure(f"{self.file.name} can't take a face: {line}") from error
        if not torch.isfinite(restored).all():
            raise JobFailure(f"{self.file.name} makes no numbers of a face: it may be damaged")
        pixels: Pixels = ((restored + 1) * 127.5).round().to("cpu", torch.uint8).numpy()
        return pixels.transpose(1, 2, 0)


def find_face_restorer(
    name: str, field: str, models: Models, library: Library, weight: float = 0.5
) -> FaceRestorer:
    """`name`: GFPGAN, CodeFormer or RestoreFormer for a model of this kind, or the name of a file;
    empty for the first one that the job names. Raises JobFailure."""
    given = models.of(FACE_RESTORATION)
    kinds = [recognise(library.open(model.path, model.name).header).family for model in given]
    of_kind = (
        model
        for model, kind in zip(given, kinds, strict=True)
        if not name or kind.lower() == name.lower()
    )
    found = next(of_kind, None) or models.find(FACE_RESTORATION, name)
    if found is None:
        named = ", ".join(model.name for model in given) or "none"
        asked = f"got {short(name)}, allowed is" if name else "it takes"
        raise JobFailure(
            f"{field}: {asked} {', '.join(_CALLS)} or a file, by a checkpoint of type"
            f" {FACE_RESTORATION} that the job names in models, such as"
            f' {{"{FACE_RESTORATION}": ["GFPGANv1.4.pth"]}} (it names {named})'
        )
    file = library.open(models.use(found).path, found.name)
    kind = recognise(file.header)
    if kind.family not in _CALLS:
        raise JobFailure(f"{field}: {file.name} is {kind.title}; a model for faces is needed")
    if kind.family == CODEFORMER and not has_extra_architectures():
        raise JobFailure(
            f"{field}: CodeFormer needs the package {EXTRA_ARCHITECTURES}, which is not installed"
            f" here: its licence is for non-commercial use. {GFPGAN} and {RESTOREFORMER} need"
            " nothing more"
        )
    return FaceRestorer(kind.family, library, file, weight)


def find_faces(pixels: Pixels) -> list[Landmarks]:
    """From the surest on, without those that are too small."""
    longer = max(pixels.shape[:2])
    sides = {*DETECTION_SIDES, min(max(longer, *DETECTION_SIDES), LARGEST_DETECTION_SIDE)}
    found = [face for side in sides for face in _detected(pixels, side / longer)]
    kept: list[_Face] = []
    for face in sorted(found, key=lambda face: -face.score):
        if face.eye_distance >= LEAST_EYE_DISTANCE and not any(map(face.is_same, kept)):
            kept.append(face)
    return [face.landmarks for face in kept]


class _Face(msgspec.Struct, frozen=True, eq=False):
    """What was detected, in pixels of the whole picture. `corner`: the upper left one; `size`:
    width and height; `score`: up to 1."""

    corner: NDArray[np.float32]
    size: NDArray[np.float32]
    landmarks: Landmarks
    score: float

    @property
    def eye_distance(self) -> float:
        return float(np.linalg.norm(self.landmarks[0] - self.landmarks[1]))

    def is_same(self, other: _Face) -> bool:
        ends = np.minimum(self.corner + self.size, other.corner + other.size)
        shared = np.maximum(ends - np.maximum(self.corner, other.corner), 0).prod()
        return bool(shared > SAME_FACE * (self.size.prod() + other.size.prod() - shared))


def _detected(pixels: Pixels, scale: float) -> list[_Face]:
    """In a picture that is scaled by a factor."""
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(pixels, (width, height), interpolation=kind)
    # One for each call: it keeps what it works on, and several threads may want it.
    detector = cv2.FaceDetectorYN.create(str(DETECTOR), "", (width, height), LEAST_SCORE)
    _, rows = detector.detect(scaled[:, :, ::-1].copy())
    if rows is None:
        return []
    ratio = np.array([pixels.shape[1] / width, pixels.shape[0] / height], np.float32)
    points = rows[:, :14].reshape(-1, 7, 2) * ratio
    scores = rows[:, 14].tolist()
    return [_Face(p[0], p[1], p[2:], score) for p, score in zip(points, scores, strict=True)]


def to_template(landmarks: Landmarks) -> NDArray[np.float64]:
    """(2, 3): turns, scales and moves a face to where the models want it."""
    matrix, _ = cv2.estimateAffinePartial2D(landmarks, TEMPLATE, method=cv2.LMEDS)
    return np.asarray(matrix, np.float64)


def aligned(pixels: Pixels, matrix: NDArray[np.float64]) -> Pixels:
    """(512, 512, 3)"""
    face = cv2.warpAffine(
        pixels, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_CONSTANT, borderValue=GROUND
    )
    return np.asarray(face, np.uint8)


def put_back(picture: NDArray[np.float32], face: Pixels, matrix: NDArray[np.float64]) -> None:
    """Into `picture` (height, width, 3), RGB of 0 to 255, in place: a restored face that was
    aligned with `matrix`. Its borders fade within a tenth of its side."""
    back = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0, 1], [SIDE, 0, 1], [0, SIDE, 1], [SIDE, SIDE, 1]]) @ back.T
    height, width = picture.shape[:2]
    left, top = np.maximum(np.floor(corners.min(0)).astype(int) - 2, 0)
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 3, (width, height))
    back[:, 2] -= left, top
    size = (int(right - left), int(bottom - top))
    covered = cv2.warpAffine(np.ones((SIDE, SIDE), np.float32), back, size)
    covered = cv2.erode(covered, np.ones((2, 2), np.uint8))
    restored = cv2.warpAffine(face.astype(np.float32), back, size) * covered[:, :, None]
    edge = int(covered.sum() ** 0.5) // 20
    soft = covered
    if edge:
        soft = cv2.erode(covered, np.ones((2 * edge, 2 * edge), np.uint8))
        soft = cv2.GaussianBlur(soft, (2 * edge + 1, 2 * edge + 1), 0)
    part = picture[top:bottom, left:right]
    part += soft[:, :, None] * (restored - part)
