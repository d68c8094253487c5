"""Turns estimates into sentences and tables, in markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from study.statistics import Estimate


def shown(estimate: Estimate | None, unit: str = "bits", signed: bool = False) -> str:
    """Return value ± standard error; `unit` is "bits" or "%". Returns an empty text for None."""
    if estimate is None:
        return ""
    factor, digits = (100, 1) if unit == "%" else (1, 3)
    value = f"{factor * estimate.value:{'+' if signed else ''}.{digits}f}"
    error = "" if math.isnan(estimate.error) else f" ± {factor * estimate.error:.{digits}f}"
    return f"{value}{error}{'%' if unit == '%' else ''}"


def marked(estimate: Estimate | None, unit: str = "bits") -> str:
    """Return a difference with its sign, in bold if it is clear."""
    text = shown(estimate, unit, signed=True)
    return f"**{text}**" if estimate is not None and estimate.is_clear else text


def verdict(ours: str, theirs: str, lead: Estimate, unit: str = "bits", what: str = "bits per byte") -> str:
    """Return a sentence on the lead of `ours`: positive if it is better."""
    amount = f"{shown(magnitude(lead), unit)} {what}"
    if lead.is_clear:
        return f"{ours} is {'ahead of' if lead.value > 0 else 'behind'} {theirs} by {amount}."
    if math.isnan(lead.error):
        return f"No error is known for the lead of {ours} over {theirs}: {shown(lead, unit, signed=True)} {what}."
    return f"{ours} has no clear lead over {theirs}, nor the reverse: {shown(lead, unit, signed=True)} {what}."


def versus(theirs: str, leads: Mapping[str, Estimate | None], unit: str = "bits", what: str = "bits per byte") -> str:
    """Return a sentence on the leads of several over `theirs`, an empty text if there are none."""
    known = {name: lead for name, lead in leads.items() if lead is not None}
    kinds = {
        "Ahead": [name for name, lead in known.items() if lead.is_clear and lead.value > 0],
        "Behind": [name for name, lead in known.items() if lead.is_clear and lead.value < 0],
        "No clear difference": [n for n, lead in known.items() if not lead.is_clear and not math.isnan(lead.error)],
        "No error is known": [name for name, lead in known.items() if math.isnan(lead.error)],
    }
    parts = [
        f"{kind}: {'; '.join(f'{name} {shown(known[name], unit, signed=True)}' for name in names)}."
        for kind, names in kinds.items()
        if names
    ]
    return f"Compared with {theirs}, in {what}. {' '.join(parts)}" if parts else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table. The first `texts` columns are aligned to the left."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def page(sentences: Sequence[str], *tables: str) -> str:
    """Return a list of sentences, and tables."""
    return "\n\n".join(["\n".join(f"- {sentence}" for sentence in sentences if sentence), *tables]).strip()


def trend(ours: str, theirs: str, early: Estimate, late: Estimate) -> str:
    """Return a sentence on how the lead of `ours` changes from the smallest budget to the largest."""
    change = late - early
    if math.isnan(change.error):
        return ""
    if not change.is_clear:
        amount = f"{shown(change, signed=True)} bits per byte"
        return f"With more training, {ours} neither gains clearly on {theirs} nor loses: {amount}."
    verb, on = ("gains", "on") if change.value > 0 else ("loses", "to")
    return f"With more training, {ours} {verb} {shown(magnitude(change))} bits per byte {on} {theirs}."


def magnitude(estimate: Estimate) -> Estimate:
    return replace(estimate, value=abs(estimate.value))
