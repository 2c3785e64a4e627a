"""What does here what options of other programs do, for messages about unknown keys."""

from typing import Final

OTHER_NAMES: Final = {
    # of transformers' Trainer
    "per_device_train_batch_size": "use train.batch_size, the examples of a step on all devices",
    "gradient_accumulation_steps": "leave it out: memory decides the parts of train.batch_size",
    "per_device_eval_batch_size": "leave it out: memory decides it",
    "bf16": "use model.dtype=bfloat16, which auto chooses where it is fast",
    "fp16": "use model.dtype=float16",
    "optim": "leave it out: the optimizer is AdamW",
    "warmup_steps": "use train.warmup_ratio, a share of all steps",
    "eval_strategy": "use train.eval_steps; by default once an epoch",
    "save_strategy": "use train.save_steps; by default once an epoch",
    "logging_steps": "leave it out: metrics.csv has every step",
    "load_best_model_at_end": "leave it out: the best evaluation's tensors are kept",
    "resume_from_checkpoint": "use train.resume",
    "output_dir": "use output.dir",
    "overwrite_output_dir": "use output.overwrite",
    "group_by_length": "leave it out: rows of like length share a batch",
    "torch_compile": "leave it out: train.engine is fast without it",
    "push_to_hub": "use the command lora-sentiment push",
    # of notebooks, PEFT's own names aside
    "epochs": "use train.num_train_epochs",
    "lr": "use train.learning_rate",
    "rank": "use method.r",
    "lora_r": "use method.r",
    "alpha": "use method.lora_alpha",
    "max_seq_length": "use model.max_length",
    "load_in_8bit": "use model.quantize=int8",
    "load_in_4bit": "use model.quantize=nf4",
}
"""Option to advice."""
