"""A published Bunny checkpoint, rewritten as a stock LLaVA directory.

Bunny (https://arxiv.org/abs/2402.11530, https://github.com/BAAI-DCAI/Bunny) loads with code of its
own; LLaVA says the same by other names. Tensors are renamed one at a time, so nothing is computed
but for MiniCPM's logits scale, which moves into its last norm, and LoRA adapters, which are merged.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from manifests import store
from manifests.errors import UserError
from train.models import checkpoint_keys, processor_files, scale_folding
from train.models.bunny_config import FAMILIES, read_bunny_config, text_fields, vision_fields
from train.models.compose import (
    DTYPES,
    SHARD_BYTES,
    check_dtype,
    llava_config,
    load_tokenizer_apart,
    tower_tensors,
    unfinished_directory,
    with_more_rows,
)
from train.models.image_token import ImageToken, pick_image_token
from train.models.lora_merge import ADAPTER_CONFIG, Adapter, read_adapter
from train.models.origin import write_origin
from train.models.pickled_files import PICKLED, held_tensors, model_tensors, pickled_tensors
from train.models.processor_files import BUNNY_TEMPLATE, ImageShape
from train.models.tensor_files import INDEX, WEIGHTS, LazyTensor, write_tensors
from train.models.towers import Tower, read_tower

_MORE_ROWS = 64  # Bunny cuts the vocabulary to its tokenizer: often no row is left for images
_TOKENIZER_CONFIG = "tokenizer_config.json"
_PROJECTOR_FILE = "mm_projector.bin"
_LAYERS = {"0": "linear_1", "2": "linear_2"}
_PROJECTOR = re.compile(r"model\.mm_projector\.([02])\.(weight|bias)")
_LANGUAGE = re.compile(r"(model\.(embed_tokens|layers|norm|final_layernorm)|lm_head)\.")
_TOWER = "model.vision_tower.vision_tower."


@dataclass(frozen=True, slots=True)
class Imported:
    """A written LLaVA directory.

    `added_rows` is how many rows embedding and head have more than Bunny's. `merge_noise` has, for
    each weight that an adapter changed, |rounding| / |change|: 0.1 says that a tenth of what
    training did is drowned in the output's dtype.
    """

    path: str
    family: str
    image_token: str
    image_token_id: int
    num_image_tokens: int
    added_rows: int = 0
    merge_noise: dict[str, float] = field(default_factory=dict)


def import_bunny(
    checkpoint: str,
    out: str,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: str = "keep",
) -> Imported:
    """Write `out`, a LLaVA model with the logits of a Bunny checkpoint.

    Args:
        checkpoint: directory of a whole model, of a LoRA adapter with non_lora_trainables.bin, or
            of a stage-1 mm_projector.bin; with config.json.
        out: directory to write. config.json comes last: without it the directory is unfinished,
            and written anew.
        base: directory of the language model that an adapter or a projector was trained on.
        vision_tower: directory of the SigLIP or CLIP tower. Its weights stand in for those that
            the checkpoint lacks; needed if it has none, or a tower of an unusual width.
        dtype: of all weights: float32, float16, bfloat16, or keep: every tensor as it is, and
            float16, in which Bunny serves, for a merged adapter.

    Raises: UserError for what LLaVA cannot express, for missing or foreign tensors, for pickles
        that hold more than tensors, and for a finished `out`.
    """
    path, source = unfinished_directory(out), Path(checkpoint)
    check_dtype(dtype)
    raw = read_bunny_config(source)
    lm = Path(base) if base is not None else source
    named, adapter = _read_all(source, base)
    tower, named = _with_tower(source, vision_tower, named)
    if checkpoint_keys.EMBEDDING not in named:
        raise _incomplete(source, [checkpoint_keys.EMBEDDING])
    is_tied = raw.get("tie_word_embeddings", checkpoint_keys.HEAD not in named)
    if is_tied:
        named.pop(checkpoint_keys.HEAD, None)
    text = text_fields(raw, named[checkpoint_keys.EMBEDDING].shape[0], is_tied)

    tokenizer = _bunny_tokenizer(source, lm, raw["model_type"])
    image, more = _image_row(tokenizer, text["vocab_size"])
    config = _text_config(raw["model_type"], text)
    tensors = _rewritten(named, adapter, dtype, more)
    tensors = scale_folding.fold(tensors, scale_folding.logits_divisor(config))
    values = llava_config(tower, text, config, image, more, tensors[0].dtype)
    _check_complete(source, values, tensors)

    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, SHARD_BYTES)
    _write_processor(path, tower, image, raw)
    processor_files.write_tokenizer(path, tokenizer, image, BUNNY_TEMPLATE)
    processor_files.write_generation_config(path, lm, tokenizer)
    write_origin(out, "import_bunny", checkpoint=checkpoint, base=base, vision_tower=vision_tower)
    store.write_json(str(path), "config.json", values)
    noise = adapter.noise if adapter else {}
    num_tokens = tower.shape.num_tokens
    return Imported(str(path), raw["model_type"], image.text, image.id, num_tokens, more, noise)


def stock_key(name: str) -> str | None:
    """Return a Bunny tensor's name in a LLaVA checkpoint; None for buffers and a head's bias.

    Args:
        name: with or without PEFT's `base_model.model.` before it.

    Raises: KeyError for any other name.
    """
    name = name.removeprefix("base_model.model.")
    if found := _PROJECTOR.fullmatch(name):
        return f"{checkpoint_keys.PROJECTOR}.{_LAYERS[found[1]]}.{found[2]}"
    if name.startswith(_TOWER):
        return checkpoint_keys.vision_key(name.removeprefix(_TOWER))
    if _LANGUAGE.match(name):
        return checkpoint_keys.language_key(name, tied=False)
    raise KeyError(name)


def _read_all(source: Path, base: str | None) -> tuple[dict[str, LazyTensor], Adapter | None]:
    """Return tensors by stock name, the checkpoint's in place of the base's, and its adapter."""
    is_adapter = (source / ADAPTER_CONFIG).exists()
    if not is_adapter and not (source / _PROJECTOR_FILE).exists():
        return _renamed(source, model_tensors(source)), None
    if not is_adapter and _has_model(source):
        return _renamed(source, model_tensors(source)), None
    if base is None:
        raise UserError(
            f"{source} holds {'a LoRA adapter' if is_adapter else 'a projector'} only.",
            "The language model's own weights are in another directory.",
            "Name the language model that it was trained on: base=...",
        )
    named = _renamed(Path(base), model_tensors(Path(base)))
    if not is_adapter:
        return named | _renamed(source, pickled_tensors(source / _PROJECTOR_FILE)), None
    named |= _renamed(source, pickled_tensors(source / "non_lora_trainables.bin"))
    adapter = read_adapter(source, _adapter_tensors(source))
    return named, _matched(source, adapter, named)


def _has_model(path: Path) -> bool:
    names = (WEIGHTS, INDEX, PICKLED, f"{PICKLED}.index.json")
    return any((path / name).exists() for name in names)


def _adapter_tensors(path: Path) -> list[LazyTensor]:
    file = path / "adapter_model.safetensors"
    return (
        held_tensors(load_file(file))
        if file.exists()
        else pickled_tensors(path / "adapter_model.bin")
    )


def _renamed(path: Path, tensors: list[LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors by stock name; raise UserError with all names that have none."""
    named, unknown = {}, []
    for one in tensors:
        try:
            name = stock_key(one.name)
        except KeyError:
            unknown.append(one.name)
            continue
        if name is not None:
            named[name] = replace(one, name=name)
    if unknown:
        raise UserError(
            f"{path} has tensors that LLaVA has no place for: {', '.join(sorted(unknown))}.",
            "Leaving them out would change the model.",
            "Check that it is a Bunny checkpoint (or, as base, a causal language model).",
        )
    return named


