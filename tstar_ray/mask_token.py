"""A mask token for a checkpoint that was trained without one.

The token takes the first id after the tokenizer's last. Where the embedding already has rows beyond the tokenizer
(Qwen3: 151936 rows, 151669 tokens, so that the mask gets SDAR's own id) it takes an untrained one of them; otherwise
embedding and LM head grow by a multiple of 64 rows, which keeps matrix sizes even. New rows of the embedding start as
the mean of the trained ones: in the middle of where tokens live, so that the first steps neither explode nor vanish.
The mask is never predicted, so the head's new rows only have to be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ROWS_MULTIPLE = 64


def add_mask_token(tokenizer: Any, token: str, *, also: Sequence[str]) -> None:
    """Give the tokenizer a mask token called ``token`` unless it has one, under that or one of ``also``'s names."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.mask_token_id is None and (token in vocabulary or not any(name in vocabulary for name in also)):
        tokenizer.add_special_tokens({"mask_token": token})


@torch.no_grad()
def add_mask_embedding(model: Any, mask_id: int, trained: int) -> None:
    """Give the model a row for ``mask_id``; its first ``trained`` rows belong to known tokens."""
    old = model.config.vocab_size
    if mask_id >= old:
        # Without transformers' own start values: a covariance of the whole vocabulary, and random.
        model.resize_token_embeddings(mask_id + 1, pad_to_multiple_of=_ROWS_MULTIPLE, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mean = weight[: min(trained, old)].float().mean(0).to(weight.dtype)
        weight[old:] = mean
        weight[mask_id] = mean
