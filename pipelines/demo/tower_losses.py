"""What trains the demo's vision tower: SigLIP's sigmoid loss, and a loss over patches beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import SiglipTextConfig, SiglipTextModel

from pipelines.demo.patches import ASKED, OF_PATCH

FEATURE_LAYER = -2
"""LLaVA's, of hidden_states."""
MAX_WORDS = 32
TEXT_WIDTH = 64


class TowerInTraining(nn.Module):
    """A SiglipVisionModel, a text half and a head over its patches, both to be thrown away.

    num_words: of the text half's vocabulary. what: weight of what a patch shows.
    """

    def __init__(self, tower: Any, num_words: int, what: float) -> None:
        super().__init__()
        self.tower = tower
        self.weights = {**dict.fromkeys(OF_PATCH, 1.0), "what": what}
        width = self.tower.config.hidden_size
        self.text = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=num_words,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_WORDS,
                projection_size=width,
            )
        )
        self.ask = nn.Linear(width, sum(map(len, ASKED.values())))
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def losses(
        self, pixels: torch.Tensor, tokens: torch.Tensor | None, answers: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the losses by name; without tokens that of patches alone."""
        if tokens is None:
            return {"patches": self._patches(self._features(pixels), answers)}
        seen = self.tower(pixels, output_hidden_states=True)
        images = functional.normalize(seen.pooler_output, dim=-1)
        texts = functional.normalize(self.text(tokens).pooler_output, dim=-1)
        logits = self.scale.exp() * images @ texts.T + self.bias
        signs = 2 * torch.eye(len(logits)) - 1
        sigmoid = -functional.logsigmoid(signs * logits).sum() / len(logits)
        patches = self._patches(seen.hidden_states[FEATURE_LAYER], answers)
        return {"sigmoid": sigmoid, "patches": patches}

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return hidden_states[FEATURE_LAYER], without the layers after it."""
        features: torch.Tensor = self.tower.embeddings(pixels)
        for layer in self.tower.encoder.layers[: FEATURE_LAYER + 1]:
            features = layer(features, attention_mask=None)
        return features

    def _patches(self, features: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a question; a patch with a thing counts as four."""
        said = self.ask(features).flatten(0, 1).split([len(one) for one in ASKED.values()], -1)
        answers = answers.flatten(0, 1)
        weight = 1 + 3 * (answers[:, 0] > 0).float()
        total = features.new_zeros(())
        for at, (name, logits) in enumerate(zip(ASKED, said, strict=True)):
            losses = functional.cross_entropy(logits, answers[:, at], reduction="none")
            total += (weight * losses).sum() / weight.sum() * self.weights.get(name, 0.5)
        return total
