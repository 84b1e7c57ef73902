"""MeCo in a plain PyTorch loop, without Megatron's trainer.

    python examples/plain_pytorch.py CORPUS TOKENIZER MODEL

`MODEL` is the folder of a Hugging Face Llama. Documents are kept apart by a block mask:
FlexAttention on a GPU, a dense mask on a CPU, where FlexAttention has no backward pass. Several
GPUs need torchrun, DistributedDataParallel around the model, and `rank` and `world_size` below.
"""

import argparse

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_meco.data.packed_batches import PlainRun


def document_mask(ids: torch.Tensor) -> object:
    """Causal attention within each document; `ids`: (samples, length), the document of a token."""
    if ids.device.type == "cpu":
        return (ids[:, None, :, None] == ids[:, None, None, :]).tril()

    def visible(sample: object, head: object, query: object, key: object) -> object:
        return (ids[sample, query] == ids[sample, key]) & (query >= key)

    return create_block_mask(visible, len(ids), None, *[ids.shape[1]] * 2, device=ids.device)


def main() -> None:
    """Train, one line for each step."""
    parser = argparse.ArgumentParser()
    for name in ("corpus", "tokenizer", "model"):
        parser.add_argument(name)
    for name, default in (("steps", 10), ("batch", 4), ("length", 64), ("seed", 1234)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(args.model)
    config._attn_implementation = "flex_attention" if device == "cuda" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0)

    run = PlainRun(
        args.corpus,
        tokenizer=args.tokenizer,
        sequence_length=args.length,
        num_steps=args.steps,
        global_batch_size=args.batch,
        seed=args.seed,
    )
    print(run.schedule.describe())
    batches = run.training_batches(micro_batch_size=args.batch, borders="document_ids")
    for step, loaded in enumerate(DataLoader(batches, batch_size=None, num_workers=1), 1):
        batch = loaded.to(device)
        logits = model(
            batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=document_mask(batch["document_ids"]),
        ).logits
        # The mean over trained tokens of the whole step: with several micro-batches or ranks,
        # divide the sum of all losses by the number of all targets.
        loss = cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.6E}", flush=True)


if __name__ == "__main__":
    main()
