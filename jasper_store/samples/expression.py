"""The grammar of a field: ``NAME[rows]`` or ``NAME[rows, column]``, parsed and never evaluated.

::

    field   =  NAME "[" rows [ "," column ] "]"
    rows    =  "i" | "row" | FIELD | field
    column  =  an integer
    NAME    =  an identifier, dotted or not, or a quoted name ("embeddings/questions")

It means what numpy means by it for an array of samples: with ``i`` an int64 array [B], ``NAME[rows]`` is
[*rows.shape, *row_shape] and ``NAME[rows, column]`` is ``NAME[rows][..., column]`` along the second dimension of NAME.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from jasper_store.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["POSITION", "ROW", "Lookup", "Rows", "closest", "lookups", "parse_field", "parse_rows"]

POSITION = "i"
"""The position of a sample, 0 to len - 1."""
ROW = "row"
"""The row of a sample: the value of the split's index tensor at its position; the position itself without a split."""

_MAX_LENGTH: Final = 10_000
"""Characters of an expression; Python's parser needs time and stack for more."""
_MAX_COLUMN: Final = 1 << 63
_FORM = "a field is NAME[rows] or NAME[rows, column], where rows is i, row, another field or another lookup"


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of one tensor.

    Attributes:
        tensor: its name.
        rows: what names the rows: :data:`POSITION`, :data:`ROW`, the name of another field, or another lookup.
        column: which entry of the second dimension; ``None`` is all of them. Negative ones count from the end.
    """

    tensor: str
    rows: Rows
    column: int | None = None

    def __str__(self) -> str:
        name = self.tensor if all(map(_is_plain, self.tensor.split("."))) else repr(self.tensor)
        column = "" if self.column is None else f", {self.column}"
        return f"{name}[{self.rows}{column}]"


Rows: TypeAlias = "Lookup | str"


def parse_field(text: str, field: str) -> Lookup:
    """Parse the expression of a field.

    Args:
        text: the expression.
        field: name of the field, for errors.

    Raises:
        DeclarationError: with a caret under the place that is wrong.
    """
    found = parse_rows(text, field)
    if isinstance(found, str):
        raise _error(text.strip(), field, 0, f"{found!r} alone names no tensor; {_FORM}")
    return found


def parse_rows(text: str, field: str) -> Rows:
    """Parse what may stand between the brackets: a lookup, or a name.

    Raises:
        DeclarationError: as :func:`parse_field`.
    """
    if not isinstance(text, str):
        raise DeclarationError(f"field {field!r}: expected a text such as 'embeddings[i]', found {text!r:.80}")
    # On one line, so that a column of the text is a column of the message.
    text = text.translate({ord("\n"): " ", ord("\r"): " "}).strip()
    if len(text) > _MAX_LENGTH:
        raise _error(
            text, field, _MAX_LENGTH, f"it has {len(text)} characters, expected at most {_MAX_LENGTH}; {_FORM}"
        )
    try:
        return _Parser(text, field).rows(ast.parse(text, mode="eval").body)
    except SyntaxError as exc:
        raise _error(text, field, (exc.offset or 1) - 1, f"{exc.msg}; {_FORM}") from None
    except DeclarationError:
        raise
    except (ValueError, RecursionError, MemoryError) as exc:
        why = str(exc) or "it is nested too deeply"
        raise _error(text, field, 0, f"it cannot be parsed ({why}); {_FORM}") from None


def lookups(rows: Rows) -> Iterator[Lookup]:
    """A lookup and those inside it, the outermost first."""
    while isinstance(rows, Lookup):
        yield rows
        rows = rows.rows


def _is_plain(word: str) -> bool:
    """Whether a part of a name may stand without quotes; Python reads some letters as others."""
    return word.isidentifier() and not keyword.iskeyword(word) and unicodedata.normalize("NFKC", word) == word


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the names that are similar to a given one, else all names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, known[:12])) or "none"
    return f"there are {shown}{', ...' if len(known) > 12 else ''}"


class _Parser:
    def __init__(self, text: str, field: str) -> None:
        self._text, self._field = text, field

    def rows(self, node: ast.expr) -> Rows:
        if isinstance(node, ast.Subscript):
            return self._lookup(node)
        if isinstance(node, ast.Name):
            return node.id
        raise self._refuse(node, f"expected i, row, the name of a field or a lookup; {_FORM}")

    def _lookup(self, node: ast.Subscript) -> Lookup:
        inner: ast.expr = node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if not 1 <= len(parts) <= 2:
            raise self._refuse(inner, f"expected rows and at most one column, found {len(parts)} parts")
        column = self._column(parts[1]) if len(parts) == 2 else None
        return Lookup(self._name(node.value), self.rows(parts[0]), column)

    def _name(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            return f"{self._name(node.value)}.{node.attr}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise self._refuse(node, "expected the name of a tensor before '['")

    def _column(self, node: ast.expr) -> int:
        sign, inner = (
            (-1, node.operand) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else (1, node)
        )
        if not isinstance(inner, ast.Constant) or type(inner.value) is not int:
            raise self._refuse(node, "a column is a whole number")
        if inner.value >= _MAX_COLUMN:
            raise self._refuse(node, "a column is a whole number of at most 63 bits")
        return sign * inner.value

    def _refuse(self, node: ast.expr, why: str) -> DeclarationError:
        # ast counts bytes of UTF-8.
        offset = len(self._text.encode()[: node.col_offset].decode(errors="ignore"))
        return _error(self._text, self._field, offset, why)


def _error(text: str, field: str, offset: int, why: str) -> DeclarationError:
    offset = max(0, min(offset, len(text)))
    start = max(0, offset - 60)
    line = "".join(letter if letter.isprintable() else "?" for letter in text[start : start + 110])
    return DeclarationError(f"field {field!r} cannot be understood: {why}\n    {line}\n    {' ' * (offset - start)}^")
