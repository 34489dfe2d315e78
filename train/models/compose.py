"""Compose a vision tower and a causal language model into a stock LLaVA directory.

No model is grafted: the checkpoints' tensors are renamed and copied one at a time, and a new
projector (two linear layers with GELU between, LLaVA-1.5's mlp2x_gelu) is drawn from a seed.
What is written loads with `LlavaForConditionalGeneration.from_pretrained` and no code of ours, but
for models of an EVA tower (see train.models.eva), which is said in a warning.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from manifests import store
from manifests.errors import UserError
from train.models import checkpoint_keys, processor_files, scale_folding
from train.models.image_token import ImageToken, pick_image_token
from train.models.origin import write_origin
from train.models.pickled_files import model_tensors
from train.models.processor_files import BUNNY_TEMPLATE
from train.models.same_text import check_same_text
from train.models.tensor_files import LazyTensor, write_tensors
from train.models.towers import Tower, read_language_model, read_tower

SHARD_BYTES = 4 * 1024**3
_TOKENIZER_FILES = {".json", ".model", ".txt", ".jinja"}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


@dataclass(frozen=True, slots=True)
class Composed:
    """A written LLaVA directory; warnings are sentences for the person who composed it."""

    path: str
    image_token: str
    image_token_id: int
    num_image_tokens: int
    warnings: list[str] = field(default_factory=list)


def compose(
    vision_tower: str,
    language_model: str,
    out: str,
    *,
    image_token: str | None = None,
    resize_vocabulary: int = 0,
    seed: int = 0,
    dtype: str = "keep",
    chat_template: str = BUNNY_TEMPLATE,
    shard_bytes: int = SHARD_BYTES,
) -> Composed:
    """Write `out`, a LLaVA model that answers text exactly as the language model does.

    Args:
        vision_tower: directory of a SigLIP, SigLIP 2 (fixed resolution) or CLIP model, whole or
            its vision half, or of an EVA02-CLIP as timm publishes it. Pickled weights will do, too.
        language_model: directory of a causal LM and its tokenizer.
        out: directory to write. config.json comes last: without it the directory is unfinished,
            and composed anew.
        image_token: token that stands for an image; None: see pick_image_token.
        resize_vocabulary: rows to append to embedding and head, for a vocabulary without free rows.
        seed: of the projector's weights.
        dtype: of all weights: float32, float16, bfloat16, or keep: every tensor as it is, the
            projector in float32.
        chat_template: jinja; `<image>` in it becomes the image token.
        shard_bytes: most bytes in one safetensors file.

    Raises: UserError for what LLaVA cannot express, and for a finished `out`.
    Source: key layout and settings as in https://huggingface.co/llava-hf/llava-1.5-7b-hf; recipe of
    Bunny, https://arxiv.org/abs/2402.11530.
    """
    path = unfinished_directory(out)
    check_dtype(dtype)
    tower, lm = read_tower(Path(vision_tower)), read_language_model(Path(language_model))
    divisor = scale_folding.logits_divisor(lm.config)
    tokenizer = (load_tokenizer if lm.is_as_published else load_tokenizer_apart)(lm.path)
    image = pick_image_token(tokenizer, lm.config.vocab_size + resize_vocabulary, image_token)

    tensors, warnings = _language_tensors(lm.path, lm.config, resize_vocabulary)
    warnings += [_not_stock(tower.path)] if tower.is_eva else []
    main_dtype = DTYPES.get(dtype) or tensors[0].dtype
    tensors = scale_folding.fold(tensors, divisor)
    tensors += [*tower_tensors(tower), *_projector(tower, lm.config.hidden_size, seed)]
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, [one.cast(DTYPES.get(dtype, one.dtype)) for one in tensors], shard_bytes)

    processor_files.write_processor(path, tower.path, tower.shape, image)
    processor_files.write_tokenizer(path, tokenizer, image, chat_template)
    processor_files.write_generation_config(path, lm.path, tokenizer)
    values = llava_config(tower, lm.raw, lm.config, image, resize_vocabulary, main_dtype)
    # more rows are another shape to multiply by, and may be summed in another order
    exact = scale_folding.is_exact(divisor) and not resize_vocabulary
    _check(path, values, lm.path, main_dtype, exact)
    write_origin(out, "compose", vision_tower=vision_tower, language_model=language_model)
    store.write_json(str(path), "config.json", values)
    return Composed(str(path), image.text, image.id, tower.shape.num_tokens, warnings)


def unfinished_directory(out: str) -> Path:
    """Return the directory to write. Raises: UserError when it is finished, or no directory."""
    path = Path(out)
    if (path / "config.json").exists() or path.is_file():
        raise UserError(
            f"{out} is there already.",
            "Nothing finished is overwritten.",
            "Name another directory, or remove this one.",
        )
    return path


def check_dtype(dtype: str) -> None:
    """Check that weights can be written so. Raises: UserError."""
    if dtype not in {"keep", *DTYPES}:
        raise UserError(
            f"dtype {dtype!r} is unknown.",
            "Weights are written in a dtype that training reads.",
            f"Use one of: keep, {', '.join(DTYPES)}.",
        )


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a directory; no code in it is run. Raises: UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{path} has no tokenizer that can be read.",
            str(error).splitlines()[0],
            "Take the language model's whole directory, with tokenizer.json.",
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"{path} has a tokenizer without an end-of-text token.",
            "An answer's end must be something that a model can learn to say.",
            "Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def load_tokenizer_apart(path: Path) -> Any:
    """Return the tokenizer of a directory, read away from its config.json. Raises: UserError.

    Beside a config of Bunny or MiniCPM, Transformers would ask to run the code that it names.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / path.name
        folder.mkdir()
        for one in path.iterdir():
            if one.suffix in _TOKENIZER_FILES and one.name != "config.json":
                shutil.copy(one, folder / one.name)
        if (given := folder / "tokenizer_config.json").exists():
            config = json.loads(given.read_text())
            config.pop("auto_map", None)
            given.write_text(json.dumps(config))
        try:
            return load_tokenizer(folder)
        except UserError as error:
            named = error.what.replace(str(folder), str(path))
            raise UserError(named, error.why, error.fix) from error


