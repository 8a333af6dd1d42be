import pytest

from megatron_prism import artifact


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Every artifact asks git for the commit, which takes longer than all else here."""
    monkeypatch.setattr(artifact, "git_commit", lambda: "0123456789abcdef0123456789abcdef01234567+changes")
