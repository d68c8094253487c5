"""The sections of the report on training: sentences, and tables of means with standard errors.

Sentences follow from the numbers: `verdict` claims a difference only if it is clear. Sections whose runs are missing
are empty.
"""

from __future__ import annotations

import math
import statistics

from study.families import FAMILIES, SIZES, longer_patches, variants
from study.results import BLT, BOTH_BLTS, TOKENS, Results, Run
from study.statistics import Estimate, log_ratio_at_equal_bits, saved
from study.wording import magnitude, marked, page, shown, table, trend, verdict, versus

COMPARED = ("tokens 4k", "tokens 32k", "bytes", "BLT-Space")  # families that all others are compared with
ZERO = Estimate(0.0, 0.0)


def overview(results: Results) -> str:
    """Return what was run."""
    if not results.runs:
        return ""
    hours = sum(run.cpu_seconds for run in results.runs) / 3600
    seeds = max(len(results.group(run.model, run.tflops)) for run in results.runs)
    budgets = ", ".join(f"{budget:g}" for budget in results.budgets)
    spread = "; ".join(
        f"{statistics.median(found):.4f} (up to {found[-1]:.4f}) at {x:g} TFLOP"
        for x, found in results.deviations.items()
        if found
    )
    of_text = "Errors of differences in bits per byte are those of seeds and of the choice of held-out excerpts."
    sentences = [
        f"{len(results.runs)} runs, which trained for {hours:.1f} hours of one core in all.",
        f"Budgets of {budgets} TFLOP of training; {seeds} seeds of the models that are compared.",
        spread and f"Deviation of bits per byte over seeds, the median over models: {spread}.",
        of_text if results.excerpts else "Errors are over seeds alone: other held-out text would add to them.",
    ]
    if results.patcher is not None:
        p = results.patcher
        sentences.append(
            f"The entropy model of BLT-Entropy trained for {p.tflops:g} TFLOP more, which no budget contains. It has"
            f" {p.parameters / 1e6:.2f} M parameters and {p.bits:.3f} bits per byte."
        )
    rows = []
    for model in dict.fromkeys(f"{family} {size}" for family in FAMILIES for size in SIZES):
        run = next((run for run in results.runs if run.model == model), None)
        if run is not None:
            sizes = [f"{run.parameters / 1e6:.2f}", f"{run.embedding_parameters / 1e6:.2f}", f"{run.patch_size:.2f}"]
            rows.append([model, *sizes, f"{run.mflops:.2f}", f"{run.patcher_mflops:.2f}" if run.patcher_mflops else ""])
    head = ["model", "M parameters", "of these looked up", "bytes a token or patch", "MFLOP a byte", "patcher"]
    return page(sentences, table(head, rows))


def families(results: Results) -> str:
    """Return (a): bits per byte over training FLOPs."""
    curves = {family: curve for family in FAMILIES if (curve := results.curve(family))}
    if not curves:
        return ""
    budgets = results.budgets
    best = {(family, x): results.best(family, x) or "" for family in FAMILIES for x in budgets}
    leads = {
        (ours, theirs): [results.lead(best[ours, x], best[theirs, x], x) for x in budgets]
        for theirs in COMPARED
        for ours in FAMILIES
        if ours != theirs
    }
    sentences = []
    for theirs in COMPARED:
        last = {ours: found[-1] for (ours, other), found in leads.items() if other == theirs}
        sentences.append(versus(f"{theirs} at {budgets[-1]:g} TFLOP", last))
    smallest = [family for family, curve in curves.items() if curve[-1][2].size == SIZES[0]]
    if smallest:
        which = f"of {', '.join(smallest)} the smallest size is the best"
        sentences.append(f"At {budgets[-1]:g} TFLOP, {which}: a smaller one may be better still.")
    sentences.append(change_of_lead(results, "MegaByte", "bytes"))
    for other in TOKENS:
        for paid, counted in ((False, "without the patcher"), (True, "with the patcher counted")):
            sentences += savings(results, BLT, other, paid, counted)
    rows = []
    for family, curve in curves.items():
        by_budget = {run.tflops: (value, run) for _, value, run in curve}
        cells = []
        for budget in budgets:
            if budget in by_budget:
                value, run = by_budget[budget]
                cells.append(f"{shown(value)} ({run.size}, {run.mflops:.2f}, {run.trained_bytes / 1e6:.1f})")
            else:
                cells.append("")
        rows.append([family, *cells])
    heads = [f"{budget:g} TFLOP" for budget in budgets]
    lead_rows = [
        [f"{ours} over {theirs}", *map(marked, found)]
        for (ours, theirs), found in leads.items()
        if ours in (BLT, "MegaByte") and any(found)
    ]
    return page(
        sentences,
        table(["bits per byte (size, MFLOP a byte, MB read)", *heads], rows),
        table(["lead in bits per byte; bold where clear", *heads], lead_rows),
    )