def _language_tensors(path: Path, config: Any, more: int) -> tuple[list[LazyTensor], list[str]]:
    """Return the LM's tensors, the embedding first, and what is lost of them."""
    found, warnings = [], []
    for one in model_tensors(path):
        name = _renamed(path, one.name, config.tie_word_embeddings)
        if one.name == "lm_head.bias" and (largest := float(one.read().abs().max())):
            warnings.append(_lost_bias(path, largest))
        if name is not None:
            found.append(LazyTensor(name, one.shape, one.dtype, one.read))
    by_name = {one.name: one for one in found}
    for name in (checkpoint_keys.EMBEDDING, checkpoint_keys.HEAD):
        if name in by_name and more:
            by_name[name] = with_more_rows(by_name[name], more)
    if checkpoint_keys.EMBEDDING not in by_name:
        raise _foreign_tensors(path, "model.embed_tokens.weight is missing")
    first = by_name.pop(checkpoint_keys.EMBEDDING)
    return [first, *by_name.values()], warnings


def _lost_bias(path: Path, largest: float) -> str:
    return (
        f"lost head bias: {path.name} adds a bias (up to {largest:.3g}) to its logits, and LLaVA's "
        "head has none; training adapts to that, but untrained answers shift (Bunny does the same)"
    )


def _not_stock(path: Path) -> str:
    return (
        f"not stock: {path.name} is an EVA tower, which Transformers has no class for; warren "
        "loads this model, plain Transformers, vLLM and llama.cpp cannot: for them, take SigLIP"
    )


def _renamed(path: Path, name: str, tied: bool) -> str | None:
    try:
        return checkpoint_keys.language_key(name, tied)
    except KeyError as error:
        raise _foreign_tensors(path, f"{name} is no tensor of a causal LM") from error


def _foreign_tensors(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}.",
        "A checkpoint's tensors are expected as model.* and lm_head.*, or, of a vision tower, "
        "as vision_model.*.",
        "Load the model in its own class (AutoModelForCausalLM, SiglipModel, ...) and "
        "save_pretrained it.",
    )


def with_more_rows(matrix: LazyTensor, more: int) -> LazyTensor:
    """Append rows that are the mean of the others: no new token is likelier than an average one."""

    def read() -> torch.Tensor:
        rows = matrix.read()
        mean = rows.mean(dim=0, keepdim=True, dtype=torch.float64).to(rows.dtype)
        return torch.cat([rows, mean.expand(more, -1)])

    return LazyTensor(matrix.name, (matrix.shape[0] + more, matrix.shape[1]), matrix.dtype, read)


def tower_tensors(tower: Tower) -> list[LazyTensor]:
    """Return a vision tower's tensors under their names in the LLaVA layout. Raises: UserError."""
    found = []
    key = checkpoint_keys.eva_key if tower.is_eva else checkpoint_keys.vision_key
    for one in model_tensors(tower.path):
        try:
            name = key(one.name)
        except KeyError as error:
            kinds = "an EVA of timm" if tower.is_eva else "a SigLIP or CLIP"
            raise _foreign_tensors(tower.path, f"{one.name} is no tensor of {kinds}") from error
        if name is not None:
            found.append(LazyTensor(name, one.shape, one.dtype, one.read))
    return found


def _projector(tower: Tower, text_dim: int, seed: int) -> list[LazyTensor]:
    """Draw the projector in float32 as nn.Linear initialises itself, weight before bias."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for layer, fan_in in (("linear_1", tower.hidden_size), ("linear_2", text_dim)):
        bound = fan_in**-0.5
        for name, shape in (("weight", (text_dim, fan_in)), ("bias", (text_dim,))):
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            drawn.append(_made(f"{checkpoint_keys.PROJECTOR}.{layer}.{name}", values))
    return drawn


def _made(name: str, values: torch.Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(values.shape), values.dtype, lambda: values)


def llava_config(
    tower: Tower,
    raw: dict[str, Any],
    config: Any,
    image: ImageToken,
    more: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return config.json: both models' own fields as they were published, in LLaVA's frame.

    vLLM builds the language model by text_config.architectures, so it is always set.
    """
    text = {**copy.deepcopy(raw), "vocab_size": config.vocab_size + more}
    text["tie_word_embeddings"] = config.tie_word_embeddings
    text |= scale_folding.undivided(config)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": str(dtype).removeprefix("torch."),
        "text_config": text,
        "vision_config": copy.deepcopy(tower.raw),
        "image_token_index": image.id,
        "image_seq_length": tower.shape.num_tokens,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": tower.shape.strategy,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _check(path: Path, values: dict[str, Any], base: Path, dtype: torch.dtype, exact: bool) -> None:
    from transformers import LlavaConfig

    config = LlavaConfig.from_dict(json.loads(json.dumps(values)))
    relative = 0.0 if exact else 8 * torch.finfo(dtype).eps
    check_same_text(path, config, base, dtype, relative=relative)
