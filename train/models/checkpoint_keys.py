"""Names of a checkpoint's tensors, from a vision tower or a causal LM to the LLaVA layout.

The layout written is the published one (`vision_tower.vision_model.*`, `language_model.model.*`,
`language_model.lm_head.*`): Transformers, vLLM and the converters of llama.cpp all read it.
Transformers 5 itself saves towers without `vision_model.`, which the others do not find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PROJECTOR = "multi_modal_projector"
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
_NOT_OF_THE_TOWER = re.compile(r"text_model\.|logit_(scale|bias)$|(text|visual)_projection\.")
_TOWER = re.compile(r"(vision_model\.)?(embeddings|encoder|head|post_layernorm|pre_layrnorm)\.")
_PUBLISHED = {
    "vision_tower.": "vision_tower.vision_model.",
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_EVA_PATCHES = "vision_tower.embeddings.patch_embed."
_EVA = re.compile(r"(patch_embed|blocks|norm|norm_pre)\.|(cls_token|pos_embed)$")
_NOT_OF_EVA = re.compile(r"(head|fc_norm|rope|text)\.|logit_(scale|bias)$")  # rope: made anew
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|masked_bias)$")  # rebuilt when loading


def vision_key(name: str) -> str | None:
    """Return a SigLIP or CLIP tensor's name in a LLaVA checkpoint.

    Args:
        name: as a dual model (`vision_model.*`, `text_model.*`), Transformers 4's vision-only model
            (`vision_model.*`) or Transformers 5's (no prefix) saves it.

    Returns: None for what a vision tower lacks: text model, projections, temperature, buffers.
    Raises: KeyError for any other name.
    """
    if _NOT_OF_THE_TOWER.match(name) or _BUFFERS.search(name):
        return None
    if not _TOWER.match(name):
        raise KeyError(name)
    return "vision_tower.vision_model." + name.removeprefix("vision_model.")


def eva_key(name: str) -> str | None:
    """Return an EVA tensor's name in a LLaVA checkpoint, where train.models.eva looks for it.

    Args:
        name: as timm saves it, or open_clip (`visual.trunk.*`).

    Returns: None for what a tower lacks: classifier, text model, temperature, rotary tables.
    Raises: KeyError for any other name.
    """
    name = name.removeprefix("visual.trunk.")
    if _NOT_OF_EVA.match(name):
        return None
    if not _EVA.match(name):
        raise KeyError(name)
    for theirs, ours in (("blocks.", "encoder.layers."), ("norm.", "post_layernorm.")):
        if name.startswith(theirs):
            return f"vision_tower.{ours}{name.removeprefix(theirs)}"
    return f"vision_tower.embeddings.{name}"


def language_key(name: str, tied: bool) -> str | None:
    """Return a causal LM tensor's name in a LLaVA checkpoint.

    Args:
        name: `model.*` or `lm_head.*`.
        tied: the head is the embedding, and a stored copy of it is left out.

    Returns: None for a tied head, buffers, and a head's bias, which LLaVA's head cannot hold.
    Raises: KeyError for any other name.
    """
    if _BUFFERS.search(name) or name == "lm_head.bias" or (tied and name == "lm_head.weight"):
        return None
    if not name.startswith("model.") and name != "lm_head.weight":
        raise KeyError(name)
    return f"language_model.{name}"


def plain_key(name: str) -> str:
    """Return a LLaVA tensor's name without what layouts differ in.

    Args:
        name: as in a published checkpoint (`language_model.model.*`), as Transformers 5 saves it
            (`model.language_model.*`), or as its modules are named.

    Example: "language_model.model.norm.weight" -> "language_model.norm.weight"
    """
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    return name.replace("language_model.lm_head.", "lm_head.").replace("_model.model.", "_model.")


def published_key(name: str) -> str:
    """Return a LLaVA tensor's name in the published layout. name: in any; see plain_key."""
    plain = plain_key(name)
    for bare, published in _PUBLISHED.items():
        if plain.startswith(bare):
            return published + plain.removeprefix(bare)
    return plain


def published_keys(names: Iterable[str]) -> dict[str, str]:
    """Return name -> published_key of all tensors of one model.

    An EVA tower was never published as LLaVA's: it stays where train.models.eva looks for it.
    """
    plain = {name: plain_key(name) for name in names}
    is_eva = any(one.startswith(_EVA_PATCHES) for one in plain.values())
    return {
        name: one if is_eva and one.startswith("vision_tower.") else published_key(name)
        for name, one in plain.items()
    }
