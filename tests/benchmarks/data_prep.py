"""Speed of data preparation beside raw `tokenizers`, Megatron-LM's tools/preprocess_data.py and datatrove: same text, tokenizer and cores, in turns.

    python tests/benchmarks/data_prep.py --work FOLDER [--megatron-lm CHECKOUT] [--datatrove PYTHON] [--fastokens] [--mimalloc]
        [--tokenizer HF_FOLDER] [--megabytes 60] [--workers 2] [--runs 3]
    python tests/benchmarks/data_prep.py --work FOLDER --chunks [--tokenizer HF_FOLDER] [--megabytes 60]

--chunks is for a machine that has other work: one process, chunk after chunk of the corpus, each through encode_batch_fast of its texts, the same
with its ids as lists, and all that a worker of ours does with it, in turns; medians of the CPU seconds of each chunk beside encode_batch_fast's.

Makes its own corpus (Python files and texts installed with the interpreter, repeated to size) and trains a 32k byte-level BPE unless one is given.
    raw          encode_batch of all texts, already in memory, with as many threads as we have workers
    raw fast     the same with encode_batch_fast, which leaves out character offsets; raw fastokens: with fastokens
    ours         JSON lines to finished, checksummed shards; from before the workers start to the last shard; with the C library's malloc
    mimalloc     ours with the extra fast-malloc; raw fast mimalloc, datatrove mimalloc: these with the same library preloaded
    fastokens    ours with tokenizer_backend = "fastokens", its comparison with Hugging Face's left out as start-up
    megatron-lm  JSON lines to .bin/.idx; from when its pool is up to the last document, as it prints itself
    datatrove    JSON lines to .ds and its index, not shuffled, a file for each worker; from before its workers start to their end. PYTHON: the
                 interpreter of an environment with datatrove[io,processing] (it need not have ours)
Rates are of UTF-8 text. Start-up (imports) is left out of all; "whole command" has it for all but the raw sides. CPU seconds count every process and
thread, less those of the same command on one document for each worker, so that all of them start: where other work shares the cores they compare
better than the clock.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

CODE_PATTERNS = ("*.py", "*.md", "*.rst", "*.txt")
BATCH_DOCUMENTS = 1000


def main() -> None:
    """Make corpus and tokenizer once, then measure in rounds."""
    arguments = _arguments()
    if arguments.measure:
        print("RESULT " + json.dumps(MEASURES[arguments.measure](arguments)))
        return
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(work / f"corpus_{arguments.megabytes}.jsonl", arguments.megabytes)
    arguments.tokenizer = arguments.tokenizer or train_tokenizer(work / "tokenizer", corpus)
    if arguments.chunks:
        compare_chunks(corpus, arguments.tokenizer)
        return
    others = {
        "raw fast mimalloc": arguments.mimalloc,
        "mimalloc": arguments.mimalloc,
        "raw fastokens": arguments.fastokens,
        "fastokens": arguments.fastokens,
        "megatron-lm": arguments.megatron_lm,
        "datatrove": arguments.datatrove,
        "datatrove mimalloc": arguments.datatrove and arguments.mimalloc,
    }
    names = ["raw", "raw fast", "ours", *(name for name, given in others.items() if given)]
    print("".join(f"{name} is left out: its option was not given\n" for name, given in others.items() if not given), end="")
    few = make_few_documents(work / "few.jsonl", corpus, arguments.workers)
    start_up = {name: measure(name, arguments, few)["cpu"] for name in names if not name.startswith("raw")}
    print(f"start-up, CPU s: {start_up}", flush=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(arguments.runs):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found = measure(name, arguments, corpus)
            results[name].append({**found, "cpu": round(found["cpu"] - start_up.get(name, 0.0), 2)})
            print(f"run {number + 1}: {name}: {results[name][-1]}", flush=True)
    report(results, corpus, arguments)


def make_corpus(path: Path, megabytes: int) -> Path:
    """JSON lines with the texts installed beside the interpreter, in a fixed order, repeated until they reach the size."""
    if path.exists():
        return path
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    files = sorted({file for root in roots for pattern in CODE_PATTERNS for file in root.rglob(pattern)})
    size, documents, temporary = 0, 0, path.with_suffix(".tmp")
    with temporary.open("w") as out:
        while size < megabytes * 1_000_000:
            for file in files:
                try:
                    text = file.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if not 200 <= len(text) <= 200_000:
                    continue
                out.write(json.dumps({"text": text}) + "\n")
                size, documents = size + len(text.encode()), documents + 1
                if size >= megabytes * 1_000_000:
                    break
    temporary.replace(path)
    return path


def make_few_documents(path: Path, corpus: Path, workers: int) -> Path:
    """The first line of the corpus, once for each worker."""
    with corpus.open() as file:
        path.write_text(file.readline() * workers)
    return path


def train_tokenizer(folder: Path, corpus: Path) -> Path:
    """A 32k byte-level BPE as LLaMA 3 and Granite have them, trained on the first 8 MB."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if (folder / "tokenizer_config.json").exists():
        return folder
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(corpus, 8_000_000), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    return folder


