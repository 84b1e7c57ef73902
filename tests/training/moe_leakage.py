"""A mixture of experts over packed documents: what reaches others, and what counts as a token.

Run as a script: `moe_leakage.py RENDEZVOUS`. Experts by Megatron's own code, on MeCo's layers for
hosts without Transformer Engine. Prints, for each document, what became of the others' states when
it changed; and which auxiliary losses, gradients and statistics of the router depend on padding,
with the mask that MeCo's training step hands to the model and without it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

import tiny_llama  # noqa: E402
import torch  # noqa: E402
from apart import (  # noqa: E402
    change_documents,
    documents,
    one_by_one,
    other_ids,
    positions_of,
    start,
)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402

from megatron_meco.training.megatron_patches import keep_padding_out_of_experts  # noqa: E402

LENGTH, VOCAB_SIZE, EXPERTS = 48, 100, 4
# Three documents, the second with padding at its end, and the padding of the pack.
BOUNDS, PADDED = [0, 13, 30, 40, 48], [(26, 30), (40, 48)]
KINDS: dict[str, dict[str, Any]] = {
    "aux loss": {"moe_router_load_balancing_type": "aux_loss"},
    "seq aux loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global aux loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "z-loss": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.1},
    "expert bias, shared experts": {
        "moe_router_load_balancing_type": "none",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 64,
    },
    "all to all, every second layer": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_token_dispatcher_type": "alltoall",
        "moe_layer_freq": [0, 1],
    },
}


def make_model(**changes: Any) -> Any:
    torch.manual_seed(1)
    values = {
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 64,
        "moe_aux_loss_coeff": 0.1,
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,
    }
    return tiny_llama.make_model(
        "local", vocab_size=VOCAB_SIZE, length=LENGTH, **(values | changes)
    ).double()


def documents_changed(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor
) -> list[dict[str, bool]]:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(
                ids[None],
                positions_of(BOUNDS),
                None,
                packed_seq_params=documents(BOUNDS),
                padding_mask=mask,
            )[0]

    return change_documents(logits, tokens, BOUNDS, other_ids(VOCAB_SIZE))


def of_padding(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Gradients of the auxiliary losses alone, and the tokens that each expert counted."""
    model.zero_grad()
    counted = [
        m for m in model.modules() if getattr(m, "local_tokens_per_expert", None) is not None
    ]
    for router in counted:
        router.local_tokens_per_expert.zero_()
    for router in model.modules():
        if getattr(router, "global_tokens_per_expert", None) is not None:
            router.reset_global_aux_loss_tracker()
    logits = model(
        tokens[None],
        positions_of(BOUNDS),
        None,
        packed_seq_params=documents(BOUNDS),
        padding_mask=mask,
    )
    # Auxiliary losses have gradients of their own, whatever the gradient of the logits.
    (logits * 0).sum().backward()
    grads = [p.grad.clone() for n, p in model.named_parameters() if n.endswith("router.weight")]
    return [*grads, *(router.local_tokens_per_expert.clone() for router in counted)]


def main() -> None:
    start(sys.argv[1])
    keep_padding_out_of_experts()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, dtype=torch.float64))
    tokens = torch.randint(0, VOCAB_SIZE, (LENGTH,))
    padding = torch.zeros(1, LENGTH, dtype=torch.bool)
    other = tokens.clone()
    for begin, end in PADDED:
        padding[0, begin:end] = True
        other[begin:end] = (other[begin:end] + 11) % VOCAB_SIZE
    report = {}
    for kind, changes in KINDS.items():
        model = make_model(**changes)
        report[kind] = {}
        for name, mask in (("with_mask", padding), ("without_mask", None)):
            before, after = (of_padding(model, ids, mask) for ids in (tokens, other))
            assert all(bool(value.any()) for value in before[-1:])
            report[kind][f"difference_{name}"] = max(
                float((a - b).abs().max()) for a, b in zip(before, after, strict=True)
            )
        if counts := [m for m in model.modules() if getattr(m, "enable_expert_bias", False)]:
            of_padding(model, tokens, padding)
            report[kind]["counted"] = [int(m.local_tokens_per_expert.sum()) for m in counts]
        one_by_one(model)
        report[kind]["documents"] = documents_changed(model, tokens, padding)
    full = make_model(moe_expert_capacity_factor=0.5, moe_token_dispatcher_type="alltoall")
    one_by_one(full)
    report["tokens dropped"] = {"documents": documents_changed(full, tokens, padding)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
