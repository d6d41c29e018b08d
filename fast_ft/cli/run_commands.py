"""What the commands do that take a finished run, in a folder or a zip; see cli/commands.py for the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import harmless


def _generate(options: argparse.Namespace) -> int:
    from fast_ft.common.console import note
    from fast_ft.pipeline.rerun import generate_again

    asked = [name for name in ("grid", "prompt", "prompts") if getattr(options, name)]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]}: give one of them")
    if options.output is not None and asked in ([], ["grid"]):
        raise InputError("--output: it is the file of other prompts' answers: give --prompts FILE or --prompt TEXT too")
    if options.prompt is not None or options.prompts is not None:
        return _answer_apart(options)
    if options.grid:
        from fast_ft.pipeline.decode_grid import grid

        with contextlib.redirect_stdout(sys.stderr):
            points = grid(options.run, options.overrides)
        for point in points:
            ended, tokens = point["ended_at_eos"], point["mean_tokens"]
            scores = f"  exact {point['exact_match']:.0%}  ROUGE-L {point['rouge_l']:.2f}" if "rouge_l" in point else ""
            print(f"{options.run}/{point['file']}  ended at EOS {ended:.0%}  mean {tokens:g} tokens{scores}")
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        pred = generate_again(options.run, options.overrides)
    note(f"done: {pred}")
    return 0


def _answer_apart(options: argparse.Namespace) -> int:
    from fast_ft.common.console import note
    from fast_ft.pipeline.answer_apart import answer_apart

    if options.prompts is not None and options.output is None:
        raise InputError("--prompts: where do the answers go? Give --output FILE too")
    output = Path(options.output) if options.output is not None else None
    with contextlib.redirect_stdout(sys.stderr):
        answers = answer_apart(options.run, options.overrides, options.prompts, options.prompt, output)
    if output is None:
        for entry in answers.values():
            print(harmless("\n\n".join(entry["output"])))
    else:
        note(f"done: {output}")
    return 0


def _chat(options: argparse.Namespace) -> int:
    from fast_ft.cli.chat import chat

    chat(options.run, options.overrides)
    return 0


def _judge(options: argparse.Namespace) -> int:
    from fast_ft.cli.show_scores import print_scores
    from fast_ft.pipeline.rerun import judge_again

    folder = judge_again(
        options.run,
        options.overrides,
        against=options.against,
        dry_run=options.dry_run,
        ask_again=options.ask_again,
    )
    if not options.dry_run:
        print_scores(folder)
    return 0


def _report(options: argparse.Namespace) -> int:
    from fast_ft.common.console import note
    from fast_ft.hub.download import nothing_fetched
    from fast_ft.report.write import write_comparison, write_report
    from fast_ft.run.folder import RunDir

    if options.overrides:
        raise InputError(f"{options.overrides[0]!r}: a report takes run folders only.")
    if options.output is not None and len(options.runs) == 1:
        raise InputError("--output: it is the page of several runs; one run's page is report.html in its folder")
    folders = [RunDir.at(run) for run in options.runs]
    with nothing_fetched():
        if len(folders) == 1:
            page = write_report(folders[0])
        else:
            page = write_comparison(folders, Path(options.output or "comparison.html"))
    note(f"{page} holds training rows and predictions: keep it to yourself")
    return 0


def _watch(options: argparse.Namespace) -> int:
    from fast_ft.report.server import serve
    from fast_ft.report.watch import watch_page, watcher
    from fast_ft.run.folder import RunDir

    folder = RunDir.at(options.run)
    serve(watch_page(folder), watcher(folder))
    return 0


def _runs(options: argparse.Namespace) -> int:
    from fast_ft.cli.parser import RUNS
    from fast_ft.cli.show_runs import as_json, print_runs, prune_runs
    from fast_ft.homework.ledger import read

    root = Path(options.root)
    if options.root != RUNS and not root.is_dir():
        raise InputError(f"{root}: there is no such folder. Give a folder that holds run folders (default: runs)")
    if options.yes and not options.prune:
        raise InputError("--yes: it answers the question of --prune: give --prune too")
    if options.prune and (options.json or options.all):
        raise InputError(
            f"--prune: it deletes runs, and lists nothing: leave --{'json' if options.json else 'all'} out"
        )
    ledger = read(root)
    if options.prune:
        prune_runs([attempt.run for attempt in ledger.attempts], root, unasked=options.yes)
    elif options.json:
        print(harmless(json.dumps(as_json(ledger), indent=2, ensure_ascii=False)))
    else:
        print_runs(ledger, root, all_runs=options.all)
    return 0


def _export(options: argparse.Namespace) -> int:
    from fast_ft.common.console import note
    from fast_ft.export.export import Export
    from fast_ft.models.loaders.choose import prepare_libraries

    if (options.to == "hub") != (options.repo is not None):
        raise InputError("--repo OWNER/NAME names the repository, and goes with --to hub")
    if options.to != "hub" and (options.push or options.merged):
        raise InputError("--push and --merged go with --to hub")
    prepare_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        export = Export.of(options.run, base=options.base, output=options.output, dtype=options.dtype)
        if options.to == "hub":
            done = export.hub(options.repo, whole=options.merged, push=options.push)
        elif options.to == "merged":
            done = str(export.merged_model())
        else:
            done = str(export.gguf(options.outtype) if options.to == "gguf" else export.ollama(options.outtype))
    note(f"done: {done}")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from fast_ft.common.console import note
    from fast_ft.homework import checks
    from fast_ft.homework.package import print_verdicts, submit
    from fast_ft.run.folder import RunDir

    folder = RunDir.at(options.run)
    if options.public_score is not None:
        from fast_ft.homework.ledger import record

        for sentence in record(folder, options.public_score, options.at):
            note(sentence)
        if options.student_id is None:
            note(f"done: {options.public_score:g} noted for {folder.root}")
            return 0
    elif options.at is not None:
        raise InputError("--at: it is the time of a public score: give --public-score too")
    if options.student_id is not None:
        note(f"done: {submit(folder, options.student_id, Path(options.output))}")
        return 0
    print_verdicts(verdicts := checks.check(folder))
    return 2 if checks.broken(verdicts) else 0


def _reproduce(options: argparse.Namespace) -> int:
    from fast_ft.homework.reproduce import reproduce

    result = reproduce(
        Path(options.zip),
        train=options.train,
        test=options.test,
        model=options.model,
        tokenizer=options.tokenizer,
        output=Path(options.output) if options.output else None,
    )
    return 0 if result["adapter"] and result["identical"] == result["answers"] else 3


COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "judge": _judge,
    "report": _report,
    "watch": _watch,
    "runs": _runs,
    "export": _export,
    "submit": _submit,
    "reproduce": _reproduce,
}
