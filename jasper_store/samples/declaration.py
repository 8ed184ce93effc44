"""What a sample reads, as its author declares it: fields, splits, and the choice between tensors.

A declaration is plain data and knows no file; :mod:`jasper_store.samples.graph` checks it against tensors. Beside the
data it stands in ``config.json``, as ``{"samples": {"fields": {...}, "splits": {...}}}``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from jasper_store.errors import DeclarationError
from jasper_store.formats.registry import base_name
from jasper_store.formats.texts import text_parts
from jasper_store.samples.expression import POSITION, ROW, Lookup, Rows, closest, lookups, parse_field, parse_rows

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec

__all__ = ["CONFIG_KEY", "Choice", "Declaration", "Field", "FieldLike", "Probabilities", "Variant", "everything"]

CONFIG_KEY: Final = "samples"
"""Key of ``config.json`` that a declaration stands under."""

Probabilities: TypeAlias = "Sequence[float] | Callable[[int], Sequence[float]]"
"""Probability of each variant of a choice, or a function of the epoch that returns them."""

_EVEN: Final = 1e-6
_DEEPEST: Final = 64


@dataclass(frozen=True, slots=True)
class Field:
    """A field that is looked up.

    Attributes:
        lookup: where its values stand.
        dtype: what they are served as; ``None`` as they are stored. Integers may be served as int64.
    """

    lookup: Lookup
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str, name: str, dtype: torch.dtype | None = None) -> Field:
        """Parse an expression; errors as :func:`~jasper_store.samples.expression.parse_field`."""
        return cls(parse_field(text, name), dtype)


class Unwritten:
    """Stands for probabilities that are a function of the epoch, which ``config.json`` cannot hold."""

    def __call__(self, epoch: int) -> Sequence[float]:
        """Refuse to draw.

        Raises:
            DeclarationError: always; it says what to open the dataset with.
        """
        raise DeclarationError(
            f"expected probabilities of a choice in epoch {epoch}, found that they are a function of the epoch, which"
            " config.json cannot hold: open the dataset with fields= and that function, or as what it was packed from"
            " (JASPERSteeringDataset)"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A field that takes each row from one of several tensors, or is zeros, by a variant drawn for the row.

    The draw is a pure function of (seed, epoch, row): see :mod:`jasper_store.samples.draw`.

    Attributes:
        tensors: names of tensors of one shape and dtype; variant k is the k-th of them, from 1, and variant 0 is zeros.
        rows: what names the rows: ``"row"``, the name of a field, or an expression.
        probabilities: of the variants from 0 on, one more than there are tensors; or a function of the epoch.
        typical: probabilities to plan memory by, where they are a function; by default those of epoch 0.
        key: name of a tensor that holds, for each row of ``tensors``, the number that it is drawn by; by default the row's
            own number.

    Raises:
        DeclarationError: no tensors, or probabilities that do not fit.
    """

    tensors: tuple[str, ...]
    probabilities: Probabilities
    rows: str = ROW
    typical: Sequence[float] | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        given: Any = self.tensors
        if isinstance(given, str) or not all(isinstance(name, str) for name in given):
            raise DeclarationError(f"a choice needs a list of names of tensors, found {given!r:.80}")
        object.__setattr__(self, "tensors", tuple(self.tensors))
        if not self.tensors:
            raise DeclarationError("a choice needs at least one tensor to choose from, found none")
        if not isinstance(self.rows, str):
            raise DeclarationError(f"the rows of a choice are named by a text such as 'row', found {self.rows!r:.80}")
        if self.key is not None and not isinstance(self.key, str):
            raise DeclarationError(f"the key of a choice is the name of a tensor, found {self.key!r:.80}")
        if not isinstance(self.probabilities, Unwritten):
            self.at(0)
        if self.typical is not None:
            self._checked(self.typical, "planned for")

    def at(self, epoch: int) -> tuple[float, ...]:
        """Probabilities of the variants in an epoch.

        Raises:
            DeclarationError: there are too many or too few, or they do not add up to 1.
        """
        found = self.probabilities(epoch) if callable(self.probabilities) else self.probabilities
        return self._checked(found, f"in epoch {epoch}")

    def _checked(self, found: Sequence[float], when: str) -> tuple[float, ...]:
        wanted = len(self.tensors) + 1
        try:
            values = tuple(float(value) for value in found)
        except (TypeError, ValueError, OverflowError):
            values = ()
        # NaN is in no range, so the test is for valid values and not for invalid ones.
        if not (len(values) == wanted and all(value >= 0 for value in values) and abs(sum(values) - 1) <= _EVEN):
            raise DeclarationError(
                f"a choice among {wanted - 1} tensors needs {wanted} probabilities that add up to 1 (the first is that of"
                f" zeros), found {found!r:.120} {when}"
            )
        return values

    @property
    def planned(self) -> tuple[float, ...]:
        """Probabilities to plan memory by."""
        return self.at(0) if self.typical is None else tuple(self.typical)


