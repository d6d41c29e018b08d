"""Do the kernels of training and decoding work on this card, and which way will a run take because of it?"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from fast_ft.common.redaction import redacted
from fast_ft.doctor import child, versions
from fast_ft.doctor.findings import Finding
from fast_ft.doctor.kernel_trial import ATTENTION, BLOCKS, DECODING, INSTALLED, PRODUCTS, UNPACKING, UNSLOTH
from fast_ft.plan import cards

_ORDER = ("fused", "unsloth", "peft")  #: of the ways of training, where the card's capability is not known
MODULE = "fast_ft.doctor.kernel_trial"
_OFF = 0.02  #: by which a product may differ from the one with dequantised weights, of its norm: bf16 leaves 0.005
SECONDS = 400  #: each kernel is compiled, and unsloth is imported
_INSTALL = f"{versions.install(gpu=True)}; if that does not mend it, report this output, please"
_WITHOUT_OURS = "model.backend=peft needs none of our kernels; report this output, please"
_REMEDIES = {
    ATTENTION: f"every way of training needs it: {_INSTALL}",
    BLOCKS: f"model.backend=auto goes another way by itself; {_WITHOUT_OURS}",
    UNPACKING: _WITHOUT_OURS,
    INSTALLED: f"model.backend=auto goes another way by itself; {_WITHOUT_OURS}",
    PRODUCTS: _INSTALL,
    DECODING: "see it whole: python -m fast_ft.doctor.kernel_trial; report this output, please",
}
#: Without these a run fails, or would go wrong unnoticed, since its start does not look at them.
_BROKEN = (ATTENTION, UNPACKING, DECODING)


def examine(card: dict[str, str] | None) -> Iterator[Finding]:
    """Run all checks on the card, in a process of their own, and yield what they found; without a card, one line."""
    if card is None:
        yield Finding("kernels", "note", "no NVIDIA GPU: the kernels of training and decoding cannot be checked here")
        return
    done = child.run(MODULE, SECONDS)
    yield from judged([json.loads(line) for line in done.out.splitlines() if line.startswith("{")], _end_of(done))


def _end_of(done: child.Done) -> str:
    """Return how a process ended before its end, in words; nothing where it came to its end."""
    if done.status is None:
        return f"it was not done after {SECONDS} s"
    if done.status < 0:
        return f"the process was ended by {signal.Signals(-done.status).name}"
    return f"the process ended with status {done.status}: {redacted(done.last_line)}" if done.status else ""


def judged(lines: list[dict[str, Any]], ended: str = "") -> Iterator[Finding]:
    """Yield what the lines of kernel_trial mean. `ended`: how its process ended before its end; nothing: it did not."""
    problems = {line["check"]: line["problem"] for line in lines if "check" in line}
    facts: dict[str, Any] = next((line for line in lines if "dtype" in line), {})
    if ended:
        begun = next((line["begins"] for line in reversed(lines) if "begins" in line), None)
        if begun is None:
            remedy = "mend what is broken above; else see it whole: python -m " + MODULE
            yield Finding("kernels", "broken", f"could not be checked: {ended}", remedy)
            return
        problems[begun] = ended
    ours = {name: problem for name, problem in problems.items() if name != UNSLOTH}
    if passed := [name for name, problem in ours.items() if problem is None]:
        as_dtype = f" in {facts['dtype']}" if facts else ""
        yield Finding("kernels", "fine", f"as plain torch or bitsandbytes has it{as_dtype}: {', '.join(passed)}")
    for name, problem in ours.items():
        if problem is not None:
            needed = name in _BROKEN or (name == PRODUCTS and not (facts.get("decoding") or {}).get("planes"))
            level = "broken" if needed else "warning"
            yield Finding("kernels", level, f"{name}: {problem}", _REMEDIES[name])  # type: ignore[arg-type]
    capability = facts.get("capability")
    order = cards.by_evidence((capability[0], capability[1]))[0] if capability else _ORDER
    yield training(problems, order)
    if facts.get("decoding"):
        yield decoding(facts["decoding"])
    if timed := facts.get("products"):
        yield Finding("4-bit products", "note", "; ".join(_times(timed)))


def _times(timed: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a clause for each product: what each way takes, or why it fails."""
    products: dict[tuple[int, int, int], list[str]] = {}
    for each in timed:
        says = f"fails ({each['failed']})" if "failed" in each else f"{each['us']:.0f} us"
        if each.get("off", 0) > _OFF:
            says += f", wrong by {each['off']:.3f}"
        products.setdefault((each["outputs"], each["inputs"], each["rows"]), []).append(f"{each['way']} {says}")
    for (outputs, inputs, rows), ways in products.items():
        yield f"{outputs} x {inputs}, {rows} rows: {', '.join(ways)}"


def training(problems: dict[str, str | None], order: Sequence[str] = _ORDER) -> Finding:
    """Return which way a recipe with model.backend=auto trains here, given each check's problem or None, and why.

    `order` is that of the ways by the evidence on such a card.
    """
    if order[0] == "unsloth" and problems.get(UNSLOTH, "it was not tried") is None:
        return _through_unsloth(problems)
    for name in (ATTENTION, UNPACKING):  # at which a run's start does not look
        if (problem := problems.get(name, "not checked")) is not None:
            text = f"through our own blocks (fused), which would go wrong here: {name}: {problem}"
            return Finding("training", "broken", text, _REMEDIES[name])
    other = problems.get(UNSLOTH, "it was not tried")
    ours = problems.get(BLOCKS, "not checked") or problems.get(INSTALLED, "not checked")
    if ours is None:
        can = "can be chosen" if other is None else f"cannot be chosen ({other})"
        text = f"through our own blocks (fused), whose kernels work here; model.backend=unsloth {can}"
        return Finding("training", "fine", text)
    if other is None:
        return Finding("training", "note", f"through Unsloth, since our own blocks (fused) cannot be relied on: {ours}")
    text = (
        f"through PEFT, more slowly: our own blocks (fused) cannot be relied on ({ours}), and Unsloth fails ({other})"
    )
    return Finding("training", "warning", text, f"for Unsloth's kernels: {versions.install(gpu=True)}")


def _through_unsloth(problems: dict[str, str | None]) -> Finding:
    """Return what the checks say of training through Unsloth, which comes first on this card and imports."""
    if (problem := problems.get(ATTENTION, "not checked")) is not None:  # its layout is ours
        return Finding(
            "training",
            "broken",
            f"through Unsloth, which would go wrong here: {ATTENTION}: {problem}",
            _REMEDIES[ATTENTION],
        )
    ours = next(
        (problem for name in (BLOCKS, UNPACKING, INSTALLED) if (problem := problems.get(name, "not checked"))), ""
    )
    can = f"cannot be relied on ({ours})" if ours else "can be chosen"
    return Finding("training", "fine", f"through Unsloth, by the evidence on such cards; model.backend=fused {can}")


def decoding(facts: dict[str, Any]) -> Finding:
    """Return which way answers are decoded here, and why: `facts` are kernel_trial's of decoding."""
    why = "; ".join(facts["notes"])
    if facts["planes"]:
        by = facts.get("few_rows") or "Triton's kernel"
        return Finding(
            "decoding", "fine", f"4-bit weights are decoded in registers by {by}, Triton kernels of ours do the rest"
        )
    if facts["triton"]:
        return Finding("decoding", "note", f"bitsandbytes multiplies, Triton kernels of ours do the rest: {why}")
    return Finding("decoding", "warning", f"bitsandbytes multiplies, plain torch does the rest: {why}", _INSTALL)