def change_of_lead(results: Results, ours: str, theirs: str) -> str:
    """Return a sentence on the lead of a family at the smallest budget and at the largest, best sizes each."""
    leads = []
    for tflops in (results.budgets[0], results.budgets[-1]):
        best = [results.best(family, tflops) or "" for family in (ours, theirs)]
        leads.append(results.lead(*best, tflops))
    early, late = leads
    return "" if early is None or late is None or len(results.budgets) < 2 else trend(ours, theirs, early, late)


def savings(results: Results, ours: str, theirs: str, paid: bool, counted: str) -> list[str]:
    """Return a sentence on training FLOPs at equal bits per byte, none if the curves do not meet."""
    curves = [[(flops, bits) for flops, bits, _ in results.curve(family, paid)] for family in (ours, theirs)]
    if not all(curves):
        return []
    best = [results.best(family, results.budgets[-1]) or "" for family in (ours, theirs)]
    ratio = log_ratio_at_equal_bits(*curves, results.text_lead(*best, results.budgets[-1]))
    if ratio is None or math.isnan(ratio.error):
        return []
    share = saved(ratio)
    if not ratio.is_clear:
        amount = f"{shown(share, '%', signed=True)} saved, {counted}"
        return [f"No clear difference between {ours} and {theirs} in training FLOPs at equal bits per byte: {amount}."]
    less = f"{shown(magnitude(share), '%')} {'fewer' if share.value > 0 else 'more'}"
    return [f"At equal bits per byte, {counted}, {ours} needs {less} training FLOPs than {theirs}."]


def inference(results: Results, tokens: str) -> str:
    """Return sentences on what BLT costs a byte forward and how good it is, against the best model over tokens."""
    tflops, sentences = results.budgets[-1] if results.budgets else 0.0, []
    theirs = results.best(tokens, tflops)
    for family in BOTH_BLTS if theirs is not None else ():
        ours = results.best(family, tflops)
        lead = None if ours is None else results.lead(ours, theirs, tflops)
        if lead is None:
            continue
        run, other = results.group(ours, tflops)[0], results.group(theirs, tflops)[0]
        paid = f", {run.patcher_mflops:.2f} of them for the patcher" if run.patcher_mflops else ""
        cost = f"{ours} costs {run.inference_mflops:.2f} MFLOP a byte forward{paid}, {theirs} {other.mflops:.2f}"
        sentences.append(f"At {tflops:g} TFLOP: {cost}. {verdict(ours, theirs, lead)}")
    return " ".join(sentences)


def rates(results: Results) -> str:
    """Return the learning rates that were tried with seed 0; the chosen ones are bold."""
    return page([], *filter(None, (table_of_rates(results, tflops) for tflops in results.budgets)))


def table_of_rates(results: Results, tflops: float) -> str:
    """Return the bits per byte of the models that tried several learning rates with a budget; empty without any."""
    tried: dict[str, dict[float, Run]] = {}
    for run in results.runs:
        if run.tflops == tflops and run.seed == 0:
            tried.setdefault(run.model, {})[run.learning_rate] = run
    tried = {model: runs for model, runs in tried.items() if len(runs) > 1}
    if not tried:
        return ""
    columns = sorted({rate for runs in tried.values() for rate in runs})
    rows = []
    for model, runs in tried.items():
        cells = {rate: f"{run.bits:.3f}" for rate, run in runs.items()}
        cells = {rate: f"**{c}**" if rate == results.rates[runs[rate].family] else c for rate, c in cells.items()}
        rows.append([model, *(cells.get(rate, "") for rate in columns)])
    return table([f"{tflops:g} TFLOP, bits per byte at a learning rate of", *(f"{x:g}" for x in columns)], rows)