def _matched(source: Path, adapter: Adapter, named: dict[str, LazyTensor]) -> Adapter:
    """Return the adapter by stock names; raise UserError unless each changes a weight."""
    factors, foreign = {}, []
    for name, (a, b) in adapter.factors.items():
        weight = named.get((_LANGUAGE.match(name) and stock_key(name)) or "")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            foreign.append(name)
        else:
            factors[weight.name] = (a, b)
    if foreign:
        raise UserError(
            f"{source}: the adapter changes weights that the base has not, or in other shapes: "
            f"{', '.join(sorted(foreign))}.",
            "It was trained on another language model.",
            "Name that one as base: base_model_name_or_path in adapter_config.json says which.",
        )
    return replace(adapter, factors=factors)


def _with_tower(
    source: Path, directory: str | None, named: dict[str, LazyTensor]
) -> tuple[Tower, dict[str, LazyTensor]]:
    """Return the tower, and all tensors: the directory's only where the checkpoint has none."""
    if directory is not None:
        tower = read_tower(Path(directory))
        own = {one.name: one for one in tower_tensors(tower)}
        named = own | named
        return replace(tower, raw=_with_head(tower.raw, named)), named
    if not any(name.startswith("vision_tower.") for name in named):
        raise UserError(
            f"{source} has no weights of a vision tower.",
            "Checkpoints that left the tower frozen often leave it out.",
            "Name the directory of the tower in mm_vision_tower: vision_tower=...",
        )
    raw = _with_head(vision_fields(named), named)
    is_clip = raw["model_type"] == "clip_vision_model"
    shape = ImageShape(raw["image_size"], raw["patch_size"], is_clip)
    return Tower(source, raw, raw["hidden_size"], shape), named


