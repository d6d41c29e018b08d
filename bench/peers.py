"""Other ways of training the same rows, as a good user of those libraries would write them; none uses our trainer.

Rows come tokenised, `input_ids` and `labels`, so that every way trains on the same ids in the same order.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.emulation import Limits
from bench.peer_table import PEERS, Peer
from bench.watch import Watch
from fast_ft.hub.families import TARGET_MODULES

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


def run(job: dict[str, Any], limits: Limits, watch: Watch) -> dict[str, Any]:
    """Train as the job says; see bench.way for what it holds. Returns settings worth keeping beside the samples."""
    train(job, limits, watch)
    peer = PEERS[job["way"]]
    return {
        "backend": "unsloth" if peer.unsloth else "peft",
        "dtype": job["dtype"],
        "about": peer.about,
        "padding_free": peer.padding_free,
        "packed": peer.packed,
    }


def train(job: dict[str, Any], limits: Limits, watch: Watch) -> tuple[SFTTrainer, PreTrainedTokenizerBase]:
    """Train and save the adapter into the job's `work`; return trainer (with the model) and tokenizer."""
    peer = PEERS[job["way"]]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a CPU kernel that it would fetch from the hub
    os.environ["UNSLOTH_TOKEN_BUDGET"] = str(peer.token_budget or 0)  # read when the trainer is made
    load = _unsloth if peer.unsloth else _plain
    model, tokenizer, device = load(job, peer, limits, watch)
    watch.leave_out(limits.take_turn)
    limits.begin()
    trainer = _trainer(job, peer, model, tokenizer, _config(job, peer, device))
    load_adapter(trainer.model, job["adapter"])
    if not job.get("unwatched"):
        _see_batches(trainer, watch)
        watch.attach(trainer, stop_after=job["stop_after"])
    with limits.stream():
        trainer.train()
    watch.stamp("trained")
    trainer.save_model(str(Path(job["work"]) / "adapter"))
    watch.stamp("saved")
    return trainer, tokenizer


def _config(job: dict[str, Any], peer: Peer, device: str) -> SFTConfig:
    """Return TRL's settings: the recipe's schedule, the way's batches, nothing saved and no tracker."""
    from trl import SFTConfig

    train = job["train"]
    more: dict[str, Any] = {"max_length": peer.packed or job["max_length"]}
    if peer.packed:
        more["packing"] = True
    if not peer.unsloth:  # Unsloth is padding-free by itself; the watch sees in the batches whether it was
        more |= {"padding_free": peer.padding_free, "use_liger_kernel": peer.liger}
        if peer.padding_free:
            more["max_length"] = None  # TRL asks for it; no row is longer
    return SFTConfig(
        output_dir=str(Path(job["work"]) / "trainer"),
        per_device_train_batch_size=peer.rows,
        gradient_accumulation_steps=peer.accumulation,
        num_train_epochs=train["num_train_epochs"],
        max_steps=job["steps"],
        learning_rate=train["learning_rate"],
        lr_scheduler_type=train["lr_scheduler_type"],
        warmup_steps=train["warmup_steps"],
        weight_decay=train["weight_decay"],
        max_grad_norm=train["max_grad_norm"],
        optim=train["optim"],
        seed=job["seed"],
        fp16=job["dtype"] == "float16",
        bf16=job["dtype"] == "bfloat16",
        use_cpu=device == "cpu",
        gradient_checkpointing=bool(peer.checkpointing),
        train_sampling_strategy="sequential",
        # 100 rows: starting workers would take longer than their work; Unsloth does, if not told
        dataset_num_proc=1 if peer.unsloth else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def _trainer(
    job: dict[str, Any], peer: Peer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> SFTTrainer:
    """Return TRL's trainer over the job's rows."""
    from datasets import Dataset
    from trl import SFTTrainer

    dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in job["rows"]])
    more: dict[str, Any] = {}
    if peer.unsloth and not peer.padding_free:
        from transformers import DataCollatorForSeq2Seq

        more["data_collator"] = DataCollatorForSeq2Seq(tokenizer=tokenizer)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **more)
    if not peer.unsloth:
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # TRL casts to bf16, which fp16's GradScaler refuses
    return trainer


_Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase", str]  #: and the device's type


def _unsloth(job: dict[str, Any], peer: Peer, limits: Limits, watch: Watch) -> _Loaded:
    import unsloth  # first, because it patches the others

    watch.stamp("imported")
    watch.leave_out(limits.may_load)
    import torch

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=job["base"],
        max_seq_length=peer.packed or job["max_length"],
        dtype=getattr(torch, job["dtype"]),
        load_in_4bit=True,
        trust_remote_code=False,
        use_exact_model_name=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=job["lora"]["r"],
        lora_alpha=job["lora"]["lora_alpha"],
        lora_dropout=peer.lora_dropout,
        target_modules=list(TARGET_MODULES),
        bias="none",
        use_gradient_checkpointing=peer.checkpointing,
        checkpoint_skip_layers=peer.kept_layers,
        random_state=job["seed"],
    )
    watch.stamp("loaded")
    return model, tokenizer, "cuda"


def _plain(job: dict[str, Any], peer: Peer, limits: Limits, watch: Watch) -> _Loaded:
    import peft
    import torch
    import transformers
    import trl  # noqa: F401

    watch.stamp("imported")
    watch.leave_out(limits.may_load)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["dtype"])
    config = transformers.AutoConfig.from_pretrained(job["base"], trust_remote_code=False)
    more: dict[str, Any] = {}
    if getattr(config, "quantization_config", None) is None:
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=dtype, device_map={"": device}, trust_remote_code=False, **more
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=job["lora"]["r"], lora_alpha=job["lora"]["lora_alpha"], lora_dropout=peer.lora_dropout,
        target_modules=list(TARGET_MODULES), bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, lora)
    watch.stamp("loaded")
    return model, tokenizer, device


def load_adapter(model: nn.Module, path: str | None) -> None:
    """Load the adapter that all ways start from; with None the library's own draw stays."""
    if path is None:
        return
    import peft
    from safetensors.torch import load_file

    result = peft.set_peft_model_state_dict(model, load_file(path))
    assert not result.unexpected_keys, f"the initial adapter does not fit: {result.unexpected_keys[:2]}"


def _see_batches(trainer: SFTTrainer, watch: Watch) -> None:
    """Show the watch each batch that the trainer computes a loss of."""
    loss = trainer.compute_loss

    @functools.wraps(loss)  # libraries look at its parameters
    def _seen(model: nn.Module, inputs: dict[str, Tensor], *given: Any, **named: Any) -> Any:
        watch.saw(inputs["input_ids"][:, :-1], inputs["labels"][:, 1:])
        return loss(model, inputs, *given, **named)

    trainer.compute_loss = _seen
