"""A cluster file: its schema is strict, and a job that the place would never start is refused with the rule, the values and the fix."""

from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.launch.cluster import ClusterConfig, load_cluster, problems
from megatron_prism.launch.job import Job

SHORT = {"max_hours": 24, "max_nodes": 4, "gpus_per_node": 8, "needs_account": True}


def _place(**more: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"partition": "short", "partitions": {"short": SHORT}, **more})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount = 'lab'", "unknown key acount; did you mean account?"),
        ("requeues = -1", "requeues=-1: input should be greater than or equal to 0"),
        ("starter = 'mpirun'", "starter=\"mpirun\": input should be 'srun', 'torchrun' or 'ft_launcher'"),
        ("partition = 'shrot'\n[partitions.short]", "partition=shrot is none of the partitions described here; did you mean short?"),
        ("container = 'a.sqsh'\nvenv = '/v'", "container=a.sqsh and venv=/v are both set: the job runs in one of them; drop the other"),
        ("mounts = ['/a:/a']", "mounts=['/a:/a'] are of a container, and none is set; set container, or drop mounts"),
        (
            "env = { WANDB_API_KEY = 'x1' }",
            'env.WANDB_API_KEY looks like a secret and would stand in a script; name it alone: pass_env = ["WANDB_API_KEY"]',
        ),
        ("env = { 'A B' = 'x' }", "should match pattern"),
        ("pass_env = ['A;rm -rf x']", "should match pattern"),
        ('account = "a\\nb"', "should match pattern"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load_cluster(tmp_path / "cluster.toml")
    assert message in str(error.value)
    assert "x1" not in str(error.value), "a secret is not repeated"


def test_words_that_only_look_like_a_secret_are_let_through() -> None:
    assert ClusterConfig(env={"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de"}).env["KEYBOARD"] == "de"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text("account = 'lab'\npartition = 'short'\n")
    place = load_cluster(tmp_path / "cluster.toml", account="other lab", partition=None)
    assert (place.account, place.partition) == ("other lab", "short")
    assert load_cluster(None) == ClusterConfig()


def test_a_job_that_the_partition_would_never_start_is_refused_with_everything_that_is_wrong() -> None:
    assert problems(Job("train", ranks=80, nodes=5, gpus_per_node=16, hours=30), _place()) == [
        "account is missing: partition short takes no job without one (needs_account); set account in the cluster file, or --account",
        "hours=30 is more than partition short allows (max_hours=24); try hours=24: "
        "a training run that its time limit stops has saved, and is queued again",
        "nodes=5 is more than partition short allows (max_nodes=4); try nodes=4",
        "gpus=16 is more than a node of partition short has (gpus_per_node=8); try nodes=10 gpus=8",
    ]


def test_a_job_that_fits_or_a_partition_that_nothing_is_known_of_is_let_through() -> None:
    job = Job("train", ranks=32, nodes=4, gpus_per_node=8, hours=24)
    assert problems(job, _place(account="lab")) == []
    assert problems(job, ClusterConfig(partition="other")) == [] == problems(job, ClusterConfig())
