"""`log.prometheus`: a real scrape of a real run, on loopback alone, and nothing but that."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection

import psutil
import pytest
from prism_command import prism
from prometheus_client.parser import text_string_to_metric_families
from training import from_random, recipe

from megatron_prism.engine.log_settings import LogConfig, check_log
from megatron_prism.engine.prometheus import Endpoint
from megatron_prism.errors import UserError


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint of a run, at a port that the system chose."""
    found = Endpoint(tmp_path_factory.mktemp("run"), 0, {"steps": 10})
    yield found
    found.close()


def _port(endpoint: Endpoint) -> int:
    return int(endpoint.server.server_address[1])


def _ask(port: int, method: str, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = HTTPConnection(host, port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _scrape(address: str) -> dict[str, float]:
    """Every sample, as Prometheus' own parser reads the answer."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {f"{sample.name}{''.join(f'[{value}]' for value in sample.labels.values())}": sample.value for sample in samples}


def test_a_training_is_scraped_while_it_runs_and_on_loopback_alone(tmp_path):
    words = recipe(
        tmp_path, tmp_path / "run", **from_random(tmp_path), steps=100_000, log__prometheus=0, checkpoint__save_interval=5, validation__interval=5
    )
    command = [sys.executable, "-m", "megatron_prism", "train", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}) as run:
        try:
            seen = ""
            while "step 6/" not in seen:
                line = run.stderr.readline()
                assert line, seen
                seen += line
            address = re.search(r"figures for Prometheus: (\S+)", seen).group(1)
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", address)
            first = _scrape(address)
            _refused_elsewhere(run.pid, int(address.split(":")[2].partition("/")[0]))
            for _ in range(20):
                run.stderr.readline()
            second = _scrape(address)
        finally:
            run.kill()
            run.stderr.read()
    lines = [float(found) for found in re.findall(r"loss (\d+\.\d+)  lr", seen)]
    assert first["prism_step"] >= 6 and first["prism_steps"] == 100_000 and first["prism_checkpoint_step"] % 5 == 0
    assert first["prism_checkpoints_total"] == first["prism_checkpoint_step"] / 5
    assert first["prism_tokens"] == first["prism_step"] * 8 * 32
    assert abs(first["prism_loss"] - lines[-1]) < 1.0 and 0 <= first["prism_checkpoint_age_seconds"] < 60
    assert {"prism_validation_loss", "prism_eta_seconds", "prism_tokens_per_second", "prism_grad_norm", "prism_learning_rate"} <= first.keys()
    assert {"prism_source_loss[code]", "prism_source_loss[math]", "prism_validation_source_loss[math]"} <= first.keys()
    assert second["prism_step"] > first["prism_step"] and second["prism_tokens"] > first["prism_tokens"]


def _refused_elsewhere(pid: int, port: int) -> None:
    """The process listens there on 127.0.0.1 alone, and no other address of this machine answers."""
    listening = [found.laddr.ip for found in psutil.Process(pid).net_connections("inet") if found.status == "LISTEN" and found.laddr.port == port]
    assert listening == ["127.0.0.1"]
    own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET]
    for address in {*own, "127.0.0.2"} - {"127.0.0.1"}:
        with socket.socket() as caller, pytest.raises(ConnectionRefusedError):
            caller.settimeout(10)
            caller.connect((address, port))


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics/", "/-/reload", "/.."])
def test_other_paths_are_not_found(endpoint, path):
    assert _ask(_port(endpoint), "GET", path) == (404, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "HEAD"])
def test_other_methods_are_refused(endpoint, method):
    assert _ask(_port(endpoint), method, "/metrics") == (405, b"")


def test_a_client_that_sends_rubbish_or_nothing_keeps_nobody_from_scraping(endpoint):
    with socket.socket() as rubbish, socket.socket() as silent:
        for caller in (rubbish, silent):
            caller.connect(("127.0.0.1", _port(endpoint)))
        rubbish.sendall(b"\x00\xff" * 20_000)
        begun = time.monotonic()
        assert _scrape(endpoint.address)["prism_steps"] == 10
        assert time.monotonic() - begun < 4


def test_figures_of_rl_have_names_of_their_own_and_texts_are_no_figures(endpoint):
    endpoint.figures.take(
        {
            "step": 3,
            "reward": 0.5,
            "reward/sums": 0.25,
            "kl": 0.01,
            "mismatch": 0.002,
            "seconds/sync": 1.5,
            "alarm": "KL",
            "responses": 64,
            "bad_step": {"action": "skip"},
        }
    )
    found = _scrape(endpoint.address)
    assert (found["prism_reward"], found["prism_domain_reward[sums]"], found["prism_kl"], found["prism_mismatch"]) == (0.5, 0.25, 0.01, 0.002)
    assert found["prism_phase_seconds[sync]"] == 1.5 and found["prism_responses"] == 64
    assert found["prism_bad_steps_total"] == 1 and found["prism_rollbacks_total"] == 0
    assert not any("alarm" in name for name in found)


def test_a_port_that_is_taken_is_refused_before_any_work(tmp_path, endpoint):
    words = recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), log__prometheus=_port(endpoint))
    done = prism("train", *words)
    assert done.returncode == 2 and f"log.prometheus={_port(endpoint)}" in done.stderr and "log.prometheus=0" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_its_package_the_endpoint_is_refused(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "prometheus_client" else found(name, *rest))
    check_log(LogConfig(), begins=True)
    with pytest.raises(UserError, match="pip install prometheus_client"):
        check_log(LogConfig(prometheus=9400), begins=True)


@pytest.mark.parametrize("port", [-1, 65_536, True, "127.0.0.1:9400"])
def test_there_is_a_port_and_no_address_to_choose(port):
    with pytest.raises(ValueError, match="prometheus"):
        LogConfig(prometheus=port)