def patches(results: Results) -> str:
    """Return (b): longer patches at a fixed inference budget."""
    models = [model for model in longer_patches() if any(results.group(model.name, x) for x in results.budgets)]
    if len(models) < 2:
        return ""
    base, budgets = models[0], results.budgets
    others = [f"{family} {base.size}" for family in TOKENS]
    names = [model.name for model in models] + [name for name in others if any(results.group(name, x) for x in budgets)]
    bits = {(name, x): results.bits(name, x) for name in names for x in budgets}
    sentences, largest = [], budgets[-1]
    for model in models[1:]:
        leads = {x: results.lead(model.name, base.name, x) for x in budgets}
        known = [x for x in budgets if leads[x] is not None]
        for x in (known[0], known[-1]) if known else ():
            sentences.append(f"At {x:g} TFLOP: {verdict(model.name, base.name, leads[x] or ZERO)}")
        if len(known) > 1:
            sentences.append(trend(model.name, base.name, leads[known[0]] or ZERO, leads[known[-1]] or ZERO))
    for model in models:
        for name in others:
            if (lead := results.lead(model.name, name, largest)) is not None:
                sentences.append(f"At {largest:g} TFLOP: {verdict(model.name, name, lead)}")
    sentences += [inference(results, tokens) for tokens in TOKENS]
    rows = []
    for name in names:
        runs = {x: results.group(name, x) for x in budgets}
        first = next(group[0] for group in runs.values() if group)
        cells = [f"{shown(bits[name, x])} ({runs[x][0].trained_bytes / 1e6:.1f})" if runs[x] else "" for x in budgets]
        patcher = f" + {first.patcher_mflops:.2f}" if first.patcher_mflops else ""
        rows.append([name, f"{first.patch_size:.2f}", f"{first.mflops:.2f}{patcher}", *cells])
    heads = [f"{budget:g} TFLOP (MB read)" for budget in budgets]
    return page(sentences, table(["model", "bytes a patch", "MFLOP a byte + patcher", *heads], rows))


def from_tokens(results: Results) -> str:
    """Return (e): BLT-Entropy that begins as a trained transformer over tokens."""
    base, begun = begun_models(results)
    if not begun:
        return ""
    tflops = max(run.tflops for run in results.runs if run.model in begun)
    bits = {name: results.bits(name, tflops) for name in (base, *begun)}
    leads = {name: results.lead(name, base, tflops) for name in begun}
    sentences = [versus(f"{base} from scratch at {tflops:g} TFLOP", leads)]
    rows = [
        [name, shown(value), marked(results.lead(name, base, tflops)) if name != base else ""]
        for name, value in bits.items()
    ]
    rows[0][0] += " from scratch"
    return page(
        sentences, table([f"model, {tflops:g} TFLOP", "bits per byte", "lead over scratch; bold where clear"], rows)
    )


def begun_models(results: Results) -> tuple[str, list[str]]:
    """Return the model from scratch, and the same model begun in other ways."""
    names = [name for name in dict.fromkeys(run.model for run in results.runs) if " from tokens" in name]
    return (names[0].split(" from tokens")[0] if names else ""), names


def ablations(results: Results) -> str:
    """Return (f): BLT-Entropy with one part changed."""
    base, bits, tflops = ablation_bits(results)
    if not bits:
        return ""
    plain = base.replace(BLT, "bytes")
    without = f"{base}, without tables"
    transformers = [name for name in bits if name.startswith(f"{plain} with")]
    compared = {plain: [base, without, *transformers], base: [name for name in bits if name not in (base, plain)]}
    sentences = [
        versus(theirs, {ours: results.lead(ours, theirs, tflops) for ours in names})
        for theirs, names in compared.items()
    ]
    sentences.append(made_by_tables(results))
    rows = []
    for name, value in bits.items():
        run = results.group(name, tflops)[0]
        cells = [f"{run.parameters / 1e6:.2f}", f"{run.embedding_parameters / 1e6:.2f}", f"{run.patch_size:.2f}"]
        cells += [f"{run.mflops:.2f}", f"{run.trained_bytes / 1e6:.1f}"]
        lead = None if name == base else results.lead(name, base, tflops)
        rows.append([name, *cells, shown(value), marked(lead)])
    head = [
        f"model, {tflops:g} TFLOP",
        "M parameters",
        "of these looked up",
        "bytes a patch",
        "MFLOP a byte",
        "MB read",
    ]
    return page(sentences, table([*head, "bits per byte", f"lead over {base}"], rows))


def made_by_tables(results: Results) -> str:
    """Return sentences on what tables make of BLT-Entropy's lead over bytes, and on what is left for patches."""
    base, _, tflops = ablation_bits(results)
    plain = base.replace(BLT, "bytes")
    without, tables = f"{base}, without tables", f"{plain} with tables"
    pairs = [(base, plain), (without, plain), (base, without), (tables, base)]
    leads = [(pair, lead) for pair in pairs if (lead := results.lead(*pair, tflops)) is not None]
    found = " ".join(verdict(*pair, lead) for pair, lead in leads)
    return f"At {tflops:g} TFLOP: {found}" if found else ""


def ablation_bits(results: Results) -> tuple[str, dict[str, Estimate], float]:
    """Return the name of BLT-Entropy, the bits per byte of all models that are compared, and their TFLOP."""
    changed = [model.name for model in variants()]
    base, tflops = (
        changed[0].split(",")[0],
        max((run.tflops for run in results.runs if run.model in changed), default=0),
    )
    names = [base, base.replace(BLT, "bytes"), *changed] if tflops and results.group(base, tflops) else []
    return base, {name: value for name in names if (value := results.bits(name, tflops)) is not None}, tflops
