"""Says what came out of the study, in markdown: a sentence on each claim of the papers, and a section on each part."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from blt_kernels._files import write_text
from study import scores, sections
from study.families import longer_patches
from study.results import BLT, TOKENS, Results, load
from study.wording import table, verdict


def claims(results: Results) -> str:
    """Return a sentence on each claim of the papers."""
    tokens = best_tokens(results)
    if tokens is None:
        return ""
    base, *_, longest = (model.name for model in longer_patches())
    scratch, begun = sections.begun_models(results)
    found = {
        "BLT matches a model over tokens at equal training FLOPs": of_families(results, BLT, tokens),
        "BLT by entropy is better than BLT by spaces": of_families(results, BLT, "BLT-Space"),
        "MegaByte is better than a transformer over bytes": " ".join(
            filter(
                None, [of_families(results, "MegaByte", "bytes"), sections.change_of_lead(results, "MegaByte", "bytes")]
            )
        ),
        "Longer patches pay for a wider global transformer": of_models(results, longest, base),
        "BLT spends less at inference for the same bits": sections.inference(results, tokens),
        "Noise costs BLT less": scores.noise_by_kind(results, tokens),
        "BLT is better at questions about characters": of_answers(results, tokens),
        "BLT tells words from misspellings": of_misspellings(results, tokens),
        "BLT is better where a language has little text": scores.language_trend(results, tokens),
        "BLT learns faster as the layers of a model over tokens": of_models(results, begun[0], scratch)
        if begun
        else "",
        "Patches and tables of n-grams both make BLT better than bytes": sections.made_by_tables(results),
    }
    return table(["claim", "here"], [[claim, said] for claim, said in found.items() if said], texts=2)


def best_tokens(results: Results) -> str | None:
    """Return the family over tokens that has the fewest bits per byte at the largest budget, None without runs."""
    curves = {family: curve for family in TOKENS if (curve := results.curve(family))}
    return min(curves, key=lambda family: curves[family][-1][1].value, default=None)


def of_families(results: Results, ours: str, theirs: str) -> str:
    """Return a sentence on the best sizes of two families at the largest budget."""
    names = [results.best(family, results.budgets[-1]) for family in (ours, theirs)]
    return of_models(results, *names) if all(names) else ""


def of_models(results: Results, ours: str, theirs: str) -> str:
    """Return a sentence on two models at the largest budget that both have."""
    leads = {x: lead for x in results.budgets if (lead := results.lead(ours, theirs, x)) is not None}
    return f"At {max(leads):g} TFLOP: {verdict(ours, theirs, leads[max(leads)])}" if leads else ""


def of_answers(results: Results, theirs: str) -> str:
    """Return a sentence on the right answers of BLT-Entropy and another family, and on guesses."""
    lead = results.right_lead("task", BLT, theirs, results.names("task"))
    if lead is None:
        return ""
    above = scores.above_chance(results).values()
    guesses = all(not math.isnan(lead.error) and not (lead.is_clear and lead.value > 0) for lead in above)
    return verdict(BLT, theirs, lead, "%", "in right answers") + (
        " No model is clearly above chance." if guesses else ""
    )


def of_misspellings(results: Results, theirs: str) -> str:
    """Return sentences on the misspellings that BLT-Entropy and another family tell, by edits that keep the length."""
    edits = [edit for edit in results.names("misspelling") if edit in scores.SAME_LENGTH]
    what = f"in right choices, where an edit keeps the length ({', '.join(edits)})"
    lead = results.right_lead("misspelling", BLT, theirs, edits)
    return "" if lead is None else verdict(BLT, theirs, lead, "%", what)


PARTS: dict[str, Callable[[Results], str]] = {
    "claims": claims,
    "overview": sections.overview,
    "rates": sections.rates,
    "families": sections.families,
    "patches": sections.patches,
    "noise": scores.noise,
    "tasks": scores.tasks,
    "languages": scores.languages,
    "from tokens": sections.from_tokens,
    "ablations": sections.ablations,
}


def write(folder: Path) -> None:
    """Write ``report.md`` beside the results of `folder`."""
    results = load(folder)
    parts = [(name, part(results)) for name, part in PARTS.items()]
    text = "\n\n".join(f"## {name.capitalize()}\n\n{body}" for name, body in parts if body)
    write_text(folder / "report.md", f"# What came out of the study\n\n{text}\n")
