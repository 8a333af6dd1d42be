"""Run by a Python that has vLLM: loads a Hugging Face folder and prints the log-probabilities of a prompt, of every token of the vocabulary.

    vllm_loads.py HF_DIR [--dtype float32] TOKEN ...      last line: {"version": version, "log_probabilities": [[...], ...]}, places 1 to the last

Knows nothing of megatron-prism. One model a process, on the CPU, in eager mode.
"""

import argparse
import json
import os
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Load, ask for the prompt's log-probabilities, print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("tokens", nargs="+", type=int)
    options = parser.parse_args()

    import vllm

    size = json.loads((Path(options.folder) / "config.json").read_text())["vocab_size"]
    model = vllm.LLM(
        options.folder, dtype=options.dtype, enforce_eager=True, max_model_len=128, max_num_seqs=1, max_logprobs=size,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=size, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": options.tokens}], asked, use_tqdm=False)
    rows = [[row[token].logprob for token in range(size)] for row in answer.prompt_logprobs[1:]]
    print(json.dumps({"version": vllm.__version__, "log_probabilities": rows}))


if __name__ == "__main__":
    main()
