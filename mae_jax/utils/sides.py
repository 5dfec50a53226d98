"""Sizes of rectangles: an int is the side of a square, a pair is height and width.

A square is stored as an int, never as a pair; `simplify` holds that where sizes are read.
"""

Sides = int | tuple[int, int]


def height_width(sides: Sides) -> tuple[int, int]:
    """Return height and width."""
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return height, width


def simplify(height: int, width: int) -> Sides:
    """Return the side of a square, else height and width."""
    return height if height == width else (height, width)


def sides_text(sides: Sides, separator: str = " x ") -> str:
    """Return "16", or "4 x 256" of height and width."""
    return str(sides) if isinstance(sides, int) else separator.join(map(str, sides))
