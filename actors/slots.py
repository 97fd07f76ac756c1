"""Which sequence each slot decodes and how far it is: the engine's bookkeeping, on the host.

The host knows everything but the tokens: positions, steps and masks are NumPy arrays of one row a slot, so that a
pass is planned without asking the device, and all slots move on in a few vectorised operations. Tokens, their
log-probs and steps stay on the device until a sequence ends.

Active sequences fill slots 0 … n-1. One that ends gives its slot to the last active one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.denoise import to_device
from tstar_ray.blocks import decode_limit
from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Request, Trajectory

_FIELDS = np.dtype(
    [
        ("ticket", "i8"),  # which piece of work
        ("rule", "i8"),  # index of its decoding settings
        ("block_size", "i8"),
        ("seed", "i8"),
        ("prefix", "i8"),  # hash of prompt and block size: equal where keys and values can be shared
        ("prompt", "i8"),  # prompt tokens
        ("limit", "i8"),  # where decoding must end
        ("block", "i8"),  # first position of the current block
        ("committed", "i8"),  # positions whose keys and values are final
        ("source", "i8"),  # slot to copy the prompt's keys and values from in the next pass, or -1
        ("step", "i8"),  # denoising steps taken
        ("block_step", "i8"),  # of them in the current block
        ("stopped", "?"),  # the current block holds a stop token
        ("stale", "?"),  # keys and values of older weights are in use
    ]
)


@dataclass(frozen=True)
class Work:
    """One request with the settings it is decoded under."""

    ticket: int
    """Unique in the engine."""
    request: Request
    """What was asked."""
    decoding: Decoding
    """How."""
    rule: int
    """Index of its settings in the engine's list."""

    @property
    def shared(self) -> tuple[tuple[int, ...], int]:
        """Prompt and block size: keys and values of two sequences agree up to `clean` where these are equal."""
        return self.request.prompt_ids, self.decoding.block_size

    @property
    def prefix(self) -> int:
        """Hash of `shared`."""
        return hash(self.shared)

    @cached_property
    def limit(self) -> int:
        """Positions it may fill. Raises ValueError where that is not one block after the prompt."""
        cap = self.request.max_new_tokens or self.decoding.max_new_tokens
        return decode_limit(
            len(self.request.prompt_ids), min(cap, self.decoding.max_new_tokens), self.decoding.block_size
        )

    @property
    def clean(self) -> int:
        """Prompt positions in whole blocks, which are read once and never denoised."""
        return len(self.request.prompt_ids) // self.decoding.block_size * self.decoding.block_size


