"""Real models that are small enough to test with: a random LLaMA and a byte-complete tokenizer, as a Hugging Face folder."""

from pathlib import Path

TEXT = "the cat sat on the mat. one two three four five six seven eight nine ten. def f(x): return x + 1. Answer: 42. "
END = "</s>"


def make_tiny_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """A byte-level BPE trained on a few sentences; any text survives encode and decode. Token 0 is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return folder


def make_tiny_model(folder: Path, seed: int = 0, vocab_size: int = 300, **config: object) -> Path:
    """A random LLaMA of a few thousand parameters (128 positions) with its tokenizer; large initial weights, so that it has opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_tokenizer(folder, vocab_size)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    settings = {**sizes, **ids, "vocab_size": vocab_size, "max_position_embeddings": 128, "initializer_range": 0.3, **config}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder
