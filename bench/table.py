"""A result as Markdown and as a picture. Both name refused comparisons and emulated set-ups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import compare, emulation
from fast_ft.common.atomic_files import write_text
from fast_ft.plan import cards

_RATES = ("way", "tokens/s (quartiles)", "over all steps", "fast_ft is", "peak GiB")
_TIMES = ("first step", "first epoch", "import to first step", "command to adapter")
_COLOURS = {
    "fast_ft": "#d1495b", "unsloth-notebook": "#30638e", "unsloth-notebook-as-is": "#8fb8de", "trl-peft": "#777777",
    "unsloth-budget": "#edae49", "unsloth-budget-kept": "#66a182", "fast_ft-unsloth": "#a23b72",
}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    settings = result["settings"]
    tokens = sum(settings["tokens_per_step"][: settings["steps_per_epoch"]])
    lines = [
        f"# Training, {settings['card']}",
        "",
        f"{settings['rows']} rows in {settings['order']}, {tokens:,} tokens an epoch; effective batch "
        f"{settings['effective_batch_size']}, r = {settings['lora']['r']}, {settings['dtype']}, "
        f"{settings['train']['optim']}, a schedule of {settings['schedule_steps']} steps. Base model: "
        f"{settings['base']}{', quantised beforehand' if settings['prequantised'] else ''}. Tokens/s: median and "
        f"quartiles of the steps after {compare.WARM_UP} of warm-up. A ratio is of medians, over the steps that both "
        "ran, and stands only where trained ids are equal in each step, the first gradients agree (cosine >= "
        f"{compare.COSINE}) and the loss fell by the same (within {compare.LOSS_DROP:.0%}). On random weights the loss "
        "falls too: rows are memorised.",
    ]
    for name, parts in result["setups"].items():
        lines += ["", f"## {title(name, parts)}", "", *_table(settings, parts, name), "", *_notes(settings, parts)]
    if checks := result.get("plan_checks"):
        lines += ["", "## Plans against what was measured", "", *plan_table(checks["cases"])]
    return "\n".join(lines).rstrip() + "\n"


def title(name: str, parts: dict[str, Any]) -> str:
    """Return the heading of a set-up: the whole card or the emulation, with its memory."""
    cap = next((part["cap_gib"] for part in parts.values() if part.get("cap_gib")), None)
    limit = f", {cap:g} GiB" if cap else ""
    if name == "whole":
        return f"The whole card{limit}"
    sms = next((part["sms"] for part in parts.values() if part.get("sms")), "?")
    return f"{emulation.LABEL} ({sms} SMs{limit})"


def _table(settings: dict[str, Any], parts: dict[str, Any], name: str) -> list[str]:
    emulated = name != "whole"
    columns = _RATES if emulated else _RATES + _TIMES  # an emulation's seconds are nobody's
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for way in compare.ordered(list(parts)):
        part = parts[way]
        if part.get("out_of_memory"):
            lines.append(f"| {way} | out of memory |" + " |" * (len(columns) - 2))
            continue
        speed = compare.tokens_per_s(settings, part)
        epochs = compare.epoch_seconds(settings, part)
        peak = part["peak_reserved_gib"] + part["context_after_gib"]
        whole = len(part["steps"]) == settings["schedule_steps"]
        cells = [
            way,
            f"{speed['median']:,.0f} ({speed['quartiles'][0]:,.0f} to {speed['quartiles'][1]:,.0f})" if speed else "",
            f"{speed['total']:,.0f}" if speed else f"{len(part['steps'])} steps only",
            _ratio_cell(settings, parts, way) + (f" ({emulation.LABEL})" if emulated and way != "fast_ft" else ""),
            f"{peak:.1f}" if part["cap_gib"] else "",
            f"{part['steps'][0]['seconds']:.1f} s",
            f"{epochs[0]:.1f} s" if epochs else "",
            f"{compare.seconds_to_first_step(part):.1f} s",
            f"{part['stamps']['saved']:.0f} s" if whole else f"({len(part['steps'])} steps)",
        ]
        lines.append("| " + " | ".join(cells[: len(columns)]) + " |")
    return lines


def _ratio_cell(settings: dict[str, Any], parts: dict[str, Any], way: str) -> str:
    if way == "fast_ft" or "fast_ft" not in parts:
        return ""
    found = compare.ratio(settings, parts["fast_ft"], parts[way])
    if found["refused"]:
        return "not compared: " + "; ".join(found["refused"])
    return f"**{found['ratio']:.2f}** times" + ("" if found["one_run"] else " (two runs)")


def _notes(settings: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    lines = []
    rates = next((part["rates"] for part in parts.values() if part.get("rates")), None)
    if rates:
        t4 = cards.card("t4")
        lines.append(
            f"Measured here: {rates['tflops']:.0f} TFLOP/s in a large fp16 product, {rates['gb_per_s']:.0f} GB/s in a "
            f"copy. A T4 keeps up {t4.product:g} TFLOP/s in a large product and {t4.gb_per_s:g} GB/s, by what others "
            "published."
        )
    ours = parts.get("fast_ft")
    if ours and not ours.get("out_of_memory"):
        speed, top = compare.tokens_per_s(settings, ours), compare.ceiling(settings, ours)
        if speed and top:
            share = speed["median"] / top["tokens_per_s"]
            lines.append(
                f"Ceiling at that rate, nothing computed twice ({top['gflop_per_token']:.1f} GFLOP a token): "
                f"{top['tokens_per_s']:,.0f} tokens/s; fast_ft reaches {share:.0%} of it."
            )
        epochs = compare.epoch_seconds(settings, ours)
        if len(epochs) >= 3:
            lines.append(f"fast_ft's epochs: {', '.join(f'{each:.2f}' for each in epochs)} s.")
    return [text for line in lines for text in (line, "")]


def plan_table(cases: dict[str, Any]) -> list[str]:
    """Return the rows of planned against measured."""
    lines = ["| run | planned GiB | measured | error | planned s a step | measured | error |", "|---" * 7 + "|"]
    for name, case in cases.items():
        if case.get("out_of_memory"):
            lines.append(f"| {name} | {case['planned_gib']:.2f} | out of memory | | | | |")
            continue
        if not case["planned_gib"]:
            lines.append(f"| {name} | nothing is planned on a CPU | | | | {case['measured_seconds']:.3f} | |")
            continue
        lines.append(
            f"| {name} | {case['planned_gib']:.2f} | {case['measured_gib']:.2f} | {_off(case, 'gib'):.1%} | "
            f"{case['planned_seconds']:.3f} | {case['measured_seconds']:.3f} | {_off(case, 'seconds'):.1%} |"
        )
    return lines


def _off(case: dict[str, Any], what: str) -> float:
    return abs(case[f"planned_{what}"] / case[f"measured_{what}"] - 1)


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw tokens/s of each step, one panel for each set-up, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    settings, setups = result["settings"], result["setups"]
    figure, axes = pyplot.subplots(1, len(setups), figsize=(6.5 * len(setups), 4.2), squeeze=False)
    for axis, (name, parts) in zip(axes[0], setups.items(), strict=True):
        for way in compare.ordered(list(parts)):
            steps = parts[way]["steps"]
            rates = [t / s["seconds"] for t, s in zip(settings["tokens_per_step"], steps, strict=False)]
            width = 2.2 if way == "fast_ft" else 1.3
            axis.plot(range(1, len(rates) + 1), rates, label=way, linewidth=width, color=_COLOURS.get(way))
        axis.axvspan(0.5, compare.WARM_UP + 0.5, color="0.93", zorder=0, label="warm-up")
        axis.set(title=title(name, parts), xlabel="optimizer step", ylabel="tokens/s", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{settings['card']}, {settings['base']}, {settings['rows']} rows")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write(result: dict[str, Any], path: Path) -> None:
    """Write NAME.md and NAME.png beside NAME.json."""
    write_text(path.with_suffix(".md"), markdown(result))
    if result["setups"]:
        picture(result, path.with_suffix(".png"))
