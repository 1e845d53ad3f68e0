"""The example's tokenizer and model, both made on the spot: nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 512
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 2048 tokens whose tokens never span two lines.

    A line's tokens therefore do not depend on its neighbours, and text can be cut between lines after tokenisation.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT_LENGTH, **special)


def small_llama(tokenizer: PreTrainedTokenizerFast, seed: int, attn_implementation: str) -> LlamaForCausalLM:
    """Make a Llama of two layers and 0.49 million parameters with random weights drawn from ``seed``.

    Every attention layer begins as one that copies what it reads, evenly from all tokens before: values are turned by a
    random rotation and turned back, queries and keys are small. Learning to copy names from the prompt, which the task
    asks for, otherwise takes most of the training.

    Source:
        Trockman and Kolter 2023, Mimetic Initialization of Self-Attention Layers, arXiv:2305.09828.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=128**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        # not those of devices, which nothing would put back
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                torch.nn.init.orthogonal_(attention.v_proj.weight)
                attention.o_proj.weight.copy_(attention.v_proj.weight.T)
                attention.q_proj.weight.mul_(0.1)
                attention.k_proj.weight.mul_(0.1)
                layer.mlp.down_proj.weight.zero_()
    return model