@dataclass(frozen=True, slots=True)
class Variant:
    """A field that serves the number of the variant that a choice has drawn, int64 [B].

    Attributes:
        of: name of the choice's field.
    """

    of: str


FieldLike: TypeAlias = "str | Field | Choice | Variant"
"""What a user may declare a field by; a text is an expression."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What the samples of a dataset read.

    Attributes:
        fields: by name, in the order in which a batch has them. Names that begin with an underscore are not served.
        splits: name of a split to the tensor that lists its rows; empty where all rows are one split.
    """

    fields: Mapping[str, Field | Choice | Variant]
    splits: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Mapping[str, FieldLike], splits: Mapping[str, str] | None = None) -> Declaration:
        """Check what can be checked of a declaration without the tensors.

        Raises:
            DeclarationError: an expression that does not parse, names that do not exist, a circle, nothing to serve.
        """
        splits = {} if splits is None else splits
        _require_names("fields", fields)
        _require_names("splits", splits)
        if not all(isinstance(tensor, str) for tensor in splits.values()):
            raise DeclarationError(f"splits should map names to tensors, found {splits!r:.120}")
        parsed = {
            name: value if isinstance(value, (Field, Choice, Variant)) else Field.parse(value, name)
            for name, value in fields.items()
        }
        made = cls(parsed, dict(splits))
        made._check()
        return made

    @classmethod
    def from_config(cls, values: Mapping[str, Any], path: Path) -> Declaration | None:
        """The declaration in a configuration; ``None`` if it has none.

        Args:
            values: the configuration.
            path: its file, for errors.

        Raises:
            DeclarationError: it is there and cannot be understood; names the file.
        """
        found = values.get(CONFIG_KEY)
        if found is None:
            return None
        try:
            return cls.parse(*_parts(found))
        except DeclarationError as exc:
            raise DeclarationError(f'{path}, "{CONFIG_KEY}": {exc}', path=path) from exc

    def to_config(self) -> dict[str, Any]:
        """What stands under :data:`CONFIG_KEY`.

        Raises:
            DeclarationError: a field that only Python can express: a choice whose probabilities are a function.
        """
        fields = {name: field_to_config(name, value) for name, value in self.fields.items()}
        return {"fields": fields, **({"splits": dict(self.splits)} if self.splits else {})}

    @property
    def parts(self) -> list[str | None]:
        """Names of the splits; ``None`` alone, all rows, where there are none."""
        return [*self.splits] or [None]

    @property
    def served(self) -> list[str]:
        """Names of the fields that a batch has."""
        return [name for name in self.fields if not name.startswith("_")]

    @property
    def tensors(self) -> set[str]:
        """Names of all tensors that samples read, ragged ones by their base name."""
        return {*self.splits.values(), *(tensor for name in self.fields for tensor in self.tensors_of(name))}

    def rows_of(self, name: str) -> Rows:
        """What a field reads: its lookup; of a choice, what names its rows."""
        value = self.fields[name]
        if isinstance(value, Variant):
            return self.rows_of(value.of)
        return value.lookup if isinstance(value, Field) else parse_rows(value.rows, name)

    def text_of(self, name: str) -> str:
        """What a field reads, in words."""
        value = self.fields[name]
        if isinstance(value, Choice):
            return f"one of {', '.join(value.tensors)} or zeros [{value.rows}]"
        return f"the variant drawn for {value.of}" if isinstance(value, Variant) else str(value.lookup)

    def tensors_of(self, name: str) -> list[str]:
        """Names of the tensors that a field reads, ragged ones by their base name."""
        value = self.fields[name]
        chosen = [*value.tensors, *filter(None, [value.key])] if isinstance(value, Choice) else []
        return [*chosen, *(lookup.tensor for lookup in lookups(self.expanded(name)))]

    def expanded(self, name: str) -> Rows:
        """What a field reads, with the fields that it names substituted."""

        def inside(rows: Rows) -> Rows:
            if isinstance(rows, Lookup):
                return Lookup(rows.tensor, inside(rows.rows), rows.column)
            return rows if rows in {POSITION, ROW} else inside(self.rows_of(rows))

        return inside(self.rows_of(name))

    def _check(self) -> None:
        for name in self.fields:
            if name in {POSITION, ROW} or not name.isidentifier():
                raise DeclarationError(f"a field cannot be called {name!r}: expected a plain name other than i and row")
        choices = [name for name, value in self.fields.items() if isinstance(value, Choice)]
        if len(choices) > 1:
            raise DeclarationError(f"expected at most one choice, found {', '.join(choices)}")
        for name, value in self.fields.items():
            if isinstance(value, Variant) and value.of not in choices:
                raise DeclarationError(f"field {name!r}: {value.of!r} is no choice; {closest(value.of, choices)}")
            self._follow(name)
        if not self.served:
            raise DeclarationError(
                "nothing is served: expected at least one field whose name has no leading underscore"
            )

    def _follow(self, name: str) -> None:
        """Refuse names that do not exist, and circles."""
        path, depth = [name], 0
        while True:
            rows = self.rows_of(path[-1])
            while isinstance(rows, Lookup):
                rows, depth = rows.rows, depth + 1
            if depth > _DEEPEST:
                raise DeclarationError(f"field {name!r} needs {depth} lookups one after the other; at most {_DEEPEST}")
            if rows in {POSITION, ROW}:
                return
            inner = self.fields.get(rows)
            if not isinstance(inner, Field):
                known = [POSITION, ROW, *(key for key, value in self.fields.items() if isinstance(value, Field))]
                raise DeclarationError(
                    f"field {path[-1]!r}: no field {rows!r} to take rows from; {closest(rows, known)}"
                )
            if rows in path:
                raise DeclarationError(f"fields need each other in a circle: {' -> '.join([*path, rows])}")
            path.append(rows)


