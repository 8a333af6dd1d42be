"""What others wrote is data: it is refused, by name, where it would run code, lead out of its folder, or carry a secret into an output."""

import ast
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_prism import artifact, secrets
from megatron_prism.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("megatron_prism", "kernels", "launch", "data_prep") for path in (ROOT / folder).rglob("*.py"))

# --- code that could run what a file says ------------------------------------------------------------------------------------------------------

REASONS = {
    ("megatron_prism/evals/sources/livecodebench.py", "pickle.Unpickler"): "knows no names: text comes out, or an error",
    ("megatron_prism/engine/untrusted.py", "pickle.Unpickler"): "knows the names of facts in a checkpoint's metadata alone",
    ("megatron_prism/engine/ranks.py", "pickle.loads"): "an error of this rank, taken apart a line before, to see whether the others could make it",
    ("megatron_prism/grading/worker.py", "pickle.loads"): "a question from the parent process, over a pipe",
    ("megatron_prism/grading/sandbox/supervisor.py", "exec"): "the sandbox itself: a graded program runs in a process that can do nothing else",
    ("megatron_prism/grading/sandbox/supervisor.py", "__import__"): "modules that graded programs may have, from a table, before the sandbox closes",
    ("data_prep/inputs.py", "exec_module"): "`function` of a data recipe: code that the recipe's own author names",
    ("data_prep/inputs.py", "import_module"): "`function` of a data recipe: code that the recipe's own author names",
    ("megatron_prism/stages/__init__.py", "import_module"): "`prism stage my.module`, or a stage of one's own in a pipeline.toml",
    ("megatron_prism/analysis/landscape_recipe.py", "import_module"): "`scorer` of a landscape recipe: code that the recipe's own author names",
    ("megatron_prism/grading/graders.py", "import_module"): "packages of a table in the source",
    ("megatron_prism/engine/bench/hugging_face.py", "import_module"): "a name in the source",
    ("megatron_prism/engine/torch_private.py", "import_module"): "a module of torch, named in the source",
}
"""(file, call) -> why it may stand there. Whoever adds one says what names the code, and docs/security.md lists it where a user can."""

LOADERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "marshal.loads", "dill.load", "joblib.load"}
RUNNERS = {"eval", "exec", "import_module", "__import__", "exec_module", "run_path", "run_module", "os.system", "os.popen"}


def risky(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) of everything in a module that can turn text or a file into running code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += [(node.lineno, name) for base in node.bases if (name := ast.unparse(base)) in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = name.rpartition(".")[2]
        if name in LOADERS or name in RUNNERS or last in {"import_module", "exec_module", "run_path", "run_module"}:
            found.append((node.lineno, last if last in RUNNERS else name))
        if name in {"torch.load", "load_state_dict_from_file"} and given.get("weights_only") != "True":
            found.append((node.lineno, "torch.load"))
        if last == "load" and name.startswith(("np.", "numpy.")) and given.get("allow_pickle", "False") != "False":
            found.append((node.lineno, "allow_pickle"))
        found += [(node.lineno, key) for key in ("shell", "trust_remote_code") if given.get(key, "False") != "False"]
        if last == "from_pretrained" and name.startswith("Auto") and given.get("trust_remote_code") != "False":
            found.append((node.lineno, "trust_remote_code"))
    return found


def test_nothing_in_the_source_can_run_what_a_file_says_but_the_places_with_a_reason() -> None:
    found = {(str(path.relative_to(ROOT)), what): line for path in SOURCES for line, what in risky(ast.parse(path.read_text(encoding="utf-8")))}
    places = {key for key in found if not key[0].startswith(("megatron_prism/data_prep", "megatron_prism/launch", "megatron_prism/kernels"))}
    assert sorted(places - REASONS.keys()) == []
    assert sorted(REASONS.keys() - places) == [], "reasons for what is no more"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "class Mine(pickle.Unpickler): ...",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "importlib.import_module(name)",
        "spec.loader.exec_module(module)",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder)",
    ],
)
def test_the_walk_over_the_source_sees_each_of_them(line: str) -> None:
    assert risky(ast.parse(line)), line


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True)", "np.load(path)", "subprocess.run(words, shell=False)", "model.eval()"])
def test_the_walk_lets_the_safe_form_pass(line: str) -> None:
    assert risky(ast.parse(line)) == []