def _texts(corpus: Path, limit: int | None = None) -> list[str]:
    texts, size = [], 0
    with corpus.open() as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if limit is not None and size >= limit:
                break
    return texts


def compare_chunks(corpus: Path, tokenizer: Path) -> None:
    """Print what a worker's chunk costs beside its tokenization alone."""
    from megatron_prism.data_prep import inputs, worker
    from megatron_prism.data_prep.documents import Extract, read_chunk
    from megatron_prism.data_prep.tokenizer import limit_threads, load_encoder, prepare_tokenizer

    limit_threads()
    with tempfile.TemporaryDirectory() as folder:
        worker._tokenizer = prepare_tokenizer(tokenizer, Path(folder))
    worker._encode = load_encoder(worker._tokenizer)
    raw, extract = _raw_encoder("raw fast", tokenizer / "tokenizer.json"), Extract("text", None, 0)
    seconds: dict[str, list[float]] = {"encode_batch_fast": [], "with ids": [], "a worker": []}
    for number, start in enumerate(range(0, corpus.stat().st_size, inputs.CHUNK_BYTES)):
        chunk = (str(corpus), start, start + inputs.CHUNK_BYTES)
        texts = read_chunk("range", chunk, extract).texts
        work = [
            ("encode_batch_fast", lambda texts=texts: sum(map(len, raw(texts)))),
            ("with ids", lambda texts=texts: sum(len(encoding.ids) for encoding in raw(texts))),
            ("a worker", lambda chunk=chunk: worker.tokenise("range", chunk, extract)),
        ]
        for name, run in work[number % 3 :] + work[: number % 3]:
            before = time.process_time()
            run()
            seconds[name].append(time.process_time() - before)
    for name, found in seconds.items():
        ratios = [own / alone for own, alone in zip(found, seconds["encode_batch_fast"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {sum(found):.1f} CPU s, median ratio {quarters[1]:.3f} (quarters {quarters[0]:.3f} and {quarters[2]:.3f}), {len(found)} chunks"
        )


def measure(name: str, arguments: argparse.Namespace, corpus: Path) -> dict[str, float]:
    """One measurement, in a process of its own. seconds, documents, tokens; cpu: seconds of all its processes; whole: of the command."""
    if name == "megatron-lm":
        return _run_megatron_lm(arguments, corpus)
    threads = {"RAYON_NUM_THREADS": str(arguments.workers), "TOKENIZERS_PARALLELISM": "true"} if name.startswith("raw") else {}
    threads |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} if name.startswith("datatrove") else {}  # as many threads as workers
    if name.endswith(" mimalloc"):
        threads["LD_PRELOAD"] = _mimalloc()
    given = {"--work": arguments.work, "--tokenizer": arguments.tokenizer, "--corpus": corpus, "--workers": arguments.workers, "--measure": name}
    python = str(arguments.datatrove) if name.startswith("datatrove") else sys.executable
    command = [python, __file__, *(str(word) for pair in given.items() for word in pair)]
    done, clock = _run(command, threads)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return {**clock, **json.loads(done.stdout.rpartition("RESULT ")[2])}


def _mimalloc() -> str:
    from megatron_prism.data_prep import allocator

    path = allocator._mimalloc()
    if path is None:
        raise SystemExit("--mimalloc needs the package: pip install 'megatron-prism[fast-malloc]'")
    return path


def _run(command: list[str], environment: dict[str, str]) -> tuple["subprocess.CompletedProcess[str]", dict[str, float]]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    whole, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, {"whole": round(whole, 2), "cpu": round(cpu, 2)}


def _raw(arguments: argparse.Namespace) -> dict[str, float]:
    encode = _raw_encoder(arguments.measure, arguments.tokenizer / "tokenizer.json")
    texts = _texts(arguments.corpus)
    encode(texts[:100])
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokens += sum(map(len, encode(texts[start : start + BATCH_DOCUMENTS])))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": round(seconds, 3), "cpu": round(cpu, 2), "documents": len(texts), "tokens": tokens + len(texts)}


def _raw_encoder(name: str, file: Path) -> Any:
    """Texts to something of as many parts as each has tokens."""
    from tokenizers import Tokenizer

    if name == "raw fastokens":
        from megatron_prism.data_prep import backends

        return backends.load(file.read_text())
    tokenizer = Tokenizer.from_file(str(file))
    return partial(tokenizer.encode_batch if name == "raw" else tokenizer.encode_batch_fast, add_special_tokens=False)


def _ours(arguments: argparse.Namespace) -> dict[str, float]:
    from megatron_prism.data_prep import allocator, inputs, prepare
    from megatron_prism.data_prep.settings import PrepConfig, SourceConfig

    output = arguments.work / "ours"
    if arguments.measure == "ours":
        allocator._mimalloc = lambda: None
    inputs.CHUNK_BYTES = min(inputs.CHUNK_BYTES, arguments.corpus.stat().st_size // arguments.workers)  # a chunk for each worker of a few documents
    shutil.rmtree(output, ignore_errors=True)
    source = SourceConfig(name="corpus", paths=[str(arguments.corpus)])
    backend = "fastokens" if arguments.measure == "fastokens" else "hf"
    config = PrepConfig(output=output, tokenizer=arguments.tokenizer, tokenizer_backend=backend, source=[source], workers=arguments.workers)
    result = prepare.prepare(config)
    prepare.finish(config)
    (report,) = result.sources
    return {"seconds": round(result.seconds, 3), "documents": report.documents, "tokens": report.tokens}


def _datatrove(arguments: argparse.Namespace) -> dict[str, float]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    output = arguments.work / "datatrove"
    shutil.rmtree(output, ignore_errors=True)
    documents = _split(arguments.corpus, output / "input", arguments.workers)
    end = json.loads((arguments.tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    tokenise = DocumentTokenizer(str(output / "tokens"), str(arguments.tokenizer / "tokenizer.json"), eos_token=end, shuffle_documents=False)
    steps = [JsonlReader(str(output / "input")), tokenise]
    shares = {"tasks": arguments.workers, "workers": arguments.workers}
    # spawn: the CPU seconds of a forkserver's children are not counted for this process
    executor = LocalPipelineExecutor(steps, **shares, logging_dir=str(output / "logs"), start_method="spawn")
    started = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - started
    tokens = sum(file.stat().st_size for file in (output / "tokens").glob("*.ds")) // tokenise.token_size
    return {"seconds": round(seconds, 3), "documents": documents, "tokens": tokens}


def _split(corpus: Path, folder: Path, parts: int) -> int:
    """The lines of a file in as many files of about the same size; how many lines."""
    folder.mkdir(parents=True)
    lines = corpus.read_bytes().splitlines(keepends=True)
    sizes = [0] * parts
    files = [(folder / f"{part}.jsonl").open("wb") for part in range(parts)]
    for line in lines:
        part = sizes.index(min(sizes))
        files[part].write(line)
        sizes[part] += len(line)
    for file in files:
        file.close()
    return len(lines)


MEASURES: dict[str, Any] = {
    **dict.fromkeys(("raw", "raw fast", "raw fast mimalloc", "raw fastokens"), _raw),
    **dict.fromkeys(("ours", "mimalloc", "fastokens"), _ours),
    **dict.fromkeys(("datatrove", "datatrove mimalloc"), _datatrove),
}


def _run_megatron_lm(arguments: argparse.Namespace, corpus: Path) -> dict[str, float]:
    """Its own script, unchanged, with its own megatron.core. Its last progress line gives documents per second since its pool was up."""
    root = arguments.megatron_lm.resolve()
    prefix = arguments.work / "megatron_lm"
    documents = sum(1 for _ in corpus.open())
    given = {"--input": corpus, "--output-prefix": prefix, "--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": arguments.tokenizer}
    given |= {"--workers": arguments.workers, "--log-interval": documents}
    command = [sys.executable, str(root / "tools/preprocess_data.py"), "--append-eod", *(str(word) for pair in given.items() for word in pair)]
    done, clock = _run(command, {"PYTHONPATH": str(root)})
    rate = re.search(rf"Processed {documents} documents \(([\d.]+) docs/s", done.stderr)
    if done.returncode or rate is None:
        raise SystemExit(f"megatron-lm failed:\n{done.stdout}\n{done.stderr[-3000:]}")
    tokens = (prefix.parent / f"{prefix.name}_text_document.bin").stat().st_size // 2
    return {**clock, "seconds": round(documents / float(rate[1]), 3), "documents": documents, "tokens": tokens}


def report(results: dict[str, list[dict[str, float]]], corpus: Path, arguments: argparse.Namespace) -> None:
    """Medians as a Markdown table, with the versions that made them."""
    megabytes = sum(len(text.encode()) for text in _texts(corpus)) / 1e6
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    cpu = {name: statistics.median(run["cpu"] for run in runs) for name, runs in results.items()}
    documents = results["ours"][0]["documents"]
    print(f"\n{megabytes:.1f} MB of text, {documents:,} documents, {arguments.workers} workers, median of {arguments.runs} runs\n")
    print("| | seconds | spread | MB/s | tokens/s | ours is faster by | CPU s | ours needs fewer by | whole command, s | tokens |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        spread = f"{min(run['seconds'] for run in runs):.1f}-{max(run['seconds'] for run in runs):.1f}"
        whole = f"{statistics.median(run['whole'] for run in runs):.1f}" if not name.startswith("raw") else ""
        tokens = runs[0]["tokens"]
        rates = f"{megabytes / seconds[name]:.2f} | {tokens / seconds[name]:,.0f} | {seconds[name] / seconds['ours']:.2f}x"
        print(f"| {name} | {seconds[name]:.2f} | {spread} | {rates} | {cpu[name]:.1f} | {cpu[name] / cpu['ours']:.2f}x | {whole} | {tokens:,.0f} |")
    extras = {"fastokens": arguments.fastokens, "cmeel-mimalloc": arguments.mimalloc}
    packages = ("tokenizers", "transformers", "numpy", "megatron-prism", *(name for name, given in extras.items() if given))
    versions = {package: metadata.version(package) for package in packages}
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    theirs = f"Megatron-LM {_version(arguments.megatron_lm)}, datatrove {_datatrove_version(arguments.datatrove)}"
    print(f"\nPython {platform.python_version()}, {versions}, {theirs}, {machine}")


def _version(checkout: Path | None) -> str:
    if checkout is None:
        return "not run"
    found: dict[str, Any] = {}
    exec((checkout / "megatron/core/package_info.py").read_text(), found)
    return "core " + str(found["__version__"])


def _datatrove_version(python: Path | None) -> str:
    if python is None:
        return "not run"
    code = "from importlib.metadata import version as v; print(v('datatrove') + ' with tokenizers ' + v('tokenizers'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, tokenizer and outputs")
    parser.add_argument("--megatron-lm", type=Path, help="checkout of NVIDIA/Megatron-LM to run beside ours")
    parser.add_argument("--datatrove", type=Path, help="interpreter of an environment with datatrove[io,processing]")
    parser.add_argument("--fastokens", action="store_true", help="ours with the faster tokenizer too")
    parser.add_argument("--mimalloc", action="store_true", help="ours, encode_batch_fast and datatrove with the faster malloc too")
    parser.add_argument("--chunks", action="store_true", help="instead of all that: a worker's chunks beside their tokenization alone, in turns")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder with a tokenizer.json; default: train one")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