def _require_names(what: str, given: object) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise DeclarationError(f"{what} should map names to texts, found {given!r:.120}")


def _parts(found: object) -> tuple[Mapping[str, FieldLike], Mapping[str, str] | None]:
    """Fields and splits of the value under :data:`CONFIG_KEY`."""
    if not isinstance(found, Mapping) or not found.keys() <= {"fields", "splits"} or "fields" not in found:
        raise DeclarationError(f'expected {{"fields": {{...}}, "splits": {{...}}}}, found {found!r:.120}')
    fields = found["fields"]
    if not isinstance(fields, Mapping) or not all(isinstance(value, (str, Mapping)) for value in fields.values()):
        raise DeclarationError(f"fields should map names to expressions, found {fields!r:.120}")
    return {name: field_from_config(name, value) for name, value in fields.items()}, found.get("splits")


def field_to_config(name: str, value: Field | Choice | Variant) -> str | dict[str, Any]:
    """A field as ``config.json`` has it: an expression, or an object where that does not say all.

    Raises:
        DeclarationError: a choice whose probabilities are a function of the epoch.
    """
    if isinstance(value, Variant):
        return {"variant_of": value.of}
    if isinstance(value, Field):
        text = str(value.lookup)
        return text if value.dtype is None else {"lookup": text, "dtype": str(value.dtype).removeprefix("torch.")}
    if callable(value.probabilities) and not isinstance(value.probabilities, Unwritten):
        raise DeclarationError(
            f"field {name!r}: probabilities that are a function of the epoch cannot be written to config.json"
        )
    made: dict[str, Any] = {"choice": list(value.tensors), "rows": value.rows}
    if value.key is not None:
        made["key"] = value.key
    made["typical" if callable(value.probabilities) else "probabilities"] = list(value.planned)
    return made