# --- checkpoints -------------------------------------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a folder of its own choice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small torch_dist checkpoint with one tensor and one stored object."""
    import torch

    from megatron_prism.engine.sharded import EmptyObject, Piece, write_streaming

    folder = tmp_path / "sharded"
    folder.mkdir()
    write_streaming(folder, [Piece("table", [torch.ones(4, 2)]), EmptyObject("thing", None, 0)], 1)
    (folder / "checksums.json").unlink()  # whoever can forge a file can forge its checksum
    return folder


def test_metadata_that_names_a_function_is_refused_by_name_and_runs_nothing(sharded: Path, tmp_path: Path) -> None:
    from megatron_prism.engine.sharded import Reader

    (sharded / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata names posix\.mkdir, which could run code"):
        Reader(sharded)
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_reach_a_function_through_a_module_it_may_name(sharded: Path) -> None:
    from megatron_prism.engine.untrusted import MetadataReader

    (sharded / ".metadata").write_bytes(b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93.")
    with pytest.raises(UserError, match=r"names torch\.distributed\.checkpoint\.metadata\.os\.system"):
        MetadataReader(sharded).read_metadata()


@pytest.mark.parametrize("place", ["../elsewhere.distcp", "/etc/passwd"])
def test_metadata_cannot_name_data_files_elsewhere(sharded: Path, place: str) -> None:
    from megatron_prism.engine.sharded import Reader

    content = (sharded / ".metadata").read_bytes()
    metadata = pickle.loads(content)
    for info in metadata.storage_data.values():
        info.relative_path = place
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="which leads out of"):
        Reader(sharded)


def load_by_megatron(sharded: Path) -> object:
    """What a resumed run does with the folder: megatron-core's own loader, in a world of one."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_prism.engine import device, mcore, parallel

    parallel.start(device.setup("cpu"))
    tensor = ShardedTensor.from_rank_offsets("table", torch.zeros(4, 2), replica_id=0)
    return mcore.load_sharded({"table": tensor, "thing": ShardedObject("thing", None, (1,), (0,), replica_id=0)}, sharded)


@pytest.mark.parametrize("where", ["metadata", "common", "object"])
def test_a_planted_pickle_is_refused_by_megatron_cores_loader_too(sharded: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some guides on the web advise
    assert float(load_by_megatron(sharded)["table"].sum()) == 8.0  # type: ignore[index]
    evil = Evil(tmp_path / "ran")
    if where == "metadata":
        (sharded / ".metadata").write_bytes(pickle.dumps(evil))
    elif where == "common":
        torch.save({"args": evil}, sharded / "common.pt")
    else:
        metadata = pickle.loads((sharded / ".metadata").read_bytes())
        info = next(info for index, info in metadata.storage_data.items() if index.fqn.startswith("thing"))
        torch.save(evil, sharded / "evil.distcp")
        info.relative_path, info.offset, info.length = "evil.distcp", 0, (sharded / "evil.distcp").stat().st_size
        (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="could run code when it is read") as refusal:
        load_by_megatron(sharded)
    assert "mkdir" in str(refusal.value)
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "New", "auto_map": {"AutoTokenizer": ["evil.New", None]}}))
    with pytest.raises((ValueError, OSError)):
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


# --- lists of files ----------------------------------------------------------------------------------------------------------------------------

ELSEWHERE = ["../outside", "/etc/hostname", "a/../../outside", "link", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, beside a file of somebody else's that a link in it points to."""
    (tmp_path / "outside").write_text("secret")
    inner = tmp_path / "inner"
    (inner / "a").mkdir(parents=True)
    (inner / "a" / "file").write_text("mine")
    (inner / "link").symlink_to(tmp_path / "outside")
    return inner


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_listed_name_cannot_lead_out_of_its_folder(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="leads out of"):
        artifact.inside(folder, name, "manifest.json")


def test_a_listed_name_inside_is_its_path_and_a_linked_folder_is_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other_disk").symlink_to(folder)
    for root in (folder, tmp_path / "other_disk"):
        assert artifact.inside(root, "a/file", "manifest.json").read_text() == "mine"


class Recipe(BaseModel):
    """A stage's config, as small as it gets."""

    output: str = "out"
    arguments: dict[str, str] = {}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_complete_cannot_list_files_elsewhere(tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    artifact.begin(made, "prep", Recipe())
    artifact.complete(made)
    (tmp_path / "outside").write_text("secret")
    (made / "link").symlink_to(tmp_path / "outside")
    record = json.loads((made / "COMPLETE").read_text())
    (made / "COMPLETE").write_text(json.dumps(record | {"files": {**record["files"], name: 6}}))
    with pytest.raises(UserError, match=r"COMPLETE names .*leads out of"):
        artifact.require(made)


@pytest.mark.parametrize("name", ["../math/train/shard_00000", "/tmp/shard_00000", "linked"])
def test_a_manifest_cannot_list_shards_elsewhere(tmp_path: Path, name: str) -> None:
    from tiny_blend import write_tiny_blend

    from megatron_prism.data_prep.manifest import load_manifest

    write_tiny_blend(tmp_path / "data")
    split = tmp_path / "data" / "code" / "train"
    path = split / "manifest.json"
    content = json.loads(path.read_text())
    (split / "linked.bin").symlink_to("/etc/hostname")
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json names .*leads out of"):
        load_manifest(split)


def test_the_blend_of_an_output_cannot_name_folders_elsewhere_and_a_blend_of_ones_own_can(tmp_path: Path) -> None:
    from tiny_blend import write_tiny_blend

    from megatron_prism.data_prep.blend import load_blend

    blend = write_tiny_blend(tmp_path / "data")
    blend = blend if blend.is_file() else tmp_path / "data" / "blend.toml"
    text = blend.read_text().replace('"code/train"', '"../other/code/train"')
    assert "../other" in text
    blend.write_text(text)
    assert len(load_blend(blend).sources) == 2
    artifact.begin(tmp_path / "made", "prep", Recipe())
    (tmp_path / "made" / "blend.toml").write_text(text)
    artifact.complete(tmp_path / "made")
    with pytest.raises(UserError, match=r"blend\.toml names '\.\./other/code/train'"):
        load_blend(tmp_path / "made")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/hostname"])
def test_an_index_of_weights_cannot_list_files_elsewhere(tmp_path: Path, file: str) -> None:
    from megatron_prism.engine.hf import Reader

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"index\.json names .*leads out of"):
        Reader(tmp_path)


# --- secrets -----------------------------------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("word", "masked"),
    [
        (TOKEN, "***"),
        (f"--token-file={TOKEN}", "--token-file=***"),
        ("key=abc", "key=***"),
        ("--api-key=abc", "--api-key=***"),
        ("logging.wandb_key=0123", "logging.wandb_key=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("url=https://me:word@host/x", "url=https://***@host/x"),
        ("url=https://host/x?token=abc&page=2", "url=https://host/x?token=***&page=2"),
    ],
)
def test_what_looks_like_a_secret_is_masked(word: str, masked: str) -> None:
    assert secrets.mask(word) == masked


@pytest.mark.parametrize(
    "word", ["tokens=15_000_000_000", "tokenizer=path/hf_models/x", "pad_token=<pad>", "source.0.text_key=body", "log.wandb=team/project", "a@b.c"]
)
def test_ordinary_words_stay_as_they_are(word: str) -> None:
    assert secrets.mask(word) == word


def test_neither_a_token_of_the_command_line_nor_the_environment_is_in_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prism", "prep", f"--token={TOKEN}", "api_key=hush-hush"])
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    artifact.begin(tmp_path / "made", "prep", Recipe())
    artifact.annotate(tmp_path / "made", done=True)
    artifact.complete(tmp_path / "made")
    written = "".join(path.read_text() for path in (tmp_path / "made").iterdir())
    assert not any(secret in written for secret in (TOKEN, "hush-hush", "of-the-environment"))
    assert json.loads((tmp_path / "made" / "provenance.json").read_text())["command"] == ["prism", "prep", "--token=***", "api_key=***"]


def test_a_recipe_with_a_token_is_refused_before_anything_is_written_and_the_message_does_not_hold_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arguments\.hf_token holds what looks like a token") as refusal:
        artifact.begin(tmp_path / "made", "prep", Recipe(arguments={"hf_token": TOKEN}))
    assert TOKEN not in str(refusal.value)
    assert not (tmp_path / "made").exists()


def test_the_log_of_a_local_job_does_not_repeat_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prism.launch import job

    monkeypatch.setattr(job, "torchrun_argv", lambda asked: [sys.executable, "-c", "print('done')"])
    job.run_local(job.Job(stage="train", overrides=("steps=2", f"hub_token={TOKEN}")), tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert "steps=2" in text and "hub_token=" in text and "done" in text
    assert TOKEN not in text
