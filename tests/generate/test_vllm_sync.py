"""New weights in vLLM servers that run: through shared memory, with the old cache dropped, by version, and also in a server that had to start again.

fake_vllm.py stands for the server: the one weight of its model shifts the tokens that it writes. test_vllm_sync_real.py runs vLLM itself.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import stand_in
from safetensors.torch import save_file
from tiny_hf import make_tiny_tokenizer

from megatron_prism import generate
from megatron_prism.errors import UserError
from megatron_prism.generate import Completion, Request, Sampling, vllm_server, weights_folder
from megatron_prism.generate.vllm_backend import VllmGenerator
from megatron_prism.generate.vllm_server import PYTHON

NAME = "model.weight"
REQUESTS = [Request((place + 1,), place) for place in range(12)]
shared_memory = pytest.mark.skipif(not os.access(weights_folder.SHARED, os.W_OK), reason="no /dev/shm here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PYTHON, str(stand_in(tmp_path)))
    model = make_tiny_tokenizer(tmp_path / "model")
    (model / "config.json").write_text('{"max_position_embeddings": 64, "eos_token_id": 0}')
    save_file({NAME: torch.zeros(3, dtype=torch.uint8)}, model / "model.safetensors")
    return model


def open_fake(folder: Path, **settings: object) -> VllmGenerator:
    found = generate.load(folder, "vllm", **{"batch_size": 4, **settings})
    assert isinstance(found, VllmGenerator)
    return found


def weight(value: int) -> Iterator[tuple[str, torch.Tensor]]:
    return iter({NAME: torch.full((3,), value, dtype=torch.uint8)}.items())


def shifts(generator: VllmGenerator) -> set[tuple[int, int]]:
    """(shift, version) of what is written: the weight that the servers hold, and what its completions say."""
    done: dict[int, Completion] = {}
    generator.generate_requests(REQUESTS, Sampling(max_new_tokens=2), lambda request, found: done.update({request.place: found}))
    return {(done[request.place].tokens[0] - request.prompt[0] - 1, done[request.place].weights_version) for request in REQUESTS}


def test_every_server_gets_the_weights_and_completions_their_version(folder: Path) -> None:
    with open_fake(folder, servers=2) as generator:
        assert shifts(generator) == {(0, 0)}
        generator.update_weights(weight(10), version=300)
        assert shifts(generator) == {(10, 300)} and generator.weights_version == 300
        generator.update_weights(weight(20))
        assert shifts(generator) == {(20, 301)}


def test_a_server_that_dies_later_starts_with_the_newest_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with those of the folder that it was opened with."""
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_DIES_AT", "17")  # one at the start, 12 before the update, and the fourth after it
    with open_fake(folder) as generator:
        assert shifts(generator) == {(0, 0)}
        generator.update_weights(weight(10), version=1)
        assert shifts(generator) == {(10, 1)}
        assert generator.servers[0].starts == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_died_or_hangs_at_an_update_starts_with_the_new_weights(
    how: signal.Signals, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for text meanwhile, so that it is the update that notices."""
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    with open_fake(folder) as generator:
        generator.update_weights(weight(10), version=1)
        monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 2.0)
        os.kill(int((tmp_path / "pids").read_text().split()[0]), how)
        generator.update_weights(weight(20), version=2)
        assert shifts(generator) == {(20, 2)} and generator.servers[0].starts == 2


@shared_memory
def test_no_disk_is_touched_and_one_copy_is_kept(folder: Path) -> None:
    before = set(weights_folder.SHARED.glob("prism-new-weights-*"))

    def kept() -> set[Path]:
        return set(weights_folder.SHARED.glob("prism-new-weights-*")) - before

    with open_fake(folder) as generator:
        for value in (10, 20):
            generator.update_weights(weight(value))
            assert kept() == {generator.servers[0].folder}
            assert shifts(generator) == {(value, value // 10)}
    assert kept() == set()


def test_without_room_in_shared_memory_a_disk_is_used_and_said_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights_folder, "SPARE_BYTES", 2**60)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weights_folder._say_once.cache_clear()
    with caplog.at_level(logging.WARNING), open_fake(folder) as generator:
        for value in (10, 20):
            generator.update_weights(weight(value))
            assert generator.servers[0].folder.parent == tmp_path and shifts(generator) == {(value, value // 10)}
    assert [record.message for record in caplog.records if "files in temporary space" in record.message] != []
    assert sum("files in temporary space" in record.message for record in caplog.records) == 1


def test_a_cache_that_is_not_dropped_at_once_is_asked_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FAKE_KEEPS_CACHE", "3")
    with open_fake(folder) as generator:
        generator.update_weights(weight(10))
    asked = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert asked == ["/pause?mode=abort", "/collective_rpc", *["/reset_prefix_cache"] * 4, "/resume"]


def test_requests_under_way_are_finished_with_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    found: set[tuple[int, int]] = set()
    with open_fake(folder) as generator:
        update = threading.Thread(target=generator.update_weights, args=(weight(10), 5))

        def keep(request: Request, done: Completion) -> None:
            found.add((done.tokens[0] - request.prompt[0] - 1, done.weights_version))
            if not update.ident:
                update.start()

        generator.generate_requests(REQUESTS * 2, Sampling(max_new_tokens=2), keep)
        update.join()
        assert found == {(0, 0)} and shifts(generator) == {(10, 5)}


def test_weights_that_are_not_the_models_change_nothing(folder: Path) -> None:
    wrong = {
        "was not given 1 of the model's 1 weights, such as model.weight": [],
        "no weight named 'model.lost'": [*weight(1), ("model.lost", torch.zeros(1))],
        r"has shape \(3,\) in the model, not \(4,\)": [(NAME, torch.zeros(4))],
        "twice": [*weight(1), *weight(1)],
    }
    with open_fake(folder) as generator:
        for message, tensors in wrong.items():
            with pytest.raises(UserError, match=message):
                generator.update_weights(tensors)
        assert shifts(generator) == {(0, 0)}


def test_a_switch_that_fails_leaves_no_mixture_to_write_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_fake(folder, servers=2) as generator:
        second = generator.servers[1]
        with monkeypatch.context() as patch, pytest.raises(UserError, match="refused"):
            patch.setattr(second, "read_weights", lambda folder: (_ for _ in ()).throw(UserError("vllm refused a request")))
            generator.update_weights(weight(10))
        assert [server.folder for server in generator.servers] == [folder, folder]
        with pytest.raises(UserError, match="a mixture"):
            shifts(generator)
        generator.update_weights(weight(20))
        assert shifts(generator) == {(20, 1)}


def test_servers_sleep_only_where_they_were_started_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    with open_fake(folder) as generator, pytest.raises(UserError, match="enable-sleep-mode = true"):
        generator.sleep()
    with open_fake(folder, server_flags={"enable-sleep-mode": True}) as generator:
        generator.sleep()
        with pytest.raises(UserError, match=r"asleep.*call wake\(\) first"):
            shifts(generator)
        with pytest.raises(UserError, match=r"takes no new weights asleep.*call wake\(\) first"):
            generator.update_weights(weight(10))
        generator.wake()
        assert shifts(generator) == {(0, 0)}
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == ["/sleep?level=1&mode=abort", "/wake_up"]
