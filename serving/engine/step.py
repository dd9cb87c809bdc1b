"""One step of the engine while it is planned: which rows run, and the tokens that are left for more."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.sequence import Sequence


@dataclass(slots=True)
class Step:
    """What one step runs, and the tokens that are left for more: fewer than none after a whole row."""

    budget: int
    whole_rows: bool
    rows: dict[Sequence, int] = field(default_factory=dict)

    def run(self, seq: Sequence) -> None:
        """Compute as much of a request as the budget allows, or all of it."""
        if not seq.together:
            self._take(seq, seq.num_pending if self.whole_rows else min(seq.num_pending, self.budget))
        elif behind := [row for row in seq.together if row.num_pending > 1]:
            for row in behind[:1] if behind[0].leads else behind:  # the others begin with a copy of the first
                if self.budget > 0:
                    self._take(row, min(row.num_pending - 1, self.budget))
        elif self.budget >= len(seq.together):
            for row in seq.together:
                self._take(row, 1)

    def _take(self, row: Sequence, num_tokens: int) -> None:
        self.rows[row] = num_tokens
        self.budget -= num_tokens + _num_to_encode(row)

    def drop(self, seq: Sequence) -> None:
        """Leave a request out after all."""
        for row in seq.rows:
            if row in self.rows:
                self.budget += self.rows.pop(row) + _num_to_encode(row)


def _num_to_encode(row: Sequence) -> int:
    """Tokens that the encoder reads for a row: those of a search have one prompt."""
    return row.num_to_encode if row.leads else 0
