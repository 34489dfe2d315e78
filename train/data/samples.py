"""Samples as the model reads them: ids, labels and pixels, of a row and of a micro-batch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manifests import paths, store
from manifests.errors import UserError
from train.config import TrainConfig
from train.data.batches import MicroBatch
from train.data.images import ImageDamaged, ImageRules, decode
from train.data.index import TrainSample
from train.data.lengths import Length
from train.text.rounds import SampleRefused
from train.text.template import IGNORED, Template, Tokenized, template_named, tokenize


class Row(NamedTuple):
    """One sample. ids, labels: int64 [n]; pixels: float32 [images, 3, side, side]."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of samples, in worker processes too."""

    template: Template
    tokenizer: Any
    rules: ImageRules
    image_token_id: int
    tokens_per_image: int
    max_length: int

    @classmethod
    def load(cls, model_dir: str, config: TrainConfig, *, image_token_id: int) -> RowMaker:
        """Return what makes rows for a composed directory. Raises: UserError."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        processor = store.read_json(paths.join(model_dir, "processor_config.json"))
        if processor is None:
            raise UserError(
                f"{model_dir} has no processor_config.json.",
                "It says how pictures become pixel values.",
                "Train a directory that compose wrote.",
            )
        return cls(
            template_named(config.template, tokenizer, end_token=config.end_token),
            tokenizer,
            ImageRules.from_processor(processor["image_processor"], mode=config.image_mode),
            image_token_id,
            config.plan.tokens_per_image,
            config.plan.max_length,
        )

    def __call__(self, sample: TrainSample) -> Row | str:
        """Return the row, or why it cannot be trained on. Raises: UserError."""
        try:
            found = self._tokenized(sample.row)
            if found.num_images > len(sample.images):
                return "image_missing"
            images = [self.rules(decode(one)) for one in sample.images[: found.num_images]]
        except SampleRefused as refused:
            return refused.reason
        except ImageDamaged:
            return "image_damaged"
        side = self.rules.side
        pixels = np.stack(images) if images else np.empty((0, 3, side, side), np.float32)
        return Row(found.ids, found.labels, pixels)

    def measure(self, row: Mapping[str, Any], num_images: int) -> Length | str:
        """Return the length of a LLaVA row whose shard holds so many images, or why it has none.

        The same as that of the row that is made of it, if its images are whole. Raises: UserError.
        """
        try:
            found = self._tokenized(row)
        except SampleRefused as refused:
            return refused.reason
        if found.num_images > num_images:
            return "image_missing"
        num_tokens = len(found.ids) - found.num_images * self.tokens_per_image
        return Length(num_tokens, found.num_images)

    @property
    def measures_by(self) -> str:
        """What decides lengths, as a SHA-256 in hex: template, tokenizer and limits."""
        template: Any = self.template
        told = {one.name: getattr(template, one.name) for one in fields(template)}
        told.pop("strings", None)  # those of the tokenizer
        decides = [
            *(type(template).__name__, told, self.tokenizer.backend_tokenizer.to_str()),
            *(self.image_token_id, self.tokens_per_image, self.max_length),
        ]
        return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()

    def _tokenized(self, row: Mapping[str, Any]) -> Tokenized:
        return tokenize(
            row,
            self.template,
            self.tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.tokens_per_image,
            max_length=self.max_length,
        )


class Batch(NamedTuple):
    """A micro-batch. ids, labels: int64 [rows, length]; pixels: float32 [images, 3, side, side].

    positions: int64 [1, length] of samples packed into one row, 0 where one begins; or None.
    index_rows: of the index, one a sample. num_tokens: without padding. num_images: without empty
    ones. dropped: reason -> samples.
    """

    ids: Tensor
    labels: Tensor
    pixels: Tensor
    positions: Tensor | None
    index_rows: NDArray[np.int64]
    num_tokens: int
    num_images: int
    dropped: Counter[str]


def collate(
    micro: MicroBatch, *, padding_id: int, packing: bool = False, dummy_images: bool = False
) -> Batch | Counter[str]:
    """Return a micro-batch's samples; or, without any, why each was dropped.

    Side by side, padded on the right, or packed into one row. dummy_images: behind all images, an
    empty one for each sample without any.
    """
    kept = [at for at, one in enumerate(micro.items) if isinstance(one, Row)]
    dropped = Counter(one for one in micro.items if isinstance(one, str))
    if not kept:
        return dropped
    rows: list[Row] = [micro.items[at] for at in kept]
    laid = _packed if packing else _padded
    pixels = [one.pixels for one in rows]
    if dummy_images:
        num_empty = sum(not len(one) for one in pixels)
        pixels.append(np.zeros((num_empty, *pixels[0].shape[1:]), np.float32))
    return Batch(
        laid([one.ids for one in rows], padding_id),
        laid([one.labels for one in rows], IGNORED),
        torch.from_numpy(np.concatenate(pixels)),
        _packed([np.arange(len(one.ids)) for one in rows]) if packing else None,
        micro.rows[kept],
        num_tokens=sum(len(one.ids) for one in rows),
        num_images=sum(len(one.pixels) for one in rows),
        dropped=dropped,
    )


def _packed(rows: Sequence[NDArray[np.int64]], _value: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(rows))[None]


def _padded(rows: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    tensors = [torch.from_numpy(one) for one in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