class Slots:
    """S slots of T positions, n of them active."""

    def __init__(self, *, mask_id: int, device: torch.device) -> None:
        self._mask_id, self._device = mask_id, device
        self.active = 0
        self.work: dict[int, Work] = {}
        """Active work by ticket."""
        self.fields = np.zeros(0, dtype=_FIELDS)
        """[S], see the source for its columns."""
        self.masked = np.zeros((0, 0), dtype=bool)
        """[S, widest block] positions of the current block still to be revealed."""
        self.versions = np.zeros((0, 0), dtype=np.int64)
        """[S, blocks] oldest weights that revealed a token of each decoded block."""
        self.ids = torch.zeros((0, 0), dtype=torch.long, device=device)
        """[S, T]."""
        self.steps = torch.zeros((0, 0), dtype=torch.int32, device=device)
        """[S, T] step that revealed each token."""
        self.logprobs = torch.zeros((0, 0), device=device)
        """[S, T] recorded log-probs."""

    @property
    def shape(self) -> tuple[int, int]:
        """S and T."""
        return self.ids.shape[0], self.ids.shape[1]

    def column(self, name: str) -> NDArray[Any]:
        """[n] view of one field of the active slots."""
        return self.fields[name][: self.active]

    def resize(self, slots: int, length: int) -> None:
        """Make room for ``slots`` x ``length``; active slots keep what they hold. A failure changes nothing."""
        n = self.active
        shared = min(length, self.shape[1])
        tensors = []
        for old in (self.ids, self.steps, self.logprobs):
            new = torch.zeros((slots, length), dtype=old.dtype, device=self._device)
            new[:n, :shared] = old[:n, :shared]
            tensors.append(new)
        self.ids, self.steps, self.logprobs = tensors
        fields = np.zeros(slots, dtype=_FIELDS)
        fields[:n] = self.fields[:n]
        self.fields = fields
        masked = np.zeros((slots, self.masked.shape[1]), dtype=bool)
        masked[:n] = self.masked[:n]
        versions = np.zeros((slots, length), dtype=np.int64)
        versions[:n, :shared] = self.versions[:n, :shared]
        self.masked, self.versions = masked, versions

    def admit(self, work: list[Work]) -> None:
        """Fill the next slots. The first of each new prompt reads it and takes one of the last of them; the others
        copy its keys and values in the same pass."""
        sources: dict[tuple[tuple[int, ...], int], int] = {}
        readers: list[Work] = []
        followers: list[tuple[Work, int | None]] = []
        for item in work:
            owner = self._sharing(item)
            if item.clean and owner is None and item.shared not in sources:
                sources[item.shared] = len(readers)
                readers.append(item)
            else:
                followers.append((item, owner))
        first, reading = self.active, self.active + len(followers)
        ordered: list[tuple[Work, int]] = []
        for item, owner in followers:
            if owner is None and item.clean:
                owner = reading + sources[item.shared]
            ordered.append((item, -1 if owner is None else owner))
        ordered += [(item, -1) for item in readers]
        widest = max(item.decoding.block_size for item in work)
        self.masked = np.pad(self.masked, ((0, 0), (0, max(0, widest - self.masked.shape[1]))))
        ids = np.full((len(ordered), self.shape[1]), self._mask_id, dtype=np.int64)
        for row, (item, source) in enumerate(ordered):
            slot, prompt, b = first + row, len(item.request.prompt_ids), item.decoding.block_size
            ids[row, :prompt] = item.request.prompt_ids
            field = self.fields[slot]
            field["ticket"], field["rule"], field["prefix"] = item.ticket, item.rule, item.prefix
            field["block_size"], field["seed"] = b, item.request.seed
            field["prompt"], field["limit"] = prompt, item.limit
            field["block"], field["committed"] = item.clean, item.clean if source >= 0 else 0
            field["source"] = source
            field["step"] = field["block_step"] = 0
            field["stopped"] = False
            field["stale"] = 0 <= source < first and self.fields["stale"][source]
            self.masked[slot] = False
            self.masked[slot, prompt - item.clean : b] = True
            self.work[item.ticket] = item
        self.active += len(ordered)
        self.ids[first : self.active] = to_device(ids, self._device)

    def _sharing(self, item: Work) -> int | None:
        """An active slot with the same prompt and block size."""
        for slot in np.flatnonzero(self.column("prefix") == item.prefix)[:1].tolist():
            if self.work[int(self.fields["ticket"][slot])].shared == item.shared:
                return slot
        return None

    def reveal(self, row: NDArray[np.int64], offset: NDArray[np.int64], stop: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """One step was taken: masked positions (row, offset) now hold tokens, where ``stop`` a stop token.

        Moves every sequence whose block is finished to its next block; returns [n] which sequences ended.
        """
        n = self.active
        self.masked[row, offset] = False
        self.fields["stopped"][row[stop]] = True
        block, block_size = self.column("block"), self.column("block_size")
        done = ~self.masked[:n].any(axis=1)
        ended = done & (self.column("stopped") | (block + block_size >= self.column("limit")))
        onward = np.flatnonzero(done & ~ended)
        block[onward] += block_size[onward]
        self.masked[onward] = np.arange(self.masked.shape[1]) < block_size[onward, None]
        self.column("block_step")[:] += 1
        self.column("block_step")[onward] = 0
        return ended

    def trajectories(self, ended: NDArray[np.bool_]) -> list[tuple[int, Trajectory]]:
        """Tickets and trajectories of the slots [n] that ended."""
        slots = np.flatnonzero(ended)
        at = to_device(slots, self._device)
        # One wait for the device: log-probs travel as the bits of integers.
        ids, steps, bits = torch.stack([self.ids[at].int(), self.steps[at], self.logprobs[at].view(torch.int32)]).cpu()
        ids, steps, logprobs = ids.numpy(), steps.numpy(), bits.view(torch.float32).numpy()
        found = []
        for row, slot in enumerate(slots.tolist()):
            field = self.fields[slot]
            work = self.work[int(field["ticket"])]
            b, prompt, end = int(field["block_size"]), int(field["prompt"]), int(field["block"] + field["block_size"])
            stops = np.flatnonzero(np.isin(ids[row, prompt:end], work.decoding.stop_ids))
            trajectory = Trajectory(
                group_id=work.request.group_id,
                sample=work.request.sample,
                token_ids=ids[row, :end].copy(),
                prompt_len=prompt,
                completion_len=int(stops[0]) + 1 if len(stops) else end - prompt,
                step_map=steps[row, prompt:end].copy(),
                logprobs=logprobs[row, prompt:end].copy(),
                block_size=b,
                temperature=work.decoding.temperature,
                weight_versions=self.versions[slot, : end // b - prompt // b].copy(),
                stale_cache=bool(field["stale"]),
                stop_reason="stop" if len(stops) else "length",
            )
            found.append((work.ticket, trajectory))
        return found

    def close(self, ended: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
        """Free slots [n]; returns which slots' contents moved, and where to, for the cache to follow: [k] each."""
        for slot in np.flatnonzero(ended).tolist():
            del self.work[int(self.fields["ticket"][slot])]
        keep = np.flatnonzero(~ended)
        self.active = len(keep)
        holes, movers = np.flatnonzero(ended[: self.active]), keep[keep >= self.active]
        for array in (self.fields, self.masked, self.versions):
            array[holes] = array[movers]
        source, target = to_device(np.stack([movers, holes]), self._device)
        if len(source):
            for tensor in (self.ids, self.steps, self.logprobs):
                tensor[target] = tensor[source]
        return source, target
