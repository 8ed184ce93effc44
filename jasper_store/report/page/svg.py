"""The few shapes that the charts are made of. Everything that comes from outside is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Axis", "Frame", "joined", "number", "picture", "polygon", "tag", "text", "ticks"]

WIDTH = 440


def joined(parts: Iterable[str]) -> str:
    """Parts of a document, one after the other."""
    return "".join(parts)


def number(value: float) -> str:
    """A coordinate: a tenth of a unit is finer than any screen."""
    return f"{value:.1f}".removesuffix(".0")


def tag(name: str, content: str = "", **attributes: float | str) -> str:
    """An element; ``content`` is markup, attributes are escaped (``class_`` is ``class``, ``_`` is ``-``)."""
    written = joined(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>"


def text(x: float, y: float, content: str, **attributes: float | str) -> str:
    """A label; ``content`` is text."""
    return tag("text", escape(content), x=x, y=y, **attributes)


def polygon(points: Iterable[tuple[float, float]], title: str = "", **attributes: float | str) -> str:
    """A filled outline with a title to be shown under the pointer."""
    outline = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return tag("polygon", tag("title", escape(title)) if title else "", points=outline, **attributes)


def picture(height: float, label: str, *parts: str, stretched: bool = False) -> str:
    """A drawing that scales with the page and says in words what it shows; ``stretched`` in width only."""
    more: dict[str, float | str] = {"preserveAspectRatio": "none", "height": height} if stretched else {}
    return tag("svg", joined(parts), viewBox=f"0 0 {WIDTH} {number(height)}", role="img", aria_label=label, **more)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, some ``about`` of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


class Axis:
    """A linear scale from values to coordinates."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


class Frame:
    """A plotting area with two axes, their grid and their labels."""

    def __init__(self, height: float, x: tuple[float, float], y: tuple[float, float], *, left: float = 46) -> None:
        self.height = height
        # Above the area stands the name of y, below it the numbers and the name of x.
        self.left, self.right, self.top, self.bottom = left, WIDTH - 10, 26, height - 42
        self.x = Axis(*x, self.left, self.right)
        self.y = Axis(*y, self.bottom, self.top)

    def grid(
        self, x_name: str, y_name: str, y_texts: Sequence[tuple[float, str]], x_texts: Sequence[tuple[float, str]]
    ) -> str:
        """Grid lines for the ticks of y, numbers at both axes, and the names of both with their units."""
        lines = [
            tag("line", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value), class_="grid")
            + text(self.left - 6, self.y(value) + 4, shown, text_anchor="end")
            for value, shown in y_texts
        ]
        lines += [text(self.x(value), self.bottom + 17, shown, text_anchor="middle") for value, shown in x_texts]
        lines.append(text((self.left + self.right) / 2, self.height - 4, x_name, text_anchor="middle", class_="name"))
        lines.append(text(0, 13, y_name, class_="name"))
        return joined(lines)
