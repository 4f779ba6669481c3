"""Carrying out what a ledger plans: learning lambda, sealing pages, moving exact rows to where they are next."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv4 import _core
from kv4._core import PAGE_TOKENS as PAGE

from .launch import dequantise, seal
from .sequence import Energies, Holding, Page, Sequence


class Sealing(Holding):
    """The part of a Cache that moves tokens from the window into pages and out of sight. Rows of sequence b lie in
    rows[0][b] and rows[1][b], keys and values [kv_heads, sinks + room, head_dim]: the sinks, then the window."""

    def carry_out(self, sequences: list[Sequence], plans: list[_core.Plan], stored: list[Any] | None = None) -> None:
        """All plans, or none where something fails. stored: keys and values [batch, kv_heads, T, head_dim] of the new
        rows."""
        made = [self._seal(b, s, plan, s.energies) for b, (s, plan) in enumerate(zip(sequences, plans, strict=True))]
        self.rows = self._moved(sequences, plans, stored)
        for s, plan, (pages, lambda_) in zip(sequences, plans, made, strict=True):
            s.lambda_ = lambda_
            s.commit(plan, pages)

    def _seal(self, b: int, s: Sequence, plan: _core.Plan, energies: Energies) -> tuple[list[Page], Any]:
        """New pages and lambda; the sequence is as it was."""
        first_row = s.extent.window_position
        lambda_ = s.lambda_
        if plan.lambda_[1] > plan.lambda_[0]:
            lambda_ = self._learn(b, plan.lambda_[0] - first_row, plan.lambda_skip, energies)
        if not plan.new_pages:
            return [], lambda_
        pages = self.pool.take(plan.new_pages)
        given = self.given_k if self.recipe.key.lambda_ == "given" else lambda_
        seal(self, b, given, plan.sealed[0] - first_row, plan.skip, [page.place for page in pages])
        return pages, lambda_

    def _learn(self, b: int, first: int, skip: bytes, energies: Energies) -> Any:
        """Once per sequence, in float64 on the host, as src/moments does; waits for the device."""
        keys = self.rows[0][b, :, self.sink_limit + first : self.sink_limit + first + len(skip)]
        keys = self.host.numpy(keys).astype(np.float64)
        used = np.frombuffer(skip, np.uint8) == 0
        energy = np.zeros((self.heads, self.dim))
        for block in range(0, len(skip), PAGE):
            part = keys[:, block : block + PAGE][:, used[block : block + PAGE]]
            energy += ((part - part.mean(1, keepdims=True)) ** 2).sum(1) if part.shape[1] else 0.0
        query = np.zeros((self.heads, self.dim))
        for _, rows in energies.parts:
            query += self.host.numpy(rows).astype(np.float64).sum(0)
        values = np.stack([_core.lambda_from_energies(query[h], energy[h]) for h in range(self.heads)])
        return self.host.table(values)

    def _room(self, rows: int) -> int:
        """Window rows to have room for, where `rows` are held: more while decoding grows, no more than it needs."""
        have = self.rows[0].shape[2] - self.sink_limit if self.rows else 0
        most = self.recipe.window + PAGE + self.sink_limit if self.recipe.seal == "page" else 0
        if not most and self.window:
            most = self.window + PAGE
        if rows > have:
            grown = rows + max(2, rows // (16 if self.recipe.seal == "page" else 8))
            return max(rows, min(grown, most) if most else grown)
        # After a long prefill the rows are far more than decoding needs.
        return most if most and rows <= most < have else have

    def _moved(
        self, sequences: list[Sequence], plans: list[_core.Plan], stored: list[Any] | None = None, anew: bool = False
    ) -> list[Any]:
        """Rows as the plans have them: those that stay, pages opened again, new ones. Written in place where there is
        room, unless `anew`, once all that is put there has been made."""
        befores, afters = [s.extent for s in sequences], [plan.after for plan in plans]
        room = self._room(max((x.window_rows for x in afters), default=0))
        anew = anew or not self.rows or room != self.rows[0].shape[2] - self.sink_limit
        puts: list[tuple[int, int, int, list[Any]]] = []  # sequence, first row, rows, keys and values
        for b, (s, plan, before, after) in enumerate(zip(sequences, plans, befores, afters, strict=True)):
            window = (max(before.window_position, after.window_position), min(before.length, after.length))
            moves = [(self._row(window[0], before), self._row(window[0], after), window)]
            if plan.sinks[1] > plan.sinks[0]:
                moves.append((self._row(plan.sinks[0], before), 0, plan.sinks))
            elif after.sinks:
                moves.append((0, 0, (0, after.sinks)))
            if plan.unsunk[1] > plan.unsunk[0]:
                moves.append((0, self._row(plan.unsunk[0], after), plan.unsunk))
            for old, new, (begin, end) in moves:
                if end > begin and (anew or old != new):
                    part = [self.host.copy(x[b, :, old : old + end - begin]) for x in self.rows]
                    puts.append((b, new, end - begin, part))
            if plan.reopened_page >= 0:
                n = plan.reopened[1] - plan.reopened[0]
                page = s.ledger.pages[plan.reopened_page - before.first_page]
                part = [self.host.cast(self.dequantised(s, [page], v)[:, :n], self.dtype) for v in (False, True)]
                puts.append((b, self._row(plan.reopened[0], after), n, part))
        rows = self.rows
        if anew:
            shape = (len(sequences), self.heads, self.sink_limit + room, self.dim)
            rows = [self.host.zeros(shape, self.dtype) for _ in range(2)]
        for b, first, n, part in puts:
            for x, y in zip(rows, part, strict=True):
                x[b, :, first : first + n] = y
        if stored is None or not stored[0].shape[2]:
            return rows
        tokens = stored[0].shape[2]
        firsts = [self._row(plan.stored[0], after) for plan, after in zip(plans, afters, strict=True)]
        for x, y in zip(rows, stored, strict=True):
            if len(set(firsts)) == 1:
                x[:, :, firsts[0] : firsts[0] + tokens] = y
                continue
            for b, first in enumerate(firsts):
                x[b, :, first : first + tokens] = y[b]
        return rows

    def _row(self, position: int, extent: _core.Extent) -> int:
        """Where the window's row of a position lies."""
        return self.sink_limit + position - extent.window_position

    def dequantised(self, s: Sequence, pages: list[int], values: bool) -> Any:
        return dequantise(self, self.given_v if values else self.lambda_k(s), pages, values)
