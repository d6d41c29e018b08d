"""manifest.json as a value: what a run was asked for, what each phase found, and what it was made of."""

# ruff: noqa: RUF012 (pydantic copies a default value for each object)
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from fast_ft.common import untrusted_files
from fast_ft.common.wording import counted
from fast_ft.run.checked_file import MOST, Number, OpenPart, Part, checked


class RowDigest(Part):
    """A training row that was selected."""

    id: str
    digest: str


class StageRows(Part):
    """A stage and the ids of its rows; `epoch_rows` where an epoch does not see each of them once."""

    name: str
    ids: list[str]
    epoch_rows: int | None = None


class Phase(Part):
    """What a phase notes when it is done. A key is there or not, but it is never null."""

    seconds: Number = 0
    finished: str = ""
    backend: str = ""
    dtype: str = ""
    steps: int = 0
    out_of_memory: int = 0
    peak_gib: Number = 0
    first_loss: Number = 0
    last_loss: Number = 0
    best_step: int = 0
    best_validation_loss: Number = 0
    why: str = ""
    worthless: str = ""
    stopped_at_step: int = 0
    of_steps: int = 0
    answers: int = 0
    batch_size: int = 1
    decoding_seconds: Number = 0
    cut_by_budget: int = 0
    cut_at: int = 0
    minutes: Number = 0  # of the budget that cut it short
    kind: str = ""
    mean: Number | None = None


class Environment(Part):
    """What run/provenance.py told of program and machine."""

    python: str = ""
    system: str = ""
    program: str | None = None
    packages: dict[str, str | None] = {}
    gpu: dict[str, str] | None = None


class ModelConfig(OpenPart):
    """The base model's config.json."""

    quantization_config: dict[str, Any] | None = None


class BaseModelRecord(Part):
    """The base model, as hub/fingerprint.py describes it."""

    name_or_path: str
    revision: str | None = None
    commit: str | None = None
    config: ModelConfig = ModelConfig()
    weights: dict[str, str] = {}


class TokenDigests(Part):
    """Digests of the token ids that training and answering see."""

    rows: dict[str, str] = {}
    prompts: str | None = None


class Leakage(Part):
    """The certificate on test prompts among the rows."""

    examples: int | None = None
    prompts: int | None = None
    hits: list[dict[str, Any]] = []


class _Budget(Part):
    memory_gib: Number | str | None = None
    train_minutes: Number | None = None
    generate_minutes: Number | None = None


class _Sections(Part):
    """A recipe's sections. RunDir.recipe checks their keys, where a run goes on."""

    model: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    train: dict[str, Any] = {}
    data: dict[str, Any] = {}
    judge: dict[str, Any] = {}
    generate: dict[str, Any] = {}
    budget: _Budget = _Budget()
    rules: str | None = None


def _with_sections(recipe: dict[str, Any]) -> dict[str, Any]:
    _Sections.model_validate(recipe)
    return recipe


class Manifest(Part):
    """manifest.json. What a run has not come to yet has its default."""

    recipe: Annotated[dict[str, Any], AfterValidator(_with_sections)] = {}
    recipe_file: str = ""
    recipe_digest: str = ""
    started: str = ""
    phases: dict[str, Phase] = {}
    rows: list[RowDigest] = []
    validation: list[RowDigest] = []
    stages: list[StageRows] = []
    digests: dict[str, str] = {}
    leakage: Leakage = Leakage()
    notes: list[str] = []
    notes_on_answers: list[str] = []
    environment: Environment = Environment()
    resumed: list[dict[str, Any]] = []
    model: BaseModelRecord | None = None
    tokens: TokenDigests = TokenDigests()
    plan: dict[str, Any] = {}
    starts_from: dict[str, str] = {}  # the adapter's folder and digest, where training did not start from a new one
    start_up: dict[str, Number] = {}  # seconds from the command to the last session's first step, by parts
    generated_with: dict[str, Any] = {}
    judged_with: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    reproduction_of: str | None = None

    def phase(self, name: str) -> Phase:
        """Return what a phase noted; its defaults where the phase is not done."""
        return self.phases.get(name, Phase())

    def staged(self) -> list[dict[str, Any]]:
        """Return the stages as {"name", "ids"}, and perhaps "epoch_rows"."""
        return [stage.model_dump(exclude_none=True) for stage in self.stages]

    def cut_short(self) -> list[str]:
        """Return what a budget of minutes cut short, one sentence without a full stop each."""
        train, generate = self.phase("train"), self.phase("generate")
        said = []
        if train.why == "budget":
            said.append(f"training ended after step {train.stopped_at_step} of {train.of_steps}")
        if generate.cut_by_budget:
            said.append(
                f"{counted(generate.cut_by_budget, 'answer')} cut at {counted(generate.cut_at, 'new token')} or less"
            )
        return said


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(path: Path) -> tuple[dict[str, Any], Manifest]:
    """Return manifest.json's content, as it is and as a value. Raises InputError."""
    content = untrusted_files.json_object(path, MOST, "Restore the file, or delete its folder.")
    return content, checked(_MANIFEST, content, path, "run")
