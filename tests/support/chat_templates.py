"""Small chat templates in the manner of three families, and tokenizers that know their markers."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from support.tiny_models import tiny_tokenizer

# Writes its own BOS, trims contents, and dates the system message by the clock.
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n"
    "{% if m.role == 'system' %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
)

# Writes its own BOS, knows no system message, calls the assistant "model".
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)

# Writes no BOS and leaves contents alone; a turn ends in what an instruct model's EOS is.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Reads only what user and assistant say.
DEAF = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

STYLES = {"llama3": LLAMA3, "gemma": GEMMA, "chatml": CHATML}


def chat_tokenizer(template: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with a chat template; with `bos` it adds a BOS itself."""
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    return tokenizer
