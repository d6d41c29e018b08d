"""`python -m fast_ft export`: what a finished run becomes, each checked before it takes its name."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fast_ft.common import atomic_files, untrusted_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.export import checks, gguf_model, hub, merged, ollama
from fast_ft.export.chat_forms import JINJA
from fast_ft.hub import download, gguf_metadata
from fast_ft.models import adapter_check
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir

Target = Literal["merged", "gguf", "ollama", "hub"]
QUANTISER = "llama-quantize"  #: llama.cpp's program, for the types that the gguf package does not write
OUTTYPES = (*gguf_model.OUTTYPES, "q4_k_m")
_RECORD = "fast_ft_export.json"  #: in a merged model's folder: what it was made of, and how it was checked
#: Nats a token that a file may be from the merged model. More than this is no rounding.
_ROUNDED = {"f16": checks.ALLOWED, "q8_0": 0.2, "q4_k_m": 1.0}


@dataclass(frozen=True)
class Export:
    """A finished run, and where its exports go."""

    run: RunDir
    recipe: Recipe
    base: Path
    tokenizer: Path
    out: Path
    dtype: str = "float16"

    @classmethod
    def of(cls, run: str, *, base: str | None = None, output: str | None = None, dtype: str = "float16") -> Export:
        """Return the run in a folder, its base fetched where need be.

        Args:
            run: the run folder; its training must be done.
            base: another folder or hub id of the same base, such as the 16-bit one of a run on 4 bits.
            output: where exports go; None: RUN_DIR/export.
            dtype: of merged weights, one of merged.DTYPES.
        """
        folder = RunDir.at(run)
        if not (folder.adapter / "adapter_model.safetensors").is_file():
            raise InputError(f"{run} has no adapter yet: its training is not done. Run its recipe first.")
        out = Path(output) if output else folder.root / "export"
        _refuse_place(out)
        if dtype not in merged.DTYPES:
            raise InputError(f"--dtype {dtype}: one of {', '.join(merged.DTYPES)} is written")
        recipe = folder.recipe()
        model = recipe.model
        place = download.model_folder(base or model.name_or_path, None if base else model.revision)
        words = download.tokenizer_folder(model.tokenizer or model.name_or_path, model.revision)
        return cls(folder, recipe, place, words, out, dtype)

    def merged_model(self) -> Path:
        """Return the folder of the merged model, made and checked; a former one where it is whole and of the same."""
        target = self.out / "merged"
        made_of = {"adapter": atomic_files.sha256_file(self.run.adapter / "adapter_model.safetensors"),
                   "base": str(self.base), "dtype": self.dtype}  # fmt: skip
        former = untrusted_files.json_object(target / _RECORD) if (target / _RECORD).is_file() else {}
        files = former.get("bytes")
        whole = not isinstance(files, dict) or _sizes(target).items() >= files.items()
        if former.get("made_of") == made_of and whole:
            note(f"{target} is there already")
            return target
        template = JINJA.get(self.recipe.model.template)
        stored = adapter_check.read(self.run.adapter)
        ends = self._end_ids()
        with atomic_files.replace_folder(target) as folder:
            merged.merge_into(
                folder,
                self.base,
                self.run.adapter,
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                template=template,
                end_ids=ends,
            )
            reference = checks.answers(checks.loader(self.base, adapter=self.run.adapter), stored, ends)
            found = checks.answers(checks.loader(folder), stored, ends)
            finding = checks.compare("merged, against the adapter on the same base", reference, found)
            checks.refuse_wrong(finding)
            far = checks.distance(stored, found)
            note(finding.sentence)
            note(f"merged, against the run's own model in {stored.dtype}: {far:.4f} nats per trained token")
            content = {"made_of": made_of, "against_adapter": vars(finding), "against_run_nats": far}
            content["bytes"] = _sizes(folder)
            atomic_files.write_json(folder / _RECORD, content)
        return target

    def gguf(self, outtype: str) -> Path:
        """Return the GGUF file of the merged model, written and checked; beside it the adapter alone."""
        if outtype not in OUTTYPES:
            raise InputError(f"--outtype {outtype}: one of {', '.join(OUTTYPES)} is written")
        if outtype == "q4_k_m" and shutil.which(QUANTISER) is None:
            raise InputError(
                f"--outtype q4_k_m needs llama.cpp's {QUANTISER}, which is not on the PATH. Build llama.cpp, or take "
                "q8_0."
            )
        gguf_metadata.library("a GGUF file")  # before minutes are spent on merging
        model = self.merged_model()
        target = self.out / f"model-{outtype}.gguf"
        with atomic_files.replace_file(target) as path:
            self._write_gguf(model, path, outtype)
            self._check_gguf(model, path, outtype)
        alone = self.out / "adapter-lora.gguf"
        try:
            gguf_model.write_adapter(self.run.adapter, self.base, alone)
            note(f"the adapter alone: {alone}")
        except InputError as error:
            note(f"note: the adapter alone was not written as GGUF: {error}")
        return target

    def ollama(self, outtype: str) -> Path:
        """Return the Modelfile beside the GGUF."""
        model = self.gguf(outtype)
        target = self.out / "Modelfile"
        atomic_files.write_text(target, ollama.modelfile(model.name, self.recipe.model.template, self.recipe.generate))
        return target

    def hub(self, repository: str, *, whole: bool, push: bool) -> str:
        """Return the address of the uploaded repository, or, without `push`, what would be uploaded."""
        if self.recipe.rules is not None:
            raise InputError(
                f"{self.run.root}: a run under the rules {self.recipe.rules} is not published: a homework's model "
                "stays with its author. Train without `rules:` what you want to share."
            )
        folder = self.merged_model() if whole else self.run.adapter
        if whole:
            card = (self.run.adapter / "README.md").read_text(encoding="utf-8")
            card = card.replace("library_name: peft", "library_name: transformers")
            card = card.replace("# LoRA adapter for", "# A LoRA adapter merged into")
            atomic_files.write_text(folder / "README.md", card)
        if push:
            return hub.upload(folder, repository)
        listed = "".join(
            f"\n  {path.relative_to(folder)}  {path.stat().st_size / 1e6:,.1f} MB" for path in hub.files(folder)
        )
        return f"nothing was uploaded; --push uploads into the private repository {repository}:{listed}"

    def _end_ids(self) -> list[int]:
        from fast_ft.data.encoding import load_encoder

        return [*load_encoder(self.recipe.model).end_ids]

    def _write_gguf(self, model: Path, path: Path, outtype: str) -> None:
        if outtype != "q4_k_m":
            for sentence in gguf_model.write_model(model, path, outtype):
                note(f"note: {sentence}")
            return
        half = path.with_name(f"{path.name}.f16")
        try:
            gguf_model.write_model(model, half, "f16")
            done = subprocess.run([QUANTISER, str(half), str(path), "Q4_K_M"], capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines() or ["nothing said"]
                raise InputError(f"{QUANTISER} ended with status {done.returncode}: {said[-1]}")
        finally:
            half.unlink(missing_ok=True)

    def _check_gguf(self, model: Path, path: Path, outtype: str) -> None:
        """Load the file through transformers' own reader and compare it with the merged model."""
        stored, ends = adapter_check.read(self.run.adapter), self._end_ids()
        reference = checks.answers(checks.loader(model), stored, ends)
        found = checks.answers(checks.loader(model, gguf_file=path), stored, ends)
        finding = checks.compare(f"GGUF in {outtype}, against the merged model", reference, found)
        note(finding.sentence)
        if outtype == "f16":
            checks.refuse_wrong(finding)
        elif not finding.nats <= _ROUNDED[outtype]:
            raise InputError(
                f"{finding.sentence}. That is more than rounding to {outtype} does: the file was not kept."
            )


def _refuse_place(out: Path) -> None:
    """Raise InputError where exports would take the place of what no export wrote."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--output {out}: that is a file. Name a folder, in which the exports are written.")
    target = out / "merged"
    if (target.exists() or target.is_symlink()) and not (target / _RECORD).is_file():
        raise InputError(
            f"{target} is there already, and is not replaced, since no export wrote it ({_RECORD} is not in it). Name "
            "another folder by --output, or move that one."
        )


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a merged model's folder, but for the card, which an upload changes."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}
