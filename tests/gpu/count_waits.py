"""`examples/pretrain_gpt.py` with an eye on waits for the device in each training step.

PyTorch warns of every operation that makes the host wait. From the third step on those inside
MeCo's forward step and loss function are noted, by the file and line of Python they come from, and
printed as JSON on a line of its own at the end.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

warnings.filterwarnings("ignore")

from megatron_meco.training.arguments import parse_and_validate_args  # noqa: E402

FIRST_STEP = 2


def main() -> None:
    args = parse_and_validate_args()

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_meco.training import provider

    waits: Counter[str] = Counter()
    counted = Counter[str]()

    def watched(name: str, function: Callable[..., Any], *given: Any) -> Any:
        if args.curr_iteration < FIRST_STEP:
            return function(*given)
        counted[name] += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = function(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                waits[f"{warning.filename}:{warning.lineno}"] += 1
        return result

    def forward_step(data_iterator: Any, model: Any) -> Any:
        output, loss = watched("forward", provider.forward_step, data_iterator, model)
        return output, lambda tensor: watched("loss", loss, tensor)

    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        provider.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    print("waits:" + json.dumps({"counted": counted, "waits": waits}), flush=True)


if __name__ == "__main__":
    main()
