"""An open_clip model on this machine: found, checked, loaded once per process, run on batches.

    ViT-L-14 with pretrained: openai    an architecture and its weights tag (or a weights file)
    hf-hub:organisation/name            a repository of the Hugging Face hub
    local-dir:path, or just path        a folder: open_clip_config.json, weights, tokenizer files
    warren:demo/model                   such a folder that ships with Warren

The first two may fetch weights from the hub, unless they are in its cache; the others never do.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from curate.media.images import ImageError
from manifests import paths
from manifests.errors import UserError
from manifests.record import canonical_json
from manifests.strict import nearest

if TYPE_CHECKING:
    import torch
    from PIL import Image

HUB_SCHEME = "hf-hub:"
FOLDER_SCHEME = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")

# CLIP's longest token has 24 letters. Byte-pair encoding takes time quadratic in the length of a
# word: without a cut, one caption of a million letters would hold a worker for days.
MAX_CHARS_PER_TOKEN = 32

# Resizing to the shorter side would bring an image of 1 x 65,535 pixels to 224 x 14.7 million.
MAX_RESIZED_PIXELS = 1 << 25

Precision = Literal["fp32", "fp16", "bf16"]
Pixels = npt.NDArray[np.uint8]

# What open_clip, torch and transformers raise for folders, names and files that do not fit;
# safetensors' own class is added where it is imported.
_LOAD_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    ImportError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as open_clip is told of it; `folder` when it lies on this machine."""

    name: str
    pretrained: str | None = None
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class ClipModel:
    """A loaded model in evaluation mode, and what turns images and captions into its input.

    geometry: PIL image -> PIL image of the model's size. mean, std: float32 [3, 1, 1] on `device`.
    autocast: type of the matrix products on a GPU, None for float32.
    """

    model: Any
    tokenizer: Any
    geometry: Callable[[Image.Image], Image.Image]
    resizes_shorter_side_to: int | None
    mean: torch.Tensor
    std: torch.Tensor
    device: torch.device
    autocast: torch.dtype | None


def find(model: str, pretrained: str | None = None) -> ModelName:
    """Return the model that a recipe means. Imports nothing heavy and opens no connection.

    Raises: UserError for a folder that is not there or lacks config or weights, for an architecture
    without weights, and for weights given beside a model that brings its own.
    """
    in_folder = model.startswith((FOLDER_SCHEME, paths.RESOURCE_SCHEME))
    if pretrained is not None and (in_folder or model.startswith(HUB_SCHEME)):
        raise UserError(
            f"embed.pretrained is {pretrained!r}, but embed.model is {model!r}.",
            "A folder or hub repository brings its own weights.",
            "Remove embed.pretrained.",
        )
    if pretrained is not None or model.startswith(HUB_SCHEME):
        is_hub = model.startswith(HUB_SCHEME)
        return ModelName(model if is_hub else model.replace("/", "-"), pretrained)
    folder = Path(paths.resolve_resource(model).removeprefix(FOLDER_SCHEME))
    _check_folder(model, folder)
    return ModelName(f"{FOLDER_SCHEME}{folder}", None, folder)


def identity(name: ModelName) -> dict[str, Any]:
    """Return what the model is: digests of its files when they are local, else its name."""
    if name.folder is not None:
        files = (path for path in name.folder.iterdir() if _is_part_of_model(path))
        return {"files": {path.name: _sha256_of(path) for path in sorted(files)}}
    if name.pretrained is not None and Path(name.pretrained).is_file():
        return {"model": name.name, "weights": _sha256_of(Path(name.pretrained))}
    return {"model": name.name, "pretrained": name.pretrained}


def check_known(name: ModelName) -> None:
    """Check an architecture and its weights tag against open_clip's lists.

    Raises: UserError with the nearest known name.
    """
    if name.folder is not None or name.name.startswith(HUB_SCHEME):
        return
    open_clip = _open_clip()
    known = open_clip.list_models()
    if name.name not in known:
        raise _unknown("model", name.name, known, why="open_clip has no such architecture.")
    tags = open_clip.list_pretrained_tags_by_model(name.name)
    if name.pretrained not in tags and not Path(str(name.pretrained)).is_file():
        why = f"{name.name} has no such weights, and no file has that name."
        raise _unknown("pretrained", str(name.pretrained), tags, why=why)


def load(name: ModelName, *, gpu_precision: Precision) -> ClipModel:
    """Return the model on this process's device, a GPU where torch sees one.

    The last model stays loaded: the next call for the same files and precision is free.
    Raises: UserError when the model is unknown, or its files cannot be fetched or do not fit.
    """
    return _load(name, canonical_json(identity(name)), gpu_precision)


def wants_quick_gelu(name: ModelName) -> bool:
    """Tell whether the weights were trained with QuickGELU, as OpenAI's were.

    open_clip 3 only warns when an architecture and its weights differ in that, and computes on.
    """
    found = _open_clip().get_pretrained_cfg(name.name, str(name.pretrained))
    return bool(found and found.get("quick_gelu", False))


def prepare(clip: ClipModel, image: Image.Image) -> Pixels:
    """Return the pixels that the model sees of an RGB image: uint8 [height, width, 3].

    Raises: ImageError for an image so long that its resized form is too large, or has no width.
    """
    shorter, longer = sorted(image.size)
    side = clip.resizes_shorter_side_to
    if side is not None and side * side * longer > MAX_RESIZED_PIXELS * shorter:
        detail = f"{image.width} x {image.height} is too long to bring the shorter side to {side}"
        raise ImageError("too_many_pixels", detail)
    try:
        return np.asarray(clip.geometry(image), dtype=np.uint8)
    except ValueError as error:  # Pillow, when rounding leaves no pixel of the shorter side
        detail = f"{image.width} x {image.height} cannot be resized: {error}"
        raise ImageError("zero_side", detail) from error


