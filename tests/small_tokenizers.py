"""Small BPE tokenizers of the kinds that language models have, and Bunny's way to labels.

`bunny_labels` is written from what Bunny is known to do (per-round tokenization, masking by
lengths), not from its code: on healthy rows it and the span labels must agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

IMAGE_ID = 5000  # beyond every small vocabulary, as a reserved row of the embedding is
NUM_IMAGE_TOKENS = 5
IGNORED = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
CORPUS = [
    SYSTEM,
    "USER: What is in the picture? ASSISTANT: A cat sits on the mat, and the dog looks at it.",
    'USER: Why? ASSISTANT: Because 12 dogs (and 3.5 cats) were there: "yes", they said.',
    "猫が好きです 🙂 naïve café\n\n    def f(x):\n        return x\n",
    "user assistant system <image> <|endoftext|> </s> <|im_start|> <|im_end|> " * 2,
]


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of kind byte (GPT-2, Phi), byte_bos (Llama 3) or one of Llama 2's forms.

    always, first: a space is put before every piece of text, or only before the first; prepend:
    before every piece, by the normalizer, and what no token has is spelled in bytes.
    """
    is_byte, has_bos = kind.startswith("byte"), kind != "byte"
    made = Tokenizer(models.BPE(unk_token=None if is_byte else "<unk>"))
    if is_byte:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        scheme = "always" if kind == "prepend" else kind
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    end = "<|endoftext|>" if is_byte else "</s>"
    specials = ["<unk>", "<s>", end, "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(CORPUS * 3, _trainer(specials, is_byte))
    if kind == "prepend":
        made = _with_bytes(made)
    if has_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    more = ["<|im_start|>", "<|im_end|>"]
    named = {"bos_token": "<s>", "eos_token": end, "additional_special_tokens": more}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def _with_bytes(trained: Tokenizer) -> Tokenizer:
    """Return the tokenizer as SentencePiece's are converted: no pre-tokenizer, bytes at the end."""
    known = json.loads(trained.to_str())
    vocab = known["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    known["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(known | {"pre_tokenizer": None, "decoder": None}))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(parts)
    spaces = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return made


def _trainer(specials: list[str], is_byte: bool) -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte else []
    return trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )


def row_of(*texts: str, image: bool = False, first: str = "human") -> dict[str, Any]:
    """Return a LLaVA row of turns by human and gpt in turn; with an image, asked about first."""
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": roles[at % 2], "value": text} for at, text in enumerate(texts)]
    if image:
        asked = roles.index("human")
        turns[asked]["value"] = f"{turns[asked]['value']}\n<image>"
    return {"id": "1", "conversations": turns} | ({"image": "1.jpg"} if image else {})


def bunny_labels(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, *, knows_bos: bool
) -> tuple[list[int], list[int]]:
    """Return ids and labels of the conversation as Bunny makes them, images expanded.

    Every round is tokenized on its own, its question (with " ASSISTANT: ") too; where the lengths
    do not add up, nothing is trained. knows_bos: whether the variant for tokenizers with BOS is
    chosen.
    """
    end, has_image = tokenizer.eos_token, "image" in row
    prompt = _bunny_prompt(row, end)
    ids = _bunny_ids(prompt, tokenizer, has_image)
    labels, bos = list(ids), int(knows_bos)
    labels[:bos] = [IGNORED] * bos
    at = bos
    for said in prompt.split(end):
        parts = said.split(" ASSISTANT: ")
        if said == "" or len(parts) != 2:
            break
        asked = len(_bunny_ids(parts[0] + " ASSISTANT: ", tokenizer, has_image)) - bos - 1
        labels[at : at + asked] = [IGNORED] * asked
        at += len(_bunny_ids(said, tokenizer, has_image)) - bos + 1
    labels[at:] = [IGNORED] * (len(ids) - at) if at <= len(ids) else []
    return _expanded(ids, labels if at == len(ids) else [IGNORED] * len(ids))


def bunny_plain_labels(
    caption: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Return ids and labels of an image and its caption as Bunny's stage 1 makes them."""
    ids = _bunny_ids(f"<image>{caption}\n", tokenizer, has_image=True)
    untrained = len(_bunny_ids("<image>", tokenizer, has_image=True))
    return _expanded(ids, [IGNORED] * untrained + ids[untrained:])


def _bunny_prompt(row: Mapping[str, Any], end: str) -> str:
    turns = row["conversations"]
    turns = turns[1:] if turns[0]["from"] != "human" else turns
    prompt = SYSTEM + " "
    for turn in turns:
        text = turn["value"]
        if "image" in row and "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        role, closing = ("USER", " ") if turn["from"] == "human" else ("ASSISTANT", end)
        prompt += f"{role}: {text}{closing}" if text else f"{role}:"
    return prompt


def _bunny_ids(text: str, tokenizer: PreTrainedTokenizerFast, has_image: bool) -> list[int]:
    if not has_image:
        return list(tokenizer(text).input_ids)
    pieces = [list(tokenizer(piece).input_ids) for piece in text.split("<image>")]
    num_bos = int(pieces[0][:1] == [tokenizer.bos_token_id])
    ids = pieces[0][:num_bos]
    for number, piece in enumerate(pieces):
        ids += ([-200] if number else []) + piece[num_bos:]
    return ids


def _expanded(ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    counts = [NUM_IMAGE_TOKENS if one == -200 else 1 for one in ids]
    shown = [
        (IMAGE_ID, IGNORED) if one == -200 else (one, label)
        for one, label in zip(ids, labels, strict=True)
    ]
    flat = [pair for pair, count in zip(shown, counts, strict=True) for _ in range(count)]
    return [one for one, _ in flat], [label for _, label in flat]
