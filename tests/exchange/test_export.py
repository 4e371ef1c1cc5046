"""`scaleclip export`: from the shards of a run, whole or not at all, with its card, one tensor in memory at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from typer.testing import CliRunner

from exchange_cases import (
    TEXTS,
    assert_close,
    exported,
    image_features,
    loaded_by_card,
    pictures,
    random_model,
    small_preset,
    source_of,
    text_features,
)
from rank_jobs import train_run
from runs import SPLITS, run
from scaleclip.cli import app
from scaleclip.errors import ConfigError, RunError
from scaleclip.exchange import export as export_module
from scaleclip.exchange.export import check_target, prepare, write
from scaleclip.exchange.rules import same, to_ours, to_theirs
from scaleclip.exchange.source import open_source
from scaleclip.exchange.weights import in_memory, in_safetensors, write_safetensors
from scaleclip.local_ranks import run_ranks
from scaleclip.trained_model import load_model


@pytest.fixture(scope="module")
def sharded(tiny_config_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that two ranks trained under stage 3, with a bias and a head that does not leave."""
    folder = tmp_path_factory.mktemp("sharded") / "clip-17"
    settings = ["train.zero_stage=3", "train.samples=16", "checkpoint.every_steps=1", "optim.lr=0.01"]
    settings += ["train.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
    settings += ["model.projector={hidden: 16, dim: 8}", "loss.simclr_weight=0.1"]
    run_ranks(train_run, 2, tiny_config_path, [f"run.folder={folder}", *settings, SPLITS])
    return folder


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_a_run_of_two_ranks_under_stage_3(to: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if to == "transformers":
        output = run("export", sharded, "--to", to, "--out", tmp_path / "out")
        assert re.search(r"out: CLIPModel, \d MiB of weights", output)
    else:
        source = open_source(str(sharded))
        write(prepare(source, "open_clip"), source, tmp_path / "out")
    ours = load_model(str(sharded))
    assert (ours.step, ours.model_config.projector is None) == (2, False)
    monkeypatch.chdir(tmp_path / "out")
    loaded, images = loaded_by_card(Path.cwd()), pictures(32)
    assert_close(image_features(ours.model, images), loaded.encode_images(images))
    assert_close(text_features(ours.model, ours.tokenizer), loaded.encode_texts(TEXTS))


def test_a_checkpoint_by_its_own_folder(sharded: Path, tmp_path: Path) -> None:
    path = sharded / "checkpoints" / "step_00000001"
    first, second = open_source(str(path)), open_source(str(sharded))
    assert first.checkpoint is not None
    assert first.checkpoint.state.step == 1
    name = "image_projection.weight"
    assert not torch.equal(first.weights.read(name), second.weights.read(name))
    write(prepare(first, "transformers"), first, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["visual_projection.weight"], first.weights.read(name))
    assert stored["logit_scale"].shape == ()
    assert not [key for key in stored if "projector" in key]


def test_the_card_says_where_a_model_comes_from(sharded: Path, tmp_path: Path) -> None:
    source = open_source(str(sharded))
    write(prepare(source, "transformers"), source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license: other",
        "16 pairs seen, repeats included",
        "- tiny: 32 samples in 4 shards, texts caption; 0 could not be used",
        "global batch 8, 16 pairs in this stage, fp32",
        "peak learning rate 0.01",
        "- loss: softmax; text views: caption 1",
        "| unseen_clipart | image -> text R@1 |",
        "run `clip-17`, step 2, 16 samples, seed 0",
        "saved by 2 ranks under ZeRO stage 3",
    ):
        assert part in card, part
    assert re.search(r"started 20\S+: code \S+, Python 3\.\d+\.\d+, scaleclip \S+, torch ", card)
    assert "Not stated. Fill it in" in card
    first = open_source(str(sharded / "checkpoints" / "step_00000001"))
    write(prepare(first, "transformers"), first, tmp_path / "first")
    assert "None of this checkpoint" in (tmp_path / "first" / "README.md").read_text()


def test_a_damaged_checkpoint_is_refused(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    with (path / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"xxxx")
    with pytest.raises(ConfigError, match=r"is damaged: rank_00001\.safetensors has changed"):
        open_source(str(path))
    assert open_source(str(tmp_path / "run")).checkpoint.state.step == 1, "the newest whole one"


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    config = small_preset("tiny")
    exported(random_model(config), config, "transformers", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--out=\S+ exists: add --force to replace it"):
        check_target(tmp_path / "out", force=False)
    check_target(tmp_path / "out", force=True)
    check_target(tmp_path / "new", force=False)
    source = source_of(random_model(config, seed=1), config)
    write(prepare(source, "open_clip"), source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists(), "nothing of the old one stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(ConfigError, match="it is no export, so nothing replaces it"):
        check_target(Path("."), force=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="it is no export, so nothing replaces it"):
        check_target(tmp_path / "mine", force=True)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_preset("tiny")
    model = random_model(config)
    exported(model, config, "transformers", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def broken(name: str) -> torch.Tensor:
        raise RunError(f"lacks {name}")

    source = source_of(model, config)
    source = source._replace(weights=source.weights._replace(read=broken))
    with pytest.raises(RunError, match="lacks"):
        write(prepare(source, "transformers"), source, tmp_path / "out")
    monkeypatch.setattr(
        export_module, "write_processor", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    source = source_of(model, config)
    with pytest.raises(ConfigError, match=r"--out=\S+out cannot be written: No space left on device"):
        write(prepare(source, "transformers"), source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_earlier_export_stays_where_the_new_one_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = small_preset("tiny"), tmp_path / "out"
    exported(random_model(config), config, "transformers", out)
    before = (out / "model.safetensors").read_bytes()
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if source.name == ".partial-out":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    new = source_of(random_model(config, seed=1), config)
    with pytest.raises(ConfigError, match=r"--out=\S+out cannot be written: Input/output error"):
        write(prepare(new, "transformers"), new, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_that_a_crash_took_away_is_there_again(tmp_path: Path) -> None:
    config = small_preset("tiny")
    exported(random_model(config), config, "transformers", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".partial-replaced-out")
    with pytest.raises(ConfigError, match="exists: add --force"):
        check_target(tmp_path / "out", force=False)
    assert load_model(str(tmp_path / "out")).model_config.embed_dim == config.embed_dim


def test_pixels_that_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both resize by antialiased bicubic interpolation; here the largest square is cut out first, there last."""
    config = small_preset("tiny")
    model = random_model(config)
    exported(model, config, "transformers", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    from scaleclip.data.transform import centre_crop, open_image, resize

    smooth = pictures(8)[0].resize((96, 64), 3)
    smooth.save(tmp_path / "x.png")
    picture = open_image((tmp_path / "x.png").read_bytes(), 10**6)
    crop = centre_crop(picture.height, picture.width)
    pixels = resize(picture.decode(crop, 32), 32, flip=False)
    with torch.no_grad():
        ours = model.encode_image(pixels.unsqueeze(0))
    assert (ours * loaded_by_card(Path.cwd()).encode_images([smooth])).sum() > 0.999


def test_a_file_of_several_kinds_of_numbers(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.tensor(2.5), "d": torch.randn(4, 6).half().T}
    sizes: list[int] = []
    write_safetensors(tmp_path / "x.safetensors", in_memory(tensors), sizes.append)
    found = load_file(tmp_path / "x.safetensors")
    assert sizes == [60, 56, 4, 96]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.float() if tensor.is_floating_point() else tensor)
    for length in range(8):  # the tensors' bytes begin at a multiple of 8, however long their names are
        write_safetensors(tmp_path / "y.safetensors", in_memory({"n" * (length + 1): torch.zeros(2)}))
        assert int.from_bytes((tmp_path / "y.safetensors").read_bytes()[:8], "little") % 8 == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_names_change_and_numbers_do_not(tmp_path: Path) -> None:
    """Half precision is read as the fp32 that it is exactly; counters stay whole numbers, through the rules and in a file."""
    theirs = {
        "w": torch.randn(3, 5).bfloat16(),
        "h": torch.randn(4).half(),
        "n": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    save_file(theirs, tmp_path / "theirs.safetensors")
    rules = [same("ours.w", "w"), same("ours.h", "h"), same("ours.n", "n"), same("ours.flags", "flags")]
    ours = to_ours(rules, in_safetensors([tmp_path / "theirs.safetensors"]), "x")
    assert {name: ours.dtype(name) for name in ours.shapes} == {
        "ours.w": torch.float32, "ours.h": torch.float32, "ours.n": torch.int64, "ours.flags": torch.bool,
    }  # fmt: skip
    back = to_theirs(rules, ours)
    assert back.num_bytes() == 15 * 4 + 4 * 4 + 8 + 2
    write_safetensors(tmp_path / "back.safetensors", back)
    found = load_file(tmp_path / "back.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor.float() if tensor.is_floating_point() else tensor), name


MEMORY = """
import resource, sys, torch
from pathlib import Path
from scaleclip.exchange import export, source, transformers_folder
from scaleclip.exchange.weights import Weights
from scaleclip.config import ModelConfig
from scaleclip.models.dual_encoder import DualEncoder
config = ModelConfig.model_validate_json(sys.argv[1])
with torch.device("meta"):
    model = DualEncoder(config)
shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
opened = source.Source("memory", config, model, Weights(shapes, lambda name: torch.zeros(shapes[name])))
prepared = export.prepare(opened, sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
transformers_folder.write_processor(Path(sys.argv[2]).parent, config)
before = peak()
export.write(prepared, opened, Path(sys.argv[2]))
print(peak() - before, prepared.num_bytes)
"""


@pytest.mark.slow
def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """To open_clip, which has queries, keys and values as one tensor."""
    config = small_preset("tiny")
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    image = config.image.model_copy(update={"config": {**config.image.config, **wide}})
    config = config.model_copy(update={"image": image})
    command = [sys.executable, "-c", MEMORY, config.model_dump_json(), str(tmp_path / "out"), "open_clip"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    added, whole = map(int, output.split())
    assert whole > 140 * 2**20
    # the largest tensor, 4 MiB, a few times
    assert added < 24 * 2**20
    assert json.loads((tmp_path / "out" / "scaleclip.json").read_text())["step"] is None


def test_the_command_converts_what_others_trained(tmp_path: Path) -> None:
    """A training checkpoint of open_clip's, by the command itself."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 64}
    text = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    theirs = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 7, "state_dict": state}, tmp_path / "epoch_7.pt")
    arguments = ["export", str(tmp_path / "epoch_7.pt"), "--to", "transformers", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "out: CLIPModel" in result.output
    assert "Converted from `epoch_7.pt`, of another project." in (tmp_path / "out" / "README.md").read_text()
    model = CLIPModel.from_pretrained(tmp_path / "out")
    tokens = torch.tensor(
        [[49406, 320, 1929, 49407, 0, 0, 0, 0, 0, 0, 0, 0], [49406, 320, 2368, 2368, 49407, 0, 0, 0, 0, 0, 0, 0]]
    )
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.get_text_features(tokens), dim=-1)
        assert_close(theirs.encode_text(tokens, normalize=True), features)
    with pytest.raises(ConfigError, match="add --force"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(ConfigError, match=r"--architecture='ViT-X' is unknown"):
        CliRunner().invoke(app, [*arguments, "--force", "--architecture", "ViT-X"], catch_exceptions=False)
    assert CliRunner().invoke(app, [*arguments, "--force"], catch_exceptions=False).exit_code == 0