def _with_head(raw: dict[str, Any], named: dict[str, LazyTensor]) -> dict[str, Any]:
    """Say if a SigLIP has no pooling head: LLaVA does not use it, and not all files have it."""
    has_head = any(name.startswith("vision_tower.vision_model.head.") for name in named)
    is_siglip = raw["model_type"] == "siglip_vision_model"
    return {**raw, "vision_use_head": False} if is_siglip and not has_head else raw


def _bunny_tokenizer(source: Path, lm: Path, family: str) -> Any:
    """Return the tokenizer, ending answers as Bunny does: Llama's chat models end with another."""
    has_own = (source / _TOKENIZER_CONFIG).exists()
    tokenizer = load_tokenizer_apart(source if has_own else lm)
    end = FAMILIES[family].end
    if end in tokenizer.get_vocab():
        tokenizer.eos_token = end
    return tokenizer


def _image_row(tokenizer: Any, num_rows: int) -> tuple[ImageToken, int]:
    """Return the image token, and the rows to append for it: none while one is free."""
    try:
        return pick_image_token(tokenizer, num_rows, None), 0
    except UserError:
        return pick_image_token(tokenizer, num_rows + _MORE_ROWS, None), _MORE_ROWS


def _text_config(family: str, text: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].config).from_dict(dict(text))


def _rewritten(
    named: dict[str, LazyTensor], adapter: Adapter | None, dtype: str, more: int
) -> list[LazyTensor]:
    """Return the tensors to write, the embedding first: merged, cast, and with rows appended."""
    wanted = DTYPES.get(dtype, torch.float16 if adapter else None)
    made = {}
    for name in sorted(named, key=lambda name: (name != checkpoint_keys.EMBEDDING, name)):
        one = named[name]
        its = wanted or one.dtype
        made[name] = adapter.merged(one, its) if adapter else one.cast(its)
        if more and name in (checkpoint_keys.EMBEDDING, checkpoint_keys.HEAD):
            made[name] = with_more_rows(made[name], more)
    return list(made.values())


def _check_complete(source: Path, values: dict[str, Any], tensors: list[LazyTensor]) -> None:
    """Compare names and shapes with those of the stock model, which is built without weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_dict(json.loads(json.dumps(values)))
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    expected = {
        checkpoint_keys.plain_key(name): tuple(one.shape)
        for name, one in model.state_dict().items()
    }
    if values["tie_word_embeddings"]:
        expected.pop("lm_head.weight")
    found = {checkpoint_keys.plain_key(one.name): one.shape for one in tensors}
    wrong = {name for name, _ in expected.items() ^ found.items()}
    if wrong:
        raise _incomplete(source, sorted(wrong))


def _incomplete(source: Path, names: list[str]) -> UserError:
    return UserError(
        f"{source}: tensors are missing, too many, or not of the shape that config.json says: "
        f"{', '.join(names)}.",
        "The written model would not load, or would draw them at random.",
        "Download the whole repository; check that base and vision_tower are the ones it names.",
    )


def _write_processor(path: Path, tower: Tower, image: ImageToken, raw: dict[str, Any]) -> None:
    """Write the processor; as in Bunny, images are padded to squares only if the config says so."""
    processor_files.write_processor(path, tower.path, tower.shape, image)
    written = json.loads((path / "processor_config.json").read_text())
    written["image_processor"]["do_pad"] = raw.get("image_aspect_ratio") == "pad"
    store.write_json(str(path), "processor_config.json", written)
