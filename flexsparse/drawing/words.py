"""Numbers as pictures print them."""

from __future__ import annotations


def percent(part: float | None) -> str:
    """A part of 1 as '37.5 %', all of it as '100 %'; None as 'not computed'."""
    if part is None:
        return "not computed"
    if 0 < part < 0.0001:
        return "under 0.01 %"
    if 0 < part < 0.01:
        return f"{part * 100:.2f} %"
    if 0.999 <= part < 1:
        return "99.9 %"
    return f"{part * 100:.1f} %" if part % 1 else f"{part * 100:.0f} %"


def tokens(n: int) -> str:
    """A length or position as an axis shows it: '512', '96K', '1M'; K is 1024."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n and n % size == 0:
            return f"{n // size:,}{unit}"
    return f"{n:,}"


def scaled(x: float, unit: str) -> str:
    """A number with a prefix: '17.2 GFLOP', '35 µs'."""
    prefixes = ("n", "µ", "m", "", "k", "M", "G", "T", "P", "E")
    place = 3
    while x and abs(x) < 1 and place > 0:
        x, place = x * 1000, place - 1
    while abs(x) >= 1000 and place < len(prefixes) - 1:
        x, place = x / 1000, place + 1
    return f"{x:.3g} {prefixes[place]}{unit}"
