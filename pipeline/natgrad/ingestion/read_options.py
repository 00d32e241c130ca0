"""Options for reading a log (--map, --shift, --pattern, or a run file), which are stored with the trajectory.

They must not change between ingests: a quantity that is read under another key, or assigned to another step, has
different values at steps that are already stored, as if the training had been restarted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from natgrad.schema.errors import InputError
from natgrad.schema.names import FROM_OPTIMIZER, LOGGED, REPLAYED
from natgrad.sources.names import SCALAR_LOG_QUANTITIES
from natgrad.sources.recovered import LARGEST_SPAN
from natgrad.sources.run_file import run_file_options
from natgrad.storage import Storage
from natgrad.store import Trajectory, exists

__all__ = ["ReadOptions"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading the log of a run.

    Attributes
    ----------
    mapping : mapping
        Key in the log of each quantity (``--map``).
    shift : mapping
        Number of steps by which each quantity is logged too early (``--shift``).
    pattern : str
        Names of the steps (``--pattern``); empty for the usual names.
    exact_names : bool
        Whether tensors with names that differ by a known rule are not matched (``--exact-names``).
    gradient : str, optional
        Where gradients come from, one of `natgrad.schema.names.GRADIENTS` (``--gradient``). Default: the log.
    largest_span : int
        Maximum number of updates between two states from which a gradient is recovered (``--largest-span``).
    several : bool
        Whether there are several sources.
    sources : mapping, optional
        For a run file, the maps and shifts of each listed log, by path.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    shift: Mapping[str, int] = field(default_factory=dict)
    pattern: str = ""
    exact_names: bool = False
    gradient: str | None = None
    largest_span: int = LARGEST_SPAN
    several: bool = False
    sources: Mapping[str, Any] | None = None

    @classmethod
    def requested(
        cls,
        sources: Sequence[Storage],
        mapping: Mapping[str, str] | None,
        shift: Mapping[str, int] | None,
        pattern: str | None = None,
        exact_names: bool = False,
        gradient: str | None = None,
        largest_span: int | None = None,
    ) -> Self:
        """Return the options requested by a user.

        Raises
        ------
        InputError
            If a run file cannot be read, or if there is a largest span, but gradients are not recovered.
        """
        if largest_span is not None and gradient != FROM_OPTIMIZER:
            raise InputError(
                "--largest-span applies only to gradients that are recovered from optimizer states",
                remedy="add --gradient from-optimizer, or omit --largest-span",
            )
        listed = run_file_options(sources[0]) if len(sources) == 1 else None
        return cls(
            mapping=mapping or {},
            shift=shift or {},
            pattern=pattern or "",
            exact_names=exact_names,
            gradient=gradient,
            largest_span=LARGEST_SPAN if largest_span is None else largest_span,
            several=len(sources) > 1,
            sources=listed,
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the options stored with a trajectory."""
        return cls(
            mapping=stored.get("map", {}),
            shift=stored.get("shift", {}),
            pattern=stored.get("pattern", ""),
            exact_names=stored.get("exact_names", False),
            gradient=stored.get("gradient"),
            largest_span=stored.get("largest_span", LARGEST_SPAN),
            several=stored.get("several", False),
            sources=stored.get("sources"),
        )

    @property
    def recover(self) -> int | None:
        """Maximum number of updates between two states from which a gradient is recovered; None if none is."""
        return self.largest_span if self.gradient == FROM_OPTIMIZER else None

    @property
    def is_replayed(self) -> bool:
        """True if gradients come from the evaluations of an objective."""
        return self.gradient == REPLAYED

    @property
    def _origin(self) -> str:
        """Origin of the gradients, as options of the command."""
        span = "" if self.recover is None else f" --largest-span {self.recover}"
        return f"--gradient {self.gradient or LOGGED}{span}"

    def to_json(self) -> dict[str, Any]:
        """Return the options in the form that a trajectory stores."""
        exact: dict[str, Any] = {"exact_names": True} if self.exact_names else {}
        if self.recover is not None:
            exact |= {"gradient": self.gradient, "largest_span": self.largest_span}
        elif self.is_replayed:
            exact |= {"gradient": self.gradient}
        if self.sources is not None:
            return {"sources": dict(self.sources), **exact}
        named = {"pattern": self.pattern} if self.pattern else {}
        return {"map": dict(self.mapping), "shift": dict(self.shift), **named, **exact, "several": self.several}

    def for_resuming(self, store: Storage) -> ReadOptions:
        """Return the options for resuming a trajectory; they are fixed when the trajectory is created.

        Parameters
        ----------
        store : Storage
            The trajectory. If it does not exist yet, these options are returned.

        Raises
        ------
        InputError
            If these options differ from those of the trajectory, or if the options of the trajectory are ambiguous
            because there are several sources now.
        """
        trajectory = Trajectory(store) if exists(store) else None
        if trajectory is None or not trajectory.n_states or trajectory.read_options is None:
            return self
        original = self.from_json(trajectory.read_options)
        if self.exact_names and not original.exact_names:
            raise _changed_options(store, "it was created without --exact-names")
        if self.gradient is not None and self._origin != original._origin:
            raise _changed_options(
                store, f"it was created with {original._origin}, but {self._origin} is passed now"
            )
        fixed: dict[str, Any] = {
            name: getattr(original, name) for name in ("exact_names", "gradient", "largest_span")
        }
        if self.sources is not None or original.sources is not None:
            # A single source is not compared with a run file, because it may be the folder of a restarted run.
            before = original.sources or {}
            for path, options in (self.sources or {}).items():
                if before.get(path, options) != options:
                    difference = f"the run file had {before[path]} for {path!r}, and now it has {options}"
                    raise _changed_options(store, difference)
            return replace(self, **fixed)
        # With a log of scalars, the keys of scalars apply to it. Without one, they apply to the log with tensors.
        other_log = frozenset(SCALAR_LOG_QUANTITIES) if self.several != original.several else frozenset()
        _require_unchanged(store, "--map", original.mapping, self.mapping, None, other_log)
        _require_unchanged(store, "--shift", original.shift, self.shift, 0, frozenset())
        if self.pattern and self.pattern != original.pattern:
            created = f"with --pattern {original.pattern!r}" if original.pattern else "without --pattern"
            raise _changed_options(store, f"it was created {created}, but --pattern {self.pattern!r} is passed now")
        kept = {quantity: key for quantity, key in original.mapping.items() if quantity not in other_log}
        ambiguous = sorted(set(original.mapping) - set(kept) - set(self.mapping)) if self.several else []
        if ambiguous:
            mapped = f"{ambiguous[0]}={original.mapping[ambiguous[0]]}"
            raise InputError(
                f"the trajectory was created from one SOURCE with --map {mapped}, but there are several now",
                where=str(store),
                remedy="list the sources in a run file that maps the keys of each (map)",
            )
        return ReadOptions(
            mapping={**kept, **self.mapping},
            shift={**original.shift, **self.shift},
            pattern=original.pattern,
            several=self.several,
            **fixed,
        )


def _require_unchanged(
    store: Storage,
    option: str,
    original: Mapping[str, Any],
    requested: Mapping[str, Any],
    default: Any,
    ignored: frozenset[str],
) -> None:
    for quantity, value in requested.items():
        before = original.get(quantity, default)
        if before != value and quantity not in ignored:
            created = f"with {option} {quantity}={before}" if before else f"without {option} for {quantity}"
            difference = f"it was created {created}, but {option} {quantity}={value} is passed now"
            raise _changed_options(store, difference)


def _changed_options(store: Storage, difference: str) -> InputError:
    return InputError(
        f"the read options of a trajectory cannot change: {difference}",
        where=str(store),
        why="the same steps would have different values, as if the training had been restarted",
        remedy="omit the option to keep the original setting of OUT, or start from scratch with --overwrite",
    )