def field_from_config(name: str, value: str | Mapping[str, Any]) -> FieldLike:
    """What :func:`field_to_config` wrote.

    Raises:
        DeclarationError: it is none of that.
    """
    if isinstance(value, str):
        return value
    kind, keys = next((kind for kind in ("choice", "lookup", "variant_of") if kind in value), ""), value.keys()
    if kind == "variant_of" and keys == {kind} and isinstance(value[kind], str):
        return Variant(value[kind])
    if kind == "lookup" and keys == {kind, "dtype"} and isinstance(value[kind], str):
        dtype = getattr(torch, str(value["dtype"]), None)
        if isinstance(dtype, torch.dtype):
            return Field.parse(value[kind], name, dtype)
    if kind == "choice" and keys <= {kind, "rows", "key", "probabilities", "typical"} and isinstance(value[kind], list):
        rows, key, given = value.get("rows", ROW), value.get("key"), value.get("probabilities")
        if "typical" in value:
            return Choice(tuple(value[kind]), Unwritten(), rows, value["typical"], key)
        if isinstance(given, list):
            return Choice(tuple(value[kind]), given, rows, None, key)
    raise DeclarationError(
        f'field {name!r}: expected an expression, {{"lookup", "dtype"}}, {{"choice", "rows", "probabilities"}} or'
        f' {{"variant_of"}}, found {dict(value)!r:.200}'
    )


def everything(specs: Sequence[TensorSpec]) -> Declaration:
    """The declaration of tensors about which nothing is said: each of the common number of rows is a field.

    Strings are no fields, since a batch of numbers has no use for their bytes; a declaration may name them.

    Raises:
        DeclarationError: no number of rows is more common than the others.
    """
    rows: dict[str, int] = {}
    texts = text_parts(specs)
    for spec in specs:
        if spec.name in texts:
            continue
        name = base_name(spec.name)
        if name == spec.name and spec.shape:
            rows[name] = spec.n_rows
        elif spec.name.endswith(".offsets"):
            rows[name] = spec.n_rows - 1
    common = Counter(rows.values()).most_common(2)
    if not common or (len(common) > 1 and common[0][1] == common[1][1]):
        found = ", ".join(f"{name} {count}" for name, count in list(rows.items())[:12]) or "none with rows"
        raise DeclarationError(
            f"which tensors belong together? Their numbers of rows are {found}. Declare the fields, as in"
            ' Dataset(path, {"emb": "embeddings[i]"})'
        )
    fields: dict[str, FieldLike] = {}
    for name in (name for name, count in rows.items() if count == common[0][0]):
        if _plain(name) in fields:
            raise DeclarationError(
                f"{name!r} and another tensor would both be the field {_plain(name)!r}; declare the fields"
            )
        fields[_plain(name)] = Field(Lookup(name, POSITION))
    return Declaration.parse(fields)


def _plain(name: str) -> str:
    """A field's name for a tensor."""
    plain = "".join(letter if letter.isidentifier() or letter.isdigit() else "_" for letter in name).strip("_")
    return plain if plain.isidentifier() and plain not in {POSITION, ROW} else f"field_{plain}"
