"""Copy the inner products of updates from a log of ledgers into the ledger of a run without states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad.ingestion.transfer import NewState, Progress, Writer
from natgrad.schema.layout import MEBIBYTE
from natgrad.schema.names import SKIPPED, STATES
from natgrad.sources.base import Recorded, StepReader
from natgrad.sources.steps import where
from natgrad.store.recorded import append_updates, products_checksum, require_ledger

__all__ = ["ProductsWriter", "has_products"]

_COMMIT_BYTES = 32 * MEBIBYTE
"""Approximate bytes of inner products per commit, of which memory has several copies."""

_GRADIENT = STATES[1]


def products_of(reader: StepReader, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ledger of the update from a step of a log of ledgers; see `natgrad.sources.base.Recorded`."""
    assert isinstance(reader, Recorded)
    return reader.products(tensors)


def has_products(reader: StepReader, tensors: Sequence[str], checksum: int) -> bool:
    """Return True if the inner products of the update from a step have a checksum."""
    return products_checksum(*products_of(reader, tensors)) == checksum


class ProductsWriter(Writer):
    """Copy the updates of a log of ledgers, and commit them."""

    def write(self, new: Sequence[NewState], progress: Progress | None) -> None:
        """Copy new updates, some at a time. The next commit repeats the last step, which is provisional."""
        row = 8 * len(self._trajectory.layout.names) * (len(self._trajectory.recorded) ** 2 + 1)
        per_commit = max(1, min(self._limits.commit_bytes, _COMMIT_BYTES) // max(row, 1))
        lacking = self._lacking(new)
        done = 0
        while done < len(new):
            stop = min(done + per_commit, len(new))
            if stop < len(new):
                self._append(new[done : stop + 1], [*lacking[done:stop], (_GRADIENT,)])
                self._count(new[done:stop], lacking[done:stop])
            else:
                self._append(new[done:], lacking[done:])
                self._count(new[done:], lacking[done:])
            done = stop
            if progress is not None:
                progress(done, len(new))
        self._summarize(len(new))
        skipped = [state.step for state in new if self._is_skipped(state)]
        if skipped:
            self._warnings.append(
                f"the optimizer skipped {len(skipped)} updates, because a gradient was not finite; the first is "
                f"that of step {skipped[0].number}"
            )

    def _lacking(self, new: Sequence[NewState]) -> list[tuple[str, ...]]:
        """Return what each state lacks. The gradient of a state is known with the next state."""
        found = super()._lacking(new)
        for index, lacks in enumerate(found):
            is_end = index + 1 == len(new) or not new[index + 1].follows(new[index])
            if is_end and _GRADIENT not in lacks:
                found[index] = (_GRADIENT, *lacks)
        return found

    def _append(self, new: Sequence[NewState], lacking: Sequence[Sequence[str]]) -> None:
        trajectory = self._trajectory
        tensors, vectors = len(trajectory.layout.names), len(trajectory.recorded)
        gram = np.full((len(new) - 1, tensors, vectors, vectors), np.nan)
        ratio = np.full((len(new) - 1, tensors), np.nan)
        for index, state in enumerate(new[:-1]):
            gram[index], ratio[index] = self._products(state)
        append_updates(
            trajectory,
            steps=[state.step.number for state in new],
            gram=gram,
            ratio=ratio,
            scalars=self._numbers(new),
            sources=[self._source(state) for state in new],
            lacking=lacking,
            attempts=[state.attempt for state in new],
            runs=[state.step.run for state in new] if trajectory.sweep else (),
        )

    def _products(self, state: NewState) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        trajectory = self._trajectory
        if state.repeats is not None:
            ledger, update = require_ledger(trajectory), np.array([state.repeats])
            if state.repeats < ledger.n_updates:
                return ledger.read_updates(update)[0], ledger.read_ratios(update)[0]
            return np.asarray(np.nan), np.asarray(np.nan)
        with self._log.open(state.step) as reader:
            gram, ratio = products_of(reader, trajectory.layout.names)
        if np.isinf(gram).any() and not self._is_skipped(state):
            self._not_finite.append(where(state.step))
        return gram, ratio

    def _is_skipped(self, state: NewState) -> bool:
        return state.repeats is None and self._contents[state.step].scalars.get(SKIPPED) == 1.0
