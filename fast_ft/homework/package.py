"""Hand in a run: check it, and write `<student id>_hw5.zip` with what is needed to do it again, and nothing else.

What goes in is listed here by name, not what stays out: program, requirements, recipes, the resolved recipe, manifest,
pred.json, REPRODUCE.md. Everything is scanned for keys. The same run gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import yaml

from fast_ft.common import atomic_files, redaction
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.common.wording import counted
from fast_ft.homework import checks, secret_scan
from fast_ft.recipe import key_owners
from fast_ft.run import provenance
from fast_ft.run.folder import RunDir
from fast_ft.run.made_with import as_made

ROOT = provenance.PACKAGE.parent
#: A letter, the year, a department of three (its first may be a letter, as in r12k41005), a number of three.
STUDENT_ID = re.compile(r"[a-z][0-9]{2}[0-9a-z][0-9]{5}")
#: Beside the package: what stands in the repository's root, where there is one.
BESIDE = ("requirements*.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md", "recipes/*.yaml")
_DATE = (2025, 1, 1, 0, 0, 0)


def submit(folder: RunDir, student_id: str, target: Path) -> Path:
    """Write the zip into folder `target` and return its path; InputError where a rule is broken or a key found."""
    name = checked_id(student_id)
    print_verdicts(verdicts := checks.check(folder))
    if failed := checks.broken(verdicts):
        count = f"{len(failed)} rule{'s are' if len(failed) > 1 else ' is'} broken"
        raise InputError(f"{name}_hw5.zip was not written: {count}: {', '.join(each.rule for each in failed)}")
    if folder.recipe().rules is None:
        note("note: the recipe does not name the homework's rules: this can be packed and done again, not handed in")
    if hits := folder.manifest()["leakage"]["hits"]:
        note(
            f"note: a test prompt's text is in {counted(len(hits), 'row')}; the certificate in manifest.json names them"
        )
    files = contents(folder, name)
    refuse_secrets(files)
    path = target / f"{name}_hw5.zip"
    atomic_files.write_bytes(path, packed(files, f"{name}_hw5"))
    return path


def checked_id(student_id: str) -> str:
    """Return the student id in lower case; InputError where it has another form."""
    lower = student_id.strip().lower()
    if not STUDENT_ID.fullmatch(lower):
        raise InputError(f"--student-id {student_id!r}: a student id has a letter and eight more, as b12901001 has")
    return lower


def print_verdicts(verdicts: list[checks.Verdict]) -> None:
    """Print each rule with pass, FAIL or --, and what was found."""
    words = {True: "pass", False: "FAIL", None: "--"}
    for verdict in verdicts:
        print(f"{words[verdict.passed]:4}  {verdict.rule:19}  {escaped(verdict.text)}")


def contents(folder: RunDir, name: str) -> dict[str, bytes]:
    """Return {path in the zip: content}, in order of path."""
    manifest = folder.manifest()
    if "plan" not in manifest:  # a run of an older version
        manifest["plan"] = json.loads(folder.plan.read_text(encoding="utf-8"))
    answered = as_made(manifest) | {"judge": manifest["recipe"]["judge"]}
    files = {
        "manifest.json": _json(manifest),
        "pred.json": folder.pred.read_bytes(),
        "recipe.yaml": yaml.safe_dump(answered, sort_keys=False, allow_unicode=True).encode(),
        "REPRODUCE.md": instructions(manifest, name).encode(),
    }
    for path in provenance.source_files():
        files[f"fast_ft/{path.relative_to(provenance.PACKAGE).as_posix()}"] = path.read_bytes()
    for pattern in BESIDE:
        for path in ROOT.glob(pattern):
            files[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    if "requirements-cpu.txt" not in files:  # installed as a package: the versions that the run had
        versions = manifest["environment"]["packages"].items()
        files["requirements.txt"] = "".join(f"{key}=={value}\n" for key, value in versions if value).encode()
    if manifest["environment"].get("program") not in (None, provenance.source_digest()):
        note("note: the program has changed since this run; the zip holds it as it is now")
    return dict(sorted(files.items()))


def refuse_secrets(files: dict[str, bytes]) -> None:
    """Raise InputError where a file holds a key. In pred.json a mere likeness is a note: a model can write one."""
    secrets = redaction.values()
    found = []
    for name, content in files.items():
        text = content.decode("utf-8", errors="replace")
        for finding in secret_scan.findings(name, text, secrets):
            if name == "pred.json" and "the value of" not in finding:
                note(f"note: {finding}, or an answer that looks like it")
            else:
                found.append(finding)
    if found:
        listed = "\n  ".join(found[:5])
        raise InputError(f"nothing was written, since what would go in holds keys:\n  {listed}\nTake them out first.")


def packed(files: dict[str, bytes], top: str) -> bytes:
    """Return a zip of the files below one folder, its bytes a function of theirs alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(f"{top}/{name}", _DATE)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return buffer.getvalue()


def instructions(manifest: dict[str, Any], name: str) -> str:
    """Return REPRODUCE.md."""
    recipe, digests, made = manifest["recipe"], manifest["digests"], manifest["environment"]
    model, trained = manifest.get("model", {}), manifest["phases"]["train"]
    packages = ", ".join(f"{key} {value}" for key, value in made["packages"].items() if value)
    lines = {
        "base model": f"{recipe['model']['name_or_path']}, commit {model.get('commit') or 'unknown (a folder)'}",
        "rules": recipe["rules"] or "none named: this is a trial, no homework",
        "training file": f"{recipe['data']['train']}, sha256 {digests['train']}",
        "test file": f"{recipe['data']['test']}, sha256 {digests['test']}",
        "adapter": f"sha256 {digests['adapter']} (not in this zip)",
        "pred.json": f"sha256 {digests['pred']}",
        "GPU": (made["gpu"] or {}).get("name", "none"),
        "Python": f"{made['python']} on {made['system']}",
        "packages": packages,
        "backend": f"{trained['backend']}, {trained['dtype']}",
    }
    folders = "" if model.get("commit") else " --model BASE_FOLDER"
    named = recipe["model"].get("tokenizer")
    folders += " --tokenizer TOKENIZER_FOLDER" if named is not None and not key_owners.is_hub_id(named) else ""
    facts = "\n".join(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in lines.items())
    return f"""# {name}, homework 5: how to do it again

With this folder unpacked, the rows and the test file at hand, and Python 3.11 or 3.12:

    python -m venv .venv
    .venv/bin/python -m pip install -r requirements.txt         # requirements-cpu.txt without an NVIDIA GPU
    .venv/bin/python -m fast_ft reproduce ../{name}_hw5.zip --train TRAINING_FILE --test TEST_FILE{folders}

The command takes the recipe and the plan from manifest.json, but no folder, budget, judge, tracker or backup. It trains
again into a folder of its own, answers the prompts, and says whether the rows and the adapter are equal, which share of
the answers is identical, and which answer is the first that differs. On the same card with the same versions all are
equal. On another card numbers are rounded differently: the share is then below 1.

| | |
|---|---|
{facts}

manifest.json has the recipe with every default, the ids and digests of the rows, and the leakage certificate. Rows,
weights and logs are not in here.
"""


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
