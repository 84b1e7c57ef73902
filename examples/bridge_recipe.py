"""A recipe of Megatron-Bridge with MeCo: Llama 3 8B on a prepared corpus.

    torchrun --nproc-per-node 8 examples/bridge_recipe.py CORPUS TOKENIZER

Never run: Megatron-Bridge needs a GPU stack. docs/bridge.md says what was tested, and how.
"""

import argparse

from megatron.bridge.recipes.llama import llama3_8b_pretrain_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain

from megatron_meco.bridge import MeCoCallback, MeCoDatasetProvider, forward_step
from megatron_meco.config import MeCoConfig


def recipe(corpus: str, tokenizer: str) -> ConfigContainer:
    """The stock recipe with MeCo's data.

    Args:
        corpus: What `meco prepare` wrote, without suffix.
        tokenizer: Folder or name of the Hugging Face tokenizer that it was prepared with.
    """
    config = llama3_8b_pretrain_config()
    config.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    config.tokenizer.tokenizer_model = tokenizer
    config.dataset = MeCoDatasetProvider(
        data_path=[corpus],
        seq_length=config.model.seq_length,
        global_batch_size=config.train.global_batch_size,
        meco=MeCoConfig(template=r"URL: {url.host}\n\n", cooldown_fraction=0.1),
        separate_views=True,
    )
    config.validation.multiple_validation_sets = True
    config.model.context_parallel_size = 1
    # Sums over tokens: samples have different numbers of trained ones.
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    # A checkpoint at the switch, which is at nine tenths of the steps.
    config.checkpoint.save_interval = config.train.train_iters // 10
    return config


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("tokenizer")
    args = parser.parse_args()
    config = recipe(args.corpus, args.tokenizer)
    pretrain(config, forward_step, callbacks=[MeCoCallback(config.dataset)])


if __name__ == "__main__":
    main()
