"""The keys of `model`, `lora`, `curriculum` and `train`: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fast_ft.recipe.schema_values import Condition, Count, Epochs, Positive, Section, Share


class Model(Section):
    """The base model, and how it is loaded."""

    name_or_path: str = Field(description="A folder, a .gguf file, or a model's id on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="The hub's branch, tag or commit.")
    tokenizer: str | None = Field(default=None, description="A tokenizer's folder or id, in place of the model's own.")
    template: Literal["llama-2", "llama-3.1", "tokenizer"] = Field(
        default="llama-2",
        description="The prompt's form: Llama 2's [INST] ... [/INST], Llama 3.1's headers (as text, where the "
        "tokenizer has no such tokens), or the tokenizer's own chat template.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        default=2048, description="Most tokens in a training row, all turns together."
    )
    load_in_4bit: bool = Field(
        default=True, description="NF4 with double quantisation (bitsandbytes); false: 16 or 32 bits."
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="The type of the arithmetic. auto: bfloat16 from compute capability 8.0, float16 below, float32 on "
        "a CPU.",
    )
    backend: Literal["auto", "fused", "unsloth", "peft"] = Field(
        default="auto",
        description="What trains: fused (our own blocks), unsloth, or peft (transformers + peft). auto: the first of "
        "the ways that plan/cards.json names for the card's compute capability that can; on a CPU peft.",
    )
    adapter: str | None = Field(
        default=None,
        description="A folder with a LoRA adapter in PEFT's form, from which training starts; null: from a new one.",
    )


class Lora(Section):
    """The adapter, in PEFT's terms."""

    r: Annotated[int, Field(ge=0)] = Field(
        default=16, description="Rank: the inner size of the adapter's two matrices."
    )
    lora_alpha: Annotated[float, Field(ge=0)] = Field(
        default=32, description="The adapter's output is scaled by lora_alpha / r; see use_rslora."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="The share of the adapter's inputs that a training pass sets to 0. Own blocks need 0.",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Which layers get an adapter: all-linear, or names such as q_proj."
    )
    use_rslora: bool = Field(
        default=False,
        description="Rank-stabilised LoRA: the scale is lora_alpha / sqrt(r) (arXiv 2312.03732).",
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: the size of each output's weights is trained apart from their direction (arXiv 2402.09353). "
        "Slower: our own blocks and Unsloth's kernels do not know it.",
    )
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = Field(
        default=(),
        description="Parts that are trained and saved whole, beside the LoRA: embed_tokens, lm_head or both. "
        "For a 7B each of them takes some 2 GiB more.",
    )


class StageSpec(Section):
    """One curriculum stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] = Field(
        description="The stage's name in logs and in the report: 1 to 40 letters, digits, _ or -."
    )
    upto: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="The stage trains on the selected rows up to this quantile of curriculum.by."
    )
    where: dict[str, Condition] | None = Field(default=None, description="In place of upto: conditions on metrics.")
    num_train_epochs: Epochs | None = Field(
        default=None, description="How often the stage sees each of its rows; null: train.num_train_epochs."
    )
    learning_rate: Positive | None = Field(
        default=None, description="The stage's highest learning rate; null: train.learning_rate."
    )
    order: Literal["shuffled", "ascending"] = Field(
        default="shuffled",
        description="Order of rows: another random one in each epoch, or ascending in curriculum.by.",
    )


class Carry(Section):
    """What goes from one stage to the next. false: it starts again."""

    optimizer: bool = Field(default=True, description="The optimizer's state, and the fp16 loss scale with it.")
    schedule: bool = Field(default=True, description="One warm-up and decay over all stages, or one for each.")


class Curriculum(Section):
    """Stages of training. No stages given means one, over all selected rows."""

    by: str = Field(default="response_words", description="The metric whose quantiles make stages; low is easy.")
    cumulative: bool = Field(
        default=True, description="A stage holds the rows of the stages before it too; false: only its own."
    )
    carry: Carry = Carry()
    stages: tuple[StageSpec, ...] = Field(default=(), description="The stages, in the order of training.")


class Train(Section):
    """Training arguments, in TRL's and transformers' terms."""

    effective_batch_size: Count = Field(default=8, description="Rows in one optimizer step.")
    per_device_train_batch_size: Count | Literal["auto"] = Field(
        default="auto", description="Rows in one forward pass; auto: as many as the memory budget holds."
    )
    num_train_epochs: Epochs = Field(
        default=1, description="How often each row is seen. 1.5: once, and the first half of a second pass's steps."
    )
    max_steps: Count | None = Field(
        default=None,
        description="Stop after this number of optimizer steps over all stages; null: when the epochs are done.",
    )
    learning_rate: Positive = Field(default=2e-4, description="The optimizer's step size after warm-up, its highest.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear",
        description="The learning rate after warm-up: linear and cosine fall to 0; constant_with_warmup stays; "
        "constant has no warm-up.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=10, description="Steps in which the learning rate rises from 0; null: by warmup_ratio."
    )
    warmup_ratio: Share | None = Field(
        default=None, description="The same as a share of all steps, rounded up; give it or warmup_steps, not both."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="AdamW's decay of the adapter's weights; 0: none."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Gradients with a larger norm are scaled down to it; 0: never."
    )
    optim: Literal["adamw_torch", "adamw_8bit"] = Field(
        default="adamw_8bit", description="The optimizer: PyTorch's AdamW, or bitsandbytes' with 8-bit states."
    )
    neftune_noise_alpha: Positive | None = Field(
        default=None,
        description="NEFTune: noise of alpha / sqrt(L d) on the embeddings, L being each row's own length.",
    )
    completion_only_loss: bool = Field(
        default=True, description="Train on the response alone; false: on the prompt too, for comparison."
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Compute activations again in the backward pass, for less memory; auto: where they do not fit.",
    )
    capture: bool = Field(
        default=True, description="Replay passes from CUDA graphs on a card that would wait for Python's launches."
    )
    max_bad_steps: Count = Field(
        default=8,
        description="After this number of steps in a row without a finite loss and finite gradients, training goes "
        "back to the last good state, with half the learning rate; the second time it ends.",
    )
    deterministic: bool = Field(
        default=False, description="Only operations that give the same bits each time on one card; slower."
    )
    save_steps: Count | None = Field(
        default=None, description="Number of steps between two checkpoints; null: checkpoints at stage ends only."
    )
    eval_steps: Count | None = Field(
        default=None,
        description="Number of steps between two measurements of the validation loss; null: at stage ends only.",
    )
    load_best: bool = Field(
        default=False, description="End with the weights of the least validation loss, in place of the last ones."
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none",
        description="A tracker for the curves, through transformers; its package is yours to install. Refused under "
        "the homework's rules. log.jsonl and report.html need none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ratio_in_place_of_steps(cls, values: Any) -> Any:
        """Let a share of steps that is given alone take the place of the default number of steps."""
        if isinstance(values, dict) and values.get("warmup_ratio") is not None and "warmup_steps" not in values:
            return values | {"warmup_steps": None}
        return values
