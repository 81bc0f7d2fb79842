"""An optimized model and Muon-LITE in transformers' Trainer, which resumes both with its checkpoints.

The Trainer is given the module that `moefx.optimize` returns, and the optimizer with its schedule as a pair.

Needs `accelerate`, as the Trainer does.
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import moefx

STEPS, WARMUP, BATCH = 40, 4, 8


class Successors(Dataset):
    """Rows of tokens in which every token has one successor."""

    def __init__(self, vocab: int = 64, length: int = 16, rows: int = 320) -> None:
        follows, row = torch.randperm(vocab), [torch.randint(vocab, (rows,))]
        for _ in range(length - 1):
            row.append(follows[row[-1]])
        self.ids = torch.stack(row, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(folder: str, checkpoint: str | None = None) -> Trainer:
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    # The Trainer's own resume does not stack experts again, which a checkpoint holds one by one; from_pretrained does.
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint) if checkpoint else Qwen3MoeForCausalLM(config)
    # As the Trainer calls it: it adds how many tokens the loss is a mean of. Shapes and dtypes matter, values do not.
    ids = torch.zeros(BATCH, 16, dtype=torch.long)
    example = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(1.0)}
    opt = moefx.optimize(model.train(), example, codegen="eager")
    groups = moefx.optim.param_groups(opt, split="heads", verbose=False)
    lite = moefx.optim.LiteConfig.wsd(warmup=WARMUP, total=STEPS)  # the recipe of MoE models: damping, no boost
    optimizer = moefx.optim.MuonLITE(groups, lr=1e-2, lite=lite)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=10, save_steps=STEPS // 2,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    set_seed(0)  # whatever drew before: the same data in the same order
    return Trainer(opt, arguments, train_dataset=Successors(), optimizers=(optimizer, schedule))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(folder)
        whole.train()
        middle = f"{folder}/checkpoint-{STEPS // 2}"
        half = trainer(folder, middle)
        half.train(resume_from_checkpoint=middle)
    far = max((p - q).abs().max() for p, q in zip(whole.model.parameters(), half.model.parameters(), strict=True))
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    print("loss", " > ".join(f"{float(x):.2f}" for x in losses))
    print(f"resumed in the middle: weights differ by {far:.0e} at the end")
