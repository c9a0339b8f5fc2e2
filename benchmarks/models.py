"""Random models of published shapes, made once and kept as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).parent / ".models"


def llama_12x768() -> Path:
    """12 layers, d_model 768, 12 heads (4 kv), vocabulary 32,000: 125 million random weights."""
    folder = MODELS / "llama-12x768"
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2_048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2_048,
        initializer_range=0.03,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.15 * torch.randn(parameter.shape))
        model.lm_head.weight.mul_(3)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words |= {f"w{number}": number for number in range(3, 32_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def gpt2_12x768() -> Path:
    """GPT-2 small's shape (12 layers, d_model 768, vocabulary 50,257) with random weights."""
    folder = MODELS / "gpt2-12x768"
    if (folder / "config.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config()).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name or name.endswith("bias"):
                parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(50_257)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w50256").save_pretrained(folder)
    return folder
