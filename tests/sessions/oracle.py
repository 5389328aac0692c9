"""What a stock transformers model with its stock cache says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from djinn_core.sessions import Session


class Oracle:
    """The uninterrupted run, pass by pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask: torch.Tensor | None = None

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        given = {}
        if mask is not None or self.mask is not None:
            added = torch.ones_like(ids) if mask is None else mask
            self.mask = added if self.mask is None else torch.cat([self.mask, added], dim=1)
            positions = (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 0)[:, -ids.shape[1] :]
            given = {"attention_mask": self.mask, "position_ids": positions}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **given)
        return out.logits[:, -1]

    def greedy(self, logits: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The logits of `count` further passes, each over the most likely token."""
        out = []
        for _ in range(count):
            logits = self.forward(logits.float().argmax(-1)[:, None])
            out.append(logits)
        return out


def prompt(batch: int = 1, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int, tokens: int) -> torch.Tensor:
    mask = torch.ones((batch, tokens), dtype=torch.long)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return mask


def likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each sequence, [B, 1]."""
    return logits.float().argmax(-1)[:, None]


def speak(session: Session, logits: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """The logits of `tokens` passes, each over the most likely token of the one before."""
    said = []
    for _ in range(tokens):
        logits = session.forward(likely(logits))
        said.append(logits)
    return said


def equal(said: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Bit for bit, and as many."""
    return len(said) == len(wanted) and all(map(torch.equal, said, wanted))
