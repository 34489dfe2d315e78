"""Whether a language model reads packed samples as if each were alone: tried, not looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifests.errors import UserError

_TOLERANCE = {torch.float32: 1e-3}
_ROUNDED = 0.1  # of 16-bit numbers: other kernels may serve a packed row


def packed_positions(lengths: list[int]) -> Tensor:
    """Return positions that begin again with each sample: int64 [1, sum of lengths].

    By them transformers knows a packed row, if there is neither a mask nor a cache
    (transformers.masking_utils.find_packed_sequence_indices).
    """
    return torch.cat([torch.arange(length) for length in lengths])[None]


@torch.no_grad()
def check_packing(decoder: Any, embedded: Tensor) -> None:
    """Check that no sample of a packed row sees another one.

    decoder: a language model without head, on its device. embedded: [17, width], any tokens'.
    Raises: UserError for one that mixes samples or counts positions through, e.g. by convolutions.
    """
    first, other, second = torch.split(embedded, [5, 5, 7])
    was_training = decoder.training
    decoder.eval()  # no dropout
    alone = _read(decoder, second)
    after, changed = _read(decoder, first, second), _read(decoder, other, second)
    decoder.train(was_training)
    far = (after - alone).abs().max() > _TOLERANCE.get(alone.dtype, _ROUNDED) * alone.abs().max()
    if far or not torch.equal(after, changed):
        raise UserError(
            f"{type(decoder).__name__} cannot read packed samples.",
            "A sample behind another one gets other values than alone: they are mixed.",
            "Set plan.packing: false.",
        )


def _read(decoder: Any, *samples: Tensor) -> Tensor:
    """Return the last sample's hidden states."""
    positions = packed_positions([len(one) for one in samples]).to(samples[0].device)
    inputs = torch.cat(samples)[None]
    out = decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False)
    last: Tensor = out.last_hidden_state[0, -len(samples[-1]) :]
    return last