def encode(
    clip: ClipModel, pixels: Pixels, captions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (image rows, text rows), float16 [n, d] on the model's device.

    Rows are brought to unit norm in float32, then rounded. On a GPU the work is only queued.
    Args: pixels: uint8 [n, height, width, 3]; captions: n texts, cut where the tokenizer ends them.
    """
    import torch

    with torch.inference_mode():
        tokens = tokenize(clip, captions).to(clip.device)
        images = encode_images(clip, pixels)
        with _autocast(clip):
            texts = clip.model.encode_text(tokens)
        return images, _unit_rows(texts)


def encode_images(clip: ClipModel, pixels: Pixels) -> torch.Tensor:
    """Return the image rows alone, as `encode` makes them."""
    import torch

    with torch.inference_mode():
        images = as_input(clip, torch.from_numpy(pixels).to(clip.device))
        with _autocast(clip):
            features = clip.model.encode_image(images)
        return _unit_rows(features)


def _autocast(clip: ClipModel) -> AbstractContextManager[Any]:
    import torch

    if clip.autocast is None:
        return nullcontext()
    return torch.autocast(clip.device.type, clip.autocast)


def _unit_rows(features: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1).half()


def as_input(clip: ClipModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the model's input, float32 [n, 3, height, width]; the arithmetic of torchvision's
    ToTensor and Normalize, on the device."""
    scaled = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
    return scaled.sub_(clip.mean).div_(clip.std)


def tokenize(clip: ClipModel, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 [n, context_length]."""
    limit = MAX_CHARS_PER_TOKEN * int(clip.tokenizer.context_length)
    tokens: torch.Tensor = clip.tokenizer([caption[:limit] for caption in captions])
    return tokens


@contextmanager
def pinned_threads(num_threads: int) -> Iterator[None]:
    """Give torch so many threads inside the block; another number may round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _load(name: ModelName, identity_json: str, gpu_precision: Precision) -> ClipModel:
    check_known(name)
    open_clip = _open_clip()
    import torch
    from safetensors import SafetensorError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = open_clip.create_model(
            name.name,
            pretrained=name.pretrained,
            device=device,
            force_quick_gelu=wants_quick_gelu(name),
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(name.name)
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    return _assembled(model.eval(), tokenizer, device, gpu_precision)


def _assembled(
    model: Any, tokenizer: Any, device: torch.device, gpu_precision: Precision
) -> ClipModel:
    import torch

    open_clip = _open_clip()
    config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    compose = open_clip.transform.image_transform_v2(config, is_train=False)
    last_steps = [type(step).__name__ for step in compose.transforms[-2:]]
    assert last_steps == ["MaybeToTensor", "Normalize"], "as_input does these two"
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(gpu_precision)
    side = config.size if isinstance(config.size, int) else max(config.size)
    return ClipModel(
        model,
        tokenizer,
        geometry=type(compose)(compose.transforms[:-2]),
        resizes_shorter_side_to=side if config.resize_mode == "shortest" else None,
        mean=torch.tensor(config.mean, device=device).view(3, 1, 1),
        std=torch.tensor(config.std, device=device).view(3, 1, 1),
        device=device,
        autocast=half if device.type == "cuda" else None,
    )


def _open_clip() -> Any:
    from curate.media.torchvision_ops import ensure_torchvision_importable

    ensure_torchvision_importable()
    import open_clip

    return open_clip


def _check_folder(model: str, folder: Path) -> None:
    lacking = None
    if not folder.is_dir():
        lacking = "no such folder is there"
    elif not (folder / CONFIG_FILE).is_file():
        lacking = f"the folder has no {CONFIG_FILE}"
    elif not any(path.suffix in WEIGHTS_SUFFIXES for path in folder.iterdir()):
        lacking = f"the folder has no weights ({', '.join(WEIGHTS_SUFFIXES)})"
    if lacking is not None:
        raise UserError(
            f"embed.model {model!r} cannot be used: {lacking}.",
            "Without embed.pretrained it names a folder that open_clip has saved.",
            "Give such a folder, or hf-hub:organisation/name, or an architecture with "
            "pretrained, e.g. {model: ViT-L-14, pretrained: openai}.",
        )


def _is_part_of_model(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix != ".md"


def _sha256_of(path: Path) -> str:
    found = path.stat()
    return _sha256_at(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_at(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unknown(field: str, value: str, known: list[str], *, why: str) -> UserError:
    guess = nearest(value, known)
    listed = f"Known: {', '.join(known)}." if len(known) <= 40 else ""
    fix = f"Did you mean {guess!r}? {listed}" if guess else listed
    return UserError(f"embed.{field} is {value!r}.", why, fix.strip() or "See open_clip's list.")


def _not_loaded(name: ModelName, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    fix = (
        "Check the files in the folder, or export the model again."
        if name.folder is not None
        else "Check the name and the network, or download the model and give its folder."
    )
    shown = name.name if name.pretrained is None else f"{name.name} ({name.pretrained})"
    return UserError(f"The model {shown} cannot be loaded.", reason[0][:500], fix)
