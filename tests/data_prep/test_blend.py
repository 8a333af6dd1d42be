"""A blend.toml says what it means, wherever it lies; mistakes are named."""

import numpy as np
import pytest

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.data_prep.blend import Blend, BlendSource, load_blend, write_blend
from megatron_prism.data_prep.manifest import Manifest, write_manifest
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError


class Recipe(Block):
    name: str = "x"


def write_source(folder, tokens):
    writer = ShardWriter(folder / "shard_00000", "uint16")
    writer.add(np.arange(tokens, dtype=np.uint16), np.array([tokens - 3, 3], dtype=np.int32), 5)
    write_manifest(Manifest(folder, folder.parent.name, "train", "hash", 400, 0, "uint16", 5, (writer.finish(),)))


def test_a_blend_reads_back_as_written(tmp_path):
    blend = Blend(
        7, (BlendSource("a", "math", 2.5, tmp_path / "a/train", tmp_path / "a/validation"), BlendSource("b", "code", 1.0, tmp_path / "b/train"))
    )
    assert load_blend(write_blend(tmp_path / "blend.toml", blend)) == blend
    assert str(tmp_path) not in (tmp_path / "blend.toml").read_text()


def test_a_blend_by_hand_joins_outputs_beside_it(tmp_path):
    for name, tokens in (("a", 50), ("b", 80)):
        write_source(tmp_path / "prep" / name / "train", tokens)
    (tmp_path / "mine.toml").write_text(
        'seed = 3\n[[source]]\nname = "a"\nweight = 1\ntrain = "prep/a/train"\n[[source]]\nname = "b"\nweight = 3\ntrain = "prep/b/train"\n'
    )
    blend = load_blend(tmp_path / "mine.toml")
    assert [manifest.num_tokens for manifest in blend.manifests()] == [50, 80]
    assert blend.manifests("validation") == []
    sampler = blend.sampler(seq_len=16)
    same = Sampler([np.array([47, 3]), np.array([77, 3])], [1, 3], 16, 3, names=["a", "b"])
    assert [sampler.sample(index) for index in range(50)] == [same.sample(index) for index in range(50)]
    assert sampler.counts(400).tolist() == [100, 300]


def test_an_unfinished_prep_output_is_refused_by_name(tmp_path):
    output = artifact.begin(tmp_path / "prep", "prep", Recipe())
    write_source(output / "a" / "train", 20)
    blend = Blend(1, (BlendSource("a", "math", 1.0, output / "a/train"),))
    write_blend(output / "blend.toml", blend)
    for reads in (lambda: load_blend(output), lambda: load_blend(output / "blend.toml"), blend.manifests):
        with pytest.raises(UserError, match="COMPLETE"):
            reads()
    artifact.complete(output)
    assert load_blend(output) == blend and len(blend.manifests()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = 1\nsource = []\n", "at least one"),
        ('seed = 1\n[[source]]\nname = "a"\nweight = 0\ntrain = "a"\n', "greater than 0"),
        ('seed = 1\n[[source]]\nname = "a"\nwieght = 1\ntrain = "a"\n', "did you mean|unknown key"),
        ('seed = 1\n[[source]]\nname = "a"\nweight = 1\ntrain = "a"\n[[source]]\nname = "a"\nweight = 1\ntrain = "b"\n', "name of its own"),
    ],
)
def test_mistakes_in_a_blend_are_named(tmp_path, text, words):
    (tmp_path / "blend.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_blend(tmp_path / "blend.toml")


def test_a_blend_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError):
        load_blend(tmp_path / "blend.toml")
