"""Tokens, keys and passwords: told apart from other text, so that none of them is written where others read.

Owns: what a secret looks like, masking it in a command line, refusing it in a recipe. A recipe becomes a `config.toml` that has to be read back
unchanged, so there it is refused, not masked. Environment variables are never written down, and are where secrets belong.
Sees: known forms of tokens, names such as `api_key=`, passwords inside URLs. A secret without any of these looks like a word.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron_prism.errors import UserError

MASK = "***"
TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}|glpat-[\w-]{16,}"
    r"|wandb_v1_\w{16,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
"""Hugging Face, OpenAI and its like, GitHub, AWS, Google, GitLab, wandb, Slack, JSON web tokens."""
NAMES = re.compile(
    r"^key$|(^|[_.\-])(secret|password|passwd|credentials?|(api|access|auth|secret|private|bearer|hf|hub|wandb)[_-]?(key|token))$", re.IGNORECASE
)
URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*:[^/\s@]+)(?=@)")
URL_ARGUMENT = re.compile(r"(?<=[?&])((?:api_?key|key|token|access_token|sig|signature|password|X-Amz-Signature)=)[^&\s]+", re.IGNORECASE)


def mask(text: str) -> str:
    """A word of a command line with its secrets as ***: tokens, the value of `--api-key=VALUE` or `wandb_key=VALUE`, passwords of URLs."""
    name, equals, value = text.partition("=")
    if equals and value and is_secret_name(name.lstrip("-")):
        return f"{name}={MASK}"
    text = TOKENS.sub(MASK, text)
    return URL_ARGUMENT.sub(rf"\1{MASK}", URL_PASSWORD.sub(MASK, text))


def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is a secret: `api_key`, `logging.wandb.key`, `HF_TOKEN`; not `tokens`, `text_key` or `pad_token`."""
    return NAMES.search(name) is not None


def refuse(table: dict[str, Any]) -> None:
    """Errors: UserError naming the key of a recipe (never its value) that holds a secret."""
    for key, value in _texts(table):
        if mask(f"{key}={value}") != f"{key}={value}":
            raise UserError(
                f"{key} holds what looks like a token or a password, and a recipe is written into every output's config.toml: "
                "take it out, and put it into an environment variable (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...)"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _texts(part, f"{key}.{place}")
    elif isinstance(value, str) and value:
        yield key, value
