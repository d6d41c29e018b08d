"""The first thing that a reader of a run's report wants to know: how good the answers are, who says so, and samples."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.data.formats import strip_lead
from fast_ft.judge import statistics
from fast_ft.judge.kinds import KINDS
from fast_ft.report.html import paragraph
from fast_ft.report.run_data import Run, prompt_scores, reference_of
from fast_ft.run.artifacts import ScoredAnswers, Scores

SAMPLE_CHARACTERS = 600  #: of a sample's prompt or answer; the page has the whole of it under Answers


def result(run: Run) -> str:
    """Return the two scores with their intervals, what was measured and by whom, and three sample answers."""
    scores, parts = run.scores, []
    if scores is None:
        parts = [paragraph("The answers have no score: the recipe asks for no judge, or the judge has not run yet.")]
    else:
        cards = [_card("tuned", "Tuned model", scores, scores)]
        if scores.base is not None:
            cards.append(_card("base", "Base model", scores.base, scores))
        parts.append(f'<div class="scores">{"".join(cards)}</div>')
        if scores.base is not None:
            tuned, base = prompt_scores(scores), {key: each.value for key, each in scores.base.prompts.items()}
            seed = run.recipe.get("seed", 0)  # as `judge` draws, so that both say the same interval
            said = difference(scores, "The tuned model", tuned, "the base model", base, seed)
            parts.append(paragraph(said, "lead"))
        parts.append(paragraph(measure(scores), "hint"))
    return "\n".join([*parts, *_samples(run)])


def measure(scores: Scores) -> str:
    """Return what the scores measure, over how many prompts, and who judged."""
    answers = counted(scores.count or len(scores.prompts), "answer")
    if KINDS[scores.kind].is_share:
        said = f"Measure: the share of {answers} that match the reference answer exactly."
        judge = "Judge: a comparison of the texts (judge.kind: reference); no model judged."
    else:
        low, high = scores.scale or (1, 10)
        said = f"Measure: the mean score of {answers}, from {low:g} to {high:g}; more is better."
        named = ", ".join(scores.answered_by) or scores.model or "an OpenAI-compatible server"
        judge = f"Judge: {named}{f' ({scores.labelled})' if scores.labelled else ''}."
    missing = f" Without a score, and counted nowhere: {counted(scores.missing, 'answer')}." if scores.missing else ""
    return f"{said} {judge}{missing} The 95 % interval tells how far other prompts of the same kind may move a score."


def difference(
    scores: Scores,
    one: str,
    ours: Mapping[str, float | None],
    other: str,
    theirs: Mapping[str, float | None],
    seed: int = 0,
) -> str:
    """Return one sentence on how the scores of `one` differ from those of `other`, both by prompt.

    scores: tells in which unit the judge counts. seed: of the interval's bootstrap.
    """
    found = statistics.compare(ours, theirs, seed, other)
    if not found["count"]:
        return f"{one} and {other} have no prompt in common that has a score in both."
    share = KINDS[scores.kind].is_share
    unit, times, digits = (" percentage points", 100, 0) if share else ("", 1, 2)
    more = f"{abs(found['difference']) * times:.{digits}f}{unit} {'more' if found['difference'] > 0 else 'less'} than"
    said = f"{one} scores {more if found['difference'] else 'the same as'} {other}"
    counts = "better on {wins}, equal on {ties} and worse on {losses} of {count} prompts".format(**found)
    if found["more_than_noise"] is None:
        return f"{said}: {counts}; so few prompts cannot tell a difference from noise."
    low, high = (f"{found[end] * times:+.{digits}f}" for end in ("low", "high"))
    noise = "more than noise" if found["more_than_noise"] else "no more than noise"
    return f"{said}, which is {noise} (95 % interval {low} to {high}{unit}): {counts}."


def shown(scores: Scores, value: float | None) -> str:
    """Return a mean as text: a share in percent, a score with two decimals."""
    if value is None:
        return "–"
    return f"{value:.0%}".replace("%", "\N{NO-BREAK SPACE}%") if KINDS[scores.kind].is_share else f"{value:.2f}"


def interval(scores: Scores, totals: ScoredAnswers) -> str:
    """Return the 95 % interval of a mean, or why there is none."""
    if totals.low is None or totals.high is None:
        values = [each.value for each in totals.prompts.values() if each.value is not None]
        if max(totals.count, len(values)) < statistics.LEAST:
            return "no interval: too few answers"
        same = len(set(values)) <= 1
        return "no interval: all answers have the same score" if same else "no interval: scores.json has none"
    return f"95 % interval {shown(scores, totals.low)} to {shown(scores, totals.high)}"


def _card(kind: str, name: str, totals: ScoredAnswers, scores: Scores) -> str:
    return (
        f'<div class="big {kind}"><h3>{html.escape(name)}</h3><p class="value">{shown(scores, totals.mean)}</p>'
        f'<p class="soft">{html.escape(interval(scores, totals))}</p></div>'
    )


def _samples(run: Run) -> Iterator[str]:
    """Yield three prompts with their answers: those of the lowest, the middle and the highest score."""
    if not run.pred:
        return
    value = prompt_scores(run.scores)
    scored = sorted((key for key in run.pred if value.get(key) is not None), key=lambda key: value[key] or 0.0)
    keys = scored if len(scored) >= 3 else list(run.pred)
    places = sorted({0, len(keys) // 2, len(keys) - 1}) if keys is scored else range(min(3, len(keys)))
    how = "those of the lowest, the middle and the highest score" if keys is scored else "the first prompts"
    yield "<h3>Sample answers</h3>"
    yield paragraph(f"Of {len(run.pred):,}, {how}; all of them stand under Answers.", "hint")
    yield f'<div class="samples">{"".join(_sample(run, keys[place]) for place in places)}</div>'


def _sample(run: Run, key: str) -> str:
    cells: list[tuple[str, str, str | None, Any]] = []
    if key in run.base:
        cells.append(("base", "Base model", run.base[key].answer, run.scores.base if run.scores else None))
    cells.append(("tuned", "Tuned model", run.pred[key].answer, run.scores))
    reference = reference_of(run.references, key, run.pred[key]) if run.references else None
    if reference is not None:
        cells.append(("reference", "Reference", reference, None))
    said = "".join(
        f'<dt class="{kind}">{name}{_mark(run.scores, of, key)}</dt><dd class="text">{_text(text or "(empty)")}</dd>'
        for kind, name, text, of in cells
    )
    question = _text(strip_lead(run.pred[key].question))
    return f'<article class="sample"><p class="prompt-text text">{question}</p><dl>{said}</dl></article>'


def _mark(scores: Scores | None, of: Any, key: str) -> str:
    """Return an answer's own score as markup: right or wrong of an exact match, else the number."""
    value = of.prompts[key].value if of is not None and key in of.prompts else None
    if scores is None or value is None:
        return ""
    right = {1.0: "✓ exact", 0.0: "✗ not exact"}
    said = right.get(value, f"{value:g}") if KINDS[scores.kind].is_share else f"{value:g}"
    return f' <span class="score">{html.escape(said)}</span>'


def _text(text: str) -> str:
    return html.escape(text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} […]")
