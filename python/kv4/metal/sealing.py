"""Executes the ledgers' plans: learns lambda, seals pages, moves exact rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv4 import _core
from kv4._core import PAGE_TOKENS as PAGE

from .launch import Job, dequantise, seal
from .sequence import Energies, Holding, Made, Sequence, Span


class Sealing(Holding):
    """The part of a Cache that moves tokens from the window into pages and out of sight. Exact rows of sequence b lie
    in rows[0][b] and rows[1][b], keys and values [kv_heads, sinks + room, head_dim]: the sinks, then the window."""

    def lambda_table(self, lambdas: list[Any]) -> tuple[Any, list[int]]:
        """[rows, kv_heads, head_dim] of those of the keys that there are, or None, and the row of each, -1 for none."""
        if self.recipe.key.lambda_ == "given":
            return self.given_k, [0] * len(lambdas)
        held = [x for x in lambdas if x is not None]
        rows = np.cumsum([x is not None for x in lambdas]) - 1
        stacked = self.host.concatenate([x.reshape(1, *x.shape) for x in held], 0) if held else None
        return stacked, [-1 if x is None else int(row) for x, row in zip(lambdas, rows, strict=True)]

    def carry_out(
        self,
        sequences: list[Sequence],
        plans: list[_core.Plan],
        stored: list[Any] | None = None,
        spans: list[Span] | None = None,
    ) -> None:
        """Executes all plans, or none if something fails. stored: keys and values [batch, kv_heads, T, head_dim] whose
        rows `spans` are each sequence's new ones."""
        made = self._made(sequences, plans, [s.energies for s in sequences], stored, spans)
        self.rows = self._moved(sequences, plans, stored, spans)
        for s, plan, new in zip(sequences, plans, made, strict=True):
            s.commit(plan, new)

    def _made(
        self,
        sequences: list[Sequence],
        plans: list[_core.Plan | None],
        energies: list[Energies],
        stored: list[Any] | None = None,
        spans: list[Span] | None = None,
    ) -> list[Made]:
        """Lambda and sealed pages; sequences, and what they read of pages, are as they were. No plan: nothing to do."""
        arrival = self.recipe.seal == "arrival"
        all_made, parts, skip = [], [], b""
        for b, (s, plan, queries) in enumerate(zip(sequences, plans, energies, strict=True)):
            made = Made(lambda_=s.lambda_)
            all_made.append(made)
            if plan is None:
                continue
            x = s.extent
            if plan.lambda_[1] > plan.lambda_[0]:
                made.lambda_ = self._learn(b, plan.lambda_[0] - x.window_position, plan.lambda_skip, queries)
            begin, end = plan.sealed
            if end <= begin:
                continue
            made.pages = self.pool.take(plan.new_pages, clear=arrival)
            places = [page.place for page in made.pages]
            if plan.first_sealed < s.page_end:  # some go behind what the last page holds
                places.insert(0, s.ledger.pages[-1])
                if plan.first_sealed < s.alone:
                    (made.filled,) = self.pool.copies(self.pool, places[:1])
                    places[0] = made.filled.place
            # Where the first row is: in the window, or in the call's arrays.
            row = spans[b][0] if arrival and spans else self._row(begin, x)
            page = plan.after.start + self.sink_limit + plan.first_sealed * PAGE  # position of its first token
            for i, place in enumerate(places):
                first = max(begin - page, 0) if i == 0 else 0
                at = page + i * PAGE + first - begin
                count = min(PAGE - first, end - begin - at)
                parts.append((made, (place, first, count, -1 if arrival else len(skip) + at, b, row + at)))
            skip += b"" if arrival else plan.skip
        if parts:
            table, rows = self.lambda_table([made.lambda_ for made, _ in parts])
            jobs: list[Job] = [(*part, row) for (_, part), row in zip(parts, rows, strict=True)]
            seal(self, stored if arrival and stored else self.rows, jobs, skip, table)
        return all_made

    def _learn(self, b: int, first: int, skip: bytes, energies: Energies) -> Any:
        """Once per sequence, on the CPU; waits for the device."""
        keys = self.rows[0][b, :, self.sink_limit + first : self.sink_limit + first + len(skip)]
        keys = np.ascontiguousarray(self.host.numpy(keys), np.float32)
        queries = [row for _, rows in energies.parts for row in np.ascontiguousarray(self.host.numpy(rows))]
        return self.host.table(_core.learn_lambda(keys, skip, queries))

    def room(self, rows: int) -> int:
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
        self,
        sequences: list[Sequence],
        plans: list[_core.Plan | None],
        stored: list[Any] | None = None,
        spans: list[Span] | None = None,
        anew: bool = False,
    ) -> list[Any]:
        """Rows as the plans have them: those that stay, pages opened again, new ones. Written in place where there is
        room, unless `anew`, once all that is put there has been made. No plan: a sequence's rows stay."""
        befores = [s.extent for s in sequences]
        afters = [x if plan is None else plan.after for x, plan in zip(befores, plans, strict=True)]
        room = self.room(max((x.window_rows for x in afters), default=0))
        anew = anew or not self.rows or room != self.rows[0].shape[2] - self.sink_limit
        puts: list[tuple[int, int, int, list[Any]]] = []  # sequence, first row, rows, keys and values
        for b, (s, plan, before, after) in enumerate(zip(sequences, plans, befores, afters, strict=True)):
            window = (max(before.window_position, after.window_position), min(before.length, after.length))
            moves = [(self._row(window[0], before), self._row(window[0], after), window)]
            if plan is not None and plan.sinks[1] > plan.sinks[0]:
                moves.append((self._row(plan.sinks[0], before), 0, plan.sinks))
            elif after.sinks:
                moves.append((0, 0, (0, after.sinks)))
            if plan is not None and plan.unsunk[1] > plan.unsunk[0]:
                moves.append((0, self._row(plan.unsunk[0], after), plan.unsunk))
            for old, new, (begin, end) in moves:
                if end > begin and (anew or old != new):
                    part = [self.host.copy(x[b, :, old : old + end - begin]) for x in self.rows]
                    puts.append((b, new, end - begin, part))
            if plan is not None and plan.reopened_page >= 0:
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
        if stored is None or spans is None or self.recipe.seal == "arrival":
            return rows
        places = [self._row(plan.stored[0], after) for plan, after in zip(plans, afters, strict=True)]
        for x, y in zip(rows, stored, strict=True):
            if len(set(places)) == 1 and set(spans) == {(0, y.shape[2])}:
                x[:, :, places[0] : places[0] + y.shape[2]] = y
                continue
            for b, (first, (lo, hi)) in enumerate(zip(places, spans, strict=True)):
                x[b, :, first : first + hi - lo] = y[b, :, lo:hi]
        return rows

    def _row(self, position: int, extent: _core.Extent) -> int:
        """Where the window's row of a position lies."""
        return self.sink_limit + position - extent.window_position

    def dequantised(self, s: Sequence, pages: list[int], values: bool) -> Any:
        return dequantise(self, self.given_v if values else self.lambda_k(s), pages, values)
