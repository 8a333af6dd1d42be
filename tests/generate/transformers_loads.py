"""Run by a Python that has another transformers: loads a Hugging Face folder and prints the log-probabilities of a prompt.

    transformers_loads.py HF_DIR TOKEN TOKEN ...      last line: {"version": version, "log_probabilities": [[...], ...]}, places 1 to the last

Knows nothing of megatron-prism. fp32, on the CPU.
"""

import json
import sys

import torch
import transformers


def main() -> None:
    """Load, run, print."""
    folder, *tokens = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        rows = model(torch.tensor([[int(token) for token in tokens]])).logits.log_softmax(-1)[0, :-1]
    print(json.dumps({"version": transformers.__version__, "log_probabilities": rows.tolist()}))


if __name__ == "__main__":
    main()
