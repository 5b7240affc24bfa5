"""What the people of a network do with layers, tiles and borders, where it differs from ours."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Rules of the programs that belong to a network.

    Attributes
    ----------
    floor
        Least weight of their blending window, whose largest is 1.
    is_masked
        Whether pixels without data are 0 in their maps.
    turns_first
        Whether, in reverse, the whole depth is turned around before its centre is taken.
    halves
        Whether the middle of an even depth starts at ``depth // 2 - count // 2``, also for an odd
        count.
    """

    floor: float = 0.0
    is_masked: bool = True
    turns_first: bool = False
    halves: bool = False

    def centre(self, depth: int, count: int, is_reversed: bool) -> range:
        """Return the positions of the middle ``count`` layers, in the order they are read."""
        first = depth // 2 - count // 2 if self.halves else (depth - count) // 2
        if is_reversed and self.turns_first:
            return range(depth)[::-1][first : first + count]
        return range(depth)[first : first + count][:: -1 if is_reversed else 1]


_HECATE = Family(floor=0.001, turns_first=True, halves=True)
_FAMILIES = {
    "ink_hecate_2_4um": _HECATE,
    "ink_hecate_9_6um": _HECATE,
    "ink_hybrid_3d2d": Family(floor=0.001, is_masked=False, halves=True),
}


def family_of(architecture: str, has_mask: bool = False) -> Family:
    """Return the rules of an architecture; a mask of papyrus holds for every family."""
    family = _FAMILIES.get(architecture, Family())
    return replace(family, is_masked=family.is_masked or has_mask)
