"""python -m bench RECIPE [key=value ...]: measure on this machine, and keep what was measured in bench/results/.

Parts, for --only:

    fast_ft, fast_ft-unsloth, unsloth-notebook, trl-peft and the other ways of bench/peer_table.py
                 training the recipe's rows this way; fast_ft-unsloth: Unsloth's layers in our passes
    train        fast_ft and the ways that it is compared with: unsloth-notebook, unsloth-budget, trl-peft
    plan-checks  five short runs, which compare planned memory and time with what is measured
    budget       minutes of the homework's recipes on a T4, beside what the homework allows
    recipe       the whole recipe from command to pred.json, through each backend

--quick --submit-file: ten minutes on your card, without a download, and one file to send (docs/t4.md).

Commands of their own: bench.best_peer (other libraries at their best), bench.whole_compare (whole commands, ours and a
peer's), bench.whole_run (a recipe's whole command, cold and warm), bench.start_up (command to first step),
bench.former (against a former commit), bench.host_share (a step's profile), bench.host_memory, bench.export_cost,
bench.step_trace (the functions of one pass), bench.decode, bench.sweep, bench.pocket, bench.quickstart, bench.smollm,
bench.decode_cpu, bench.decode_kv (an 8-bit cache on a real model), bench.real (three ways on a real model, or ways of
choosing rows), bench.int8_products (int8 in place of fp16, on a real model), bench.calibration (the plan's T4 beside
published runs). For the plan's constants: bench.plan_bases, bench.plan_samples, bench.plan_fit; bench.prequantised
writes a 4-bit base. Raw samples hold card, date and commit; --adopt makes figures of them.

The default is train. trl-peft:18 runs 18 steps of that part's schedule, whatever --steps says. A part that the result
holds already, measured on the same rows with the same arguments, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import (
    budget,
    calibration,
    card_file,
    choices_figures,
    compare,
    decode_cpu,
    decode_figures,
    decode_kv,
    emulation,
    export_cost,
    figures,
    former,
    headers,
    host_memory,
    host_share,
    machine,
    peer_figures,
    plan_checks,
    pocket,
    prose,
    real,
    recipe_run,
    sm75,
    smollm,
    start_up,
    submit_file,
    sweep,
    table,
    training,
    whole_compare,
    whole_run,
)
from fast_ft.common import gpu
from fast_ft.common.atomic_files import write_json, write_text
from fast_ft.common.errors import InputError
from fast_ft.doctor import measured

RECIPE = str(Path(__file__).parent / "recipes" / "first-100.yaml")
PARTS = (*training.WAYS, "train", "plan-checks", "budget", "recipe")
QUICK = ("fast_ft", "unsloth-notebook")
#: Rows of some 270 tokens, six epochs of three steps: less than ten minutes on a T4, by what published runs reached.
QUICK_ROWS = ("select.rank_by.conversation_tokens=-1.0", "select.take=24", "train.num_train_epochs=6")


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_intermixed_args(given)
    if options.recipe and "=" in options.recipe:  # an override, and no recipe before it
        options.recipe, options.overrides = None, [options.recipe, *options.overrides]
    options.command = shlex.join(["python", "-m", "bench", *given])
    try:
        if options.readme:
            for document in prose.documents():
                write_text(document, prose.rendered(document))
            for recipe in headers.recipes():
                write_text(recipe, headers.rendered(recipe))
            write_json(measured.FILE, figures.measured())
        elif options.adopt:
            adopt(options.adopt)
        elif options.submit_file is not None and options.quick:
            return measure_card(card_file.order(options))
        elif options.submit_file is not None:
            print(submit_file.write(options.submit_file or None, options.results))
        elif options.recipe or options.only or options.quick or options.emulate:
            measure(options)
        else:
            parser.error("a recipe, --only, --quick, --submit-file, --readme or --adopt is needed")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished parts are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def measure_card(order: card_file.Order) -> int:
    """Say what will be measured, measure it, and say where its file goes; return the exit status."""
    card = gpu.gpu()
    print(card_file.announcement(order, card["name"] if card else "this machine"), flush=True)
    content = card_file.measure(order)
    print(card_file.how_to_send(order, content))
    return 130 if content["stopped"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="default: bench/recipes/first-100.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--only", metavar="PARTS", help="of the parts above, separated by commas")
    parser.add_argument("--quick", action="store_true", help="fast_ft and unsloth-notebook, 24 short rows, 18 steps")
    parser.add_argument("--steps", type=int, help="the number of steps of the schedule to run; default: all")
    parser.add_argument("--emulate", choices=["t4"], help=f"{emulation.LABEL}: memory, attention, SMs; ratios only")
    parser.add_argument("--sms", type=int, default=8, help="with --emulate: SMs left; default: %(default)s")
    parser.add_argument("--cap", type=float, default=emulation.T4_GIB, help="GiB, context included; 0: no cap")
    parser.add_argument("--again", action="store_true", help="measure parts again that are there already")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one part's process")
    parser.add_argument("--name", help="the result's name; default: the recipe's")
    parser.add_argument("--results", type=Path, default=figures.RESULTS, help="folder for results and logs")
    parser.add_argument("--backends", help="part recipe: through these; alone it asks for that part")
    parser.add_argument("--adopt", type=Path, metavar="JSON", help="take a result's figures into figures.json")
    parser.add_argument("--readme", action="store_true", help="render what documents, recipes and the doctor cite")
    parser.add_argument(
        "--submit-file",
        nargs="?",
        const="",
        metavar="NAME",
        help="one anonymous JSON to send back: of a result, or with --quick of ten minutes on this card",
    )
    return parser


def measure(options: argparse.Namespace) -> None:
    """Measure each part asked for."""
    parts = _parts(options)
    recipe = options.recipe or RECIPE
    name = options.name or Path(recipe).stem + ("-quick" if options.quick else "")
    where = training.setup(options.emulate, options.sms, options.cap)
    overrides = [*(QUICK_ROWS if options.quick else ()), *options.overrides]
    order = training.Order(
        options.results / f"{name}-train.json", recipe, overrides, where,
        timeout=options.timeout, again=options.again, command=options.command,
    )  # fmt: skip
    if ways := {part: own or options.steps for part, own in parts.items() if part in training.WAYS}:
        result = training.measure(order, ways)
        table.write(result, order.path)
        print(table.markdown(result))
    if "plan-checks" in parts:
        result = plan_checks.measure(replace(order, path=options.results / f"{name}-plans.json"))
        print("\n".join(table.plan_table(result["cases"])))
    if "budget" in parts:
        found = budget.measure(overrides, options.results) | {"command": budget.command_of(options.command)}
        write_json(options.results / f"{options.name or 't4'}-minutes.json", found)
        print(budget.markdown(found))
    if "recipe" in parts:
        measure_recipe(options, recipe, name)


def _parts(options: argparse.Namespace) -> dict[str, int | None]:
    """Return the parts asked for, each with a number of steps of its own, or None."""
    if options.only is None and options.backends:
        return {"recipe": None}
    default = ",".join(QUICK) if options.quick else "train"
    found: dict[str, int | None] = {}
    for asked in (options.only or default).split(","):
        part, _, steps = asked.partition(":")
        if part not in PARTS or not (steps == "" or (steps.isdecimal() and int(steps))):
            raise InputError(f"--only: {asked!r} is none of {', '.join(PARTS)}; PART:18 runs 18 steps of it.")
        for way in training.JUDGED if part == "train" else (part,):
            found[way] = int(steps) if steps else None
    return found


def measure_recipe(options: argparse.Namespace, recipe: str, name: str) -> None:
    """Measure the recipe through each backend, one NAME-BACKEND.json each, and print one JSON line each."""
    for backend in (options.backends or ",".join(recipe_run.BACKENDS)).split(","):
        log = options.results / "logs" / f"{name}-{backend}.log"
        result = recipe_run.measure(recipe, options.overrides, backend, log)
        write_json(options.results / f"{name}-{backend}.json", result)
        print(json.dumps({"name": f"{name}-{backend}", **{key: value for key, (value, _) in headline(result).items()}}))


def adopt(path: Path) -> None:
    """Put the figures of a result in bench/results/ into figures.json."""
    if path.parent.resolve() != figures.RESULTS.resolve():
        raise InputError(f"{path}: put it into {figures.RESULTS} first: figures.json points at it by name")
    result = json.loads(path.read_text(encoding="utf-8"))
    values = figures_of(result)
    if not values:
        raise InputError(f"{path}: nothing in it may become a figure; its Markdown table says why")
    figures.record(values, result, source=path.name)


def figures_of(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)} of a result of any kind, computed from its raw samples.

    Names carry the card by the result's own word, whatever its file is called.
    """
    kind = result.get("kind", "recipe" if "backend" in result else "pocket")
    if kind == "recipe":
        (recipe,) = (Path(word).stem for word in shlex.split(result["command"]) if word.endswith(".yaml"))
        name = f"recipe.{recipe}-{machine.slug_of(result)}-{result['backend']}"
        return {f"{name}.{key}": value for key, value in headline(result).items()}
    by_kind = {
        "train": compare.figures, "plans": plan_checks.figures, "decode": decode_figures.figures,
        "pocket": pocket.headline, "sweep-pocket": sweep.headline, "sweep-cards": sweep.headline,
        "run": whole_run.figures, "published-t4": calibration.figures, "sm75": sm75.figures,
        "start": start_up.figures, "host": host_memory.figures, "decode-cpu": decode_cpu.headline,
        "peers": peer_figures.figures, "whole": whole_compare.figures, "decode-kv": decode_kv.headline,
        "former": former.figures, "host_share": host_share.figures,
        "real": real.headline, "smollm": smollm.headline, "export": export_cost.figures,
        "choices": choices_figures.headline,
    }  # fmt: skip
    return by_kind[kind](result)


def headline(run: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)} of one recipe's run, computed from its raw steps."""
    train, generate = run["train"], run["generate"]
    later = run["steps"][len(run["steps"]) // 2 :]  # the second half: nothing compiles there any more
    speed = sum(step["tokens"] for step in later) / sum(step["seconds"] for step in later)
    return {
        "minutes": (round(run["wall_seconds"] / 60, 2), "min, command to pred.json"),
        "train_tokens_per_s": (round(speed, 1), "tokens/s, second half of the steps"),
        "train_peak_gib": (train["peak_gib"], "GiB reserved"),
        "decode_tokens_per_s": (round(generate["new_tokens"] / generate["decoding_seconds"], 1), "new tokens/s"),
        "adapter_in_plain_peft_nats": (run["adapter_in_plain_peft_nats"], "nats per token, mean difference"),
    }


if __name__ == "__main__":
    sys.exit(main())
