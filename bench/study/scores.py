"""The sections of the report on what the best models score: noise, questions about characters, languages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from study.results import BLT, BOTH_BLTS, CLEAN, TOKENS, Results
from study.statistics import Estimate, slope_of
from study.tasks import CHOICES, EDITS, TASKS
from study.wording import marked, page, shown, table, verdict, versus

NO_TRANSLATIONS = ("python", "prose", "english")  # groups that are not among the languages
RARE = 1e-3  # a language with less than this share of the training text
SAME_LENGTH = ("replace", "swap")  # edits after which a word has as many characters
CHANCE = {name: 1 / 2 if name == "contains" else 1 / CHOICES for name in TASKS}


def noise(results: Results) -> str:
    """Return the first half of (c): noise on the characters."""
    names = results.names("noise")
    clean = results.by_family(lambda run: results.bits_per_byte(run, "noise", CLEAN))
    noised = {n: results.by_family(lambda run, n=n: results.bits_per_byte(run, "noise", n)) for n in names}
    loss = {n: results.by_family(lambda run, n=n: results.relative_loss(run, [n])) for n in names}
    loss["mean"] = results.by_family(lambda run: results.relative_loss(run, names))
    if not names or not loss["mean"]:
        return ""
    base = next((family for family in TOKENS if family in loss["mean"]), "")
    sentences = against_tokens(
        results,
        lambda ours, theirs: results.noise_lead(ours, theirs, names),
        "noised over clean bits, the mean over noises",
    )
    rows = [[f, shown(clean.get(f)), *(shown(noised[n].get(f)) for n in names)] for f in loss["mean"]]
    relative = [
        [family, *(marked(results.noise_lead(family, base, of), "%") for of in (*([n] for n in names), names))]
        for family in loss["mean"]
        if base and family != base
    ]
    return page(
        sentences,
        table(["bits per byte", "clean", *names], rows),
        table([f"lead over {base} in noised over clean; bold where clear", *loss], relative),
    )


def noise_by_kind(results: Results, theirs: str) -> str:
    """Return a sentence for each BLT on what noise costs it, against another family, in all and by noise."""
    names, sentences = results.names("noise"), []
    for ours in BOTH_BLTS:
        if (mean := results.noise_lead(ours, theirs, names)) is None:
            continue
        leads = {name: lead for name in names if (lead := results.noise_lead(ours, theirs, [name])) is not None}
        sentences.append(verdict(ours, theirs, mean, "%", "in noised over clean bits, the mean over noises"))
        for word, sign in (("ahead", 1), ("behind", -1)):
            if found := [name for name, lead in leads.items() if lead.is_clear and sign * lead.value > 0]:
                sentences.append(f"{ours} is clearly {word} on {', '.join(found)}.")
    return " ".join(sentences)


def tasks(results: Results) -> str:
    """Return the second half of (c): questions about characters, and misspellings."""
    names, edits = (
        [n for n in known if n in results.names(kind)] for kind, known in (("task", TASKS), ("misspelling", EDITS))
    )
    sentences, tables = [], []
    if names:
        chance = {name: CHANCE[name] for name in names}
        right = {name: results.shares_right("task", [name]) for name in names}
        right["mean"] = results.shares_right("task", names)
        chance["mean"] = statistics.fmean(chance.values())
        sentences.append(versus("chance", above_chance(results), "%", "right answers, the mean over tasks"))
        sentences += answers_against_tokens(results, "task", names, "right answers, the mean over tasks")
        rows = [[family, *(shown(right[n].get(family), "%") for n in right)] for family in right["mean"]]
        rows.append(["chance", *(f"{100 * chance[n]:.0f}%" for n in right)])
        tables.append(table(["questions answered right", *right], rows))
    if edits:
        right = {edit: results.shares_right("misspelling", [edit]) for edit in edits}
        right["mean"] = results.shares_right("misspelling", edits)
        told = "words told from their misspellings"
        sentences += answers_against_tokens(results, "misspelling", edits, f"{told}, the mean over edits")
        kept = [edit for edit in edits if edit in SAME_LENGTH]
        sentences += answers_against_tokens(results, "misspelling", kept, f"{told}, where the edit keeps the length")
        rows = [[family, *(shown(right[n].get(family), "%") for n in right)] for family in right["mean"]]
        tables.append(table([told, *right], rows))
    return page(sentences, *tables)


def above_chance(results: Results) -> dict[str, Estimate]:
    """Return by family the share of right answers less that of guesses, the mean over tasks."""
    names = results.names("task")
    chance = Estimate(statistics.fmean(CHANCE[name] for name in names), 0.0) if names else Estimate(0.0, 0.0)
    return {family: share - chance for family, share in results.shares_right("task", names).items()}


def against_tokens(results: Results, lead: Callable[[str, str], Estimate | None], what: str) -> list[str]:
    """Return sentences on the models over bytes, compared with those over tokens."""
    ours = [family for family in results.measured if family not in TOKENS]
    return [versus(tokens, {family: lead(family, tokens) for family in ours}, "%", what) for tokens in TOKENS]


def answers_against_tokens(results: Results, kind: str, names: Sequence[str], what: str) -> list[str]:
    return against_tokens(results, lambda ours, theirs: results.right_lead(kind, ours, theirs, names), what)


def languages(results: Results) -> str:
    """Return (d): bits per byte by group of text, over its share of the training text."""
    leads = {tokens: found for tokens in TOKENS if (found := results.log_leads(BLT, tokens))}
    if not leads:
        return ""
    sentences = [count_of_groups(tokens, found) for tokens, found in leads.items()]
    sentences += [language_trend(results, tokens) for tokens in leads]
    sentences += [rare_languages(results, tokens) for tokens in leads]
    groups = sorted(results.groups(), key=lambda group: -results.share(group))
    bits = {group: results.by_family(lambda run, g=group: results.bits_per_byte(run, group=g)) for group in groups}
    columns = [family for family in (*TOKENS, "bytes", BLT) if any(family in values for values in bits.values())]
    rows = []
    for group in groups:
        cells = [shown(bits[group].get(family)) for family in columns]
        cells += [marked(found.get(group), "%") for found in leads.values()]
        rows.append([group, f"{100 * results.share(group):.2f}%", *cells])
    heads = [f"lead of {BLT} over {tokens}" for tokens in leads]
    return page(sentences, table(["bits per byte of", "share of the training text", *columns, *heads], rows))


def count_of_groups(tokens: str, leads: dict[str, Estimate]) -> str:
    """Return a sentence on the groups of text in which BLT-Entropy is ahead of a model over tokens, and behind."""
    ahead, behind = (sum(v.is_clear and sign * v.value > 0 for v in leads.values()) for sign in (1, -1))
    if all(math.isnan(lead.error) for lead in leads.values()):
        return ""
    return f"Of {len(leads)} groups of text, {BLT} is clearly ahead of {tokens} in {ahead}, behind in {behind}."


def language_trend(results: Results, tokens: str) -> str:
    """Return a sentence on how the lead over a model of tokens changes where a language has less training text."""
    leads = results.log_leads(BLT, tokens)
    trained = {g: lead.value for g, lead in leads.items() if results.share(g) > 0 and g not in NO_TRANSLATIONS}
    if len(trained) <= 2 or any(math.isnan(lead.error) for lead in leads.values()):
        return ""
    slope = slope_of([-math.log10(results.share(group)) for group in trained], list(trained.values()))
    change = f"changes by {shown(slope, '%', signed=True)}{'' if slope.is_clear else ', no clear trend'}"
    return f"Where a language has ten times less training text, the lead of {BLT} over {tokens} {change}."


def rare_languages(results: Results, tokens: str) -> str:
    """Return a sentence on the languages that the training text has least of."""
    leads = results.log_leads(BLT, tokens)
    rare = {g: lead for g, lead in leads.items() if results.share(g) < RARE and g not in NO_TRANSLATIONS}
    if not rare or all(math.isnan(lead.error) for lead in rare.values()):
        return ""
    parts = []
    for word, sign in ((f"ahead of {tokens}", 1), ("behind", -1)):
        groups = [group for group, lead in rare.items() if lead.is_clear and sign * lead.value > 0]
        parts.append(f"{word} in {', '.join(groups) or 'none'}")
    what = f"Of {len(rare)} languages with less than {RARE:.1%} of the training text"
    return f"{what}, {BLT} is clearly {', and '.join(parts)}."
