"""From a batch's number to its tensors: reading, captions, transforms, faults in their place."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import encode_image, make_sample, write_tar
from scaleclip.config import DataConfig, load_config
from scaleclip.data.captions import choose_text
from scaleclip.data.index import index_tar
from scaleclip.data.loader import TrainDataset, train_batches
from scaleclip.data.manifest import load_manifest
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.data.transform import Crop, centre_crop, cut, decode, random_crop
from scaleclip.data.webdataset import SampleError, TarReader

TOKENIZER = load_tokenizer("demo", 32)


def open_dataset(config_path, overrides=(), *, rank=0, world_size=1):
    config = load_config(config_path, overrides)
    manifest = load_manifest(config.data.shards, config.data.manifest)
    return config, TrainDataset(config, manifest, TOKENIZER, rank, world_size)


def assert_equal(left, right):
    assert left.keys == right.keys
    assert left.faults == right.faults
    for a, b in zip(left.tokens_BT + left[:1] + left[2:5], right.tokens_BT + right[:1] + right[2:5], strict=True):
        assert torch.equal(a, b)


def test_an_epoch_of_batches_holds_every_sample(tiny_config):
    _, dataset = open_dataset(tiny_config)
    batches = [dataset[b] for b in range(4)]
    assert sorted(key for batch in batches for key in batch.keys) == [f"{i:09d}" for i in range(32)]
    for batch in batches:
        assert batch.pixels_BCHW.shape == (8, 3, 32, 32)
        assert batch.pixels_BCHW.dtype == torch.uint8
        assert batch.valid_B.all()
        assert batch.faults == {}
        for slot, key in enumerate(batch.keys):
            assert torch.equal(batch.tokens_BT[0][slot], TOKENIZER([f"a picture of thing {int(key)}"])[0])


def test_ids_mark_the_same_concept(tiny_config):
    _, dataset = open_dataset(tiny_config)
    batch = dataset[0]
    for i, left in enumerate(batch.keys):
        for j, right in enumerate(batch.keys):
            assert (batch.ids_B[i] == batch.ids_B[j]) == (int(left) % 5 == int(right) % 5)
    _, without = open_dataset(tiny_config, ["data.concept_field=null"])
    assert len(set(without[0].ids_B.tolist())) == 8


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_start_change_nothing(tiny_config, workers):
    config, dataset = open_dataset(tiny_config, [f"data.workers={workers}"])
    batches = list(train_batches(dataset, 5, 9, config, pin_memory=False))
    assert len(batches) == 4
    for number, batch in enumerate(batches, start=5):
        assert_equal(batch, dataset[number])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_batch_of_one_process(tiny_config, world_size):
    _, whole = open_dataset(tiny_config)
    parts = [open_dataset(tiny_config, rank=rank, world_size=world_size)[1][6] for rank in range(world_size)]
    for field in ("pixels_BCHW", "ids_B", "valid_B", "seeds_B"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts])[:8], getattr(whole[6], field))
    assert sum((part.keys for part in parts), ())[:8] == whole[6].keys
    padding = torch.cat([part.valid_B for part in parts])[8:]
    assert len(padding) == (1 if world_size == 3 else 0)
    assert not padding.any()


def test_augmentation_changes_with_the_epoch_and_the_seed(tiny_config):
    _, dataset = open_dataset(tiny_config, ["data.crop_scale=[0.2, 0.6]"])
    _, other = open_dataset(tiny_config, ["data.crop_scale=[0.2, 0.6]", "run.seed=1"])

    def pictures(data, batches):
        return {key: data[b].pixels_BCHW[slot] for b in batches for slot, key in enumerate(data[b].keys)}

    first, second, seeded = pictures(dataset, range(4)), pictures(dataset, range(4, 8)), pictures(other, range(4))
    assert sum(torch.equal(first[key], second[key]) for key in first) <= 1
    assert sum(torch.equal(first[key], seeded[key]) for key in first) <= 1


BAD = {
    "undecodable_image": {"jpg": b"\xff\xd8\xffnonsense"},
    "empty_caption": {"txt": b"  \n"},
    "bad_json": {"json": b"{"},
    "no_image": {"jpg": None},
    "bad_json ": {"json": b'{"captions": {"name": ["a", "b"]}}'},
    "undecodable_image ": {"jpg": b"II*\0" + bytes(range(60))},
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stays_in_its_place_and_is_counted(tiny_config, shards, case, workers):
    cause = case.strip()
    _, whole = open_dataset(tiny_config)
    expected = [whole[b] for b in range(4)]
    write_tar(shards / "00001.tar", [make_sample(i, **(BAD[case] if i == 11 else {})) for i in range(9, 13)])
    config, dataset = open_dataset(tiny_config, [f"data.workers={workers}"])
    batches = list(train_batches(dataset, 0, 4, config, pin_memory=False))
    for batch, good in zip(batches, expected, strict=True):
        slots = [slot for slot, key in enumerate(good.keys) if key == "000000011"]
        assert batch.faults == ({cause: 1} if slots else {})
        assert batch.valid_B.tolist() == [slot not in slots for slot in range(8)]
        assert [key for key in batch.keys if key] == [key for key in good.keys if key != "000000011"]
        for slot in slots:
            assert batch.pixels_BCHW[slot].count_nonzero() == 0
    assert sum(batch.faults.get(cause, 0) for batch in batches) == 1


def test_a_truncated_tar_loses_only_what_is_cut_off(tiny_config, shards):
    path = shards / "00002.tar"
    entries = index_tar(str(path))
    cut_in = entries.members(7)["jpg"].offset + 100
    path.write_bytes(path.read_bytes()[:cut_in])
    index = index_tar(str(path))
    assert index.truncated
    assert index.keys.tolist() == entries.keys.tolist()[:7]
    _, dataset = open_dataset(tiny_config)
    faults = [dataset[b].faults.get("truncated_shard", 0) for b in range(4)]
    assert sum(faults) == 5
    assert sum(dataset[b].valid_B.sum().item() for b in range(4)) == 32 - 5


@pytest.mark.parametrize("before_data", [0, 100, 512], ids=["after the header", "in the header", "before the header"])
def test_a_cut_between_files_of_a_sample_drops_the_sample(shards, before_data):
    path = shards / "00000.tar"
    cut = index_tar(str(path)).members(3)["txt"].offset - before_data
    path.write_bytes(path.read_bytes()[:cut])
    index = index_tar(str(path))
    assert index.truncated
    assert len(index) == 3


def test_a_broken_header_ends_the_tar(shards):
    path = shards / "00000.tar"
    data = bytearray(path.read_bytes())
    at = index_tar(str(path)).members(5)["jpg"].offset - 512
    data[at : at + 200] = b"x" * 200
    path.write_bytes(data)
    index = index_tar(str(path))
    assert index.truncated
    assert len(index) == 4, "the sample before may have lost files"


def test_a_wrong_count_makes_invalid_slots(tiny_config, shards):
    (shards / "00003_stats.json").write_text(json.dumps({"successes": 9}))
    _, dataset = open_dataset(tiny_config)
    epoch = [dataset[b] for b in range(5)]
    assert sum(batch.faults.get("missing_sample", 0) for batch in epoch) >= 2


def test_a_shard_that_vanishes_is_counted(tiny_config, shards):
    _, dataset = open_dataset(tiny_config)
    os.unlink(shards / "00001.tar")
    assert sum(dataset[b].faults.get("unreadable_shard", 0) for b in range(4)) == 4


def test_a_file_that_is_no_tar_has_no_samples(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 5000)
    index = index_tar(str(tmp_path / "a.tar"))
    assert index.truncated
    assert len(index) == 0


def test_the_reader_returns_what_lies_in_the_tar(shards):
    read = TarReader(load_manifest([f"{shards}/*.tar"], None))
    sample = read(2, 5)
    assert sample.key == "000000018"
    assert sample.image == encode_image(18, "JPEG")
    assert sample.texts == {"caption": "a picture of thing 18", "name": "thing 18", "empty": " "}
    assert sample.fields["concept"] == "c3"


def test_captions_are_drawn_from_what_is_there():
    texts = {"a": "A", "b": " ", "c": "C"}
    assert [choose_text(texts, ("a", "b", "c", "d"), draw) for draw in (0.0, 0.49, 0.51, 0.99)] == ["A", "A", "C", "C"]
    with pytest.raises(SampleError, match="empty_caption"):
        choose_text(texts, ("b", "d"), 0.0)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG", "GIF", "BMP"])
def test_decode_formats(image_format):
    image = decode(encode_image(0, image_format, (30, 20)))
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_decode_modes_give_rgb(mode):
    out = io.BytesIO()
    Image.new(mode, (9, 7)).save(out, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    assert decode(out.getvalue()).shape == (3, 7, 9)


def test_sixteen_bits_are_scaled_not_clipped():
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x7F00, np.uint16)).save(out, "PNG")
    assert (decode(out.getvalue()) == 0x7F).all()


def test_a_jpeg_that_claims_to_be_huge_is_not_decoded():
    data = bytearray(encode_image(0, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x70\x00\x70\x00"
    with pytest.raises(SampleError, match="28672 x 28672 pixels"):
        decode(bytes(data))


def test_half_a_surrogate_pair_is_replaced(tiny_config, shards):
    half = b'{"captions": {"caption": "a \\ud800 b"}, "concept": "\\ud800"}'
    write_tar(shards / "00001.tar", [make_sample(i, json=half, txt=None) for i in range(9, 13)])
    _, dataset = open_dataset(tiny_config)
    assert all(dataset[b].valid_B.all() for b in range(4))


def test_transparency_is_white():
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(out, "PNG")
    assert (decode(out.getvalue()) == 255).all()


def test_random_crops_have_the_configured_area_and_stay_inside():
    config = DataConfig(crop_scale=(0.3, 0.5), crop_ratio=(0.8, 1.25), flip_probability=0.25)
    random = np.random.default_rng(0)
    crops = [random_crop(60, 80, config, random) for _ in range(2000)]
    areas = np.array([crop.height * crop.width / 4800 for crop in crops])
    assert areas.min() > 0.28
    assert areas.max() < 0.52
    assert areas.std() > 0.05
    assert all(crop.top + crop.height <= 60 and crop.left + crop.width <= 80 for crop in crops)
    assert max(crop.top + crop.height for crop in crops) == 60
    assert 0.2 < np.mean([crop.flip for crop in crops]) < 0.3


def test_a_crop_that_never_fits_is_the_centre():
    crop = random_crop(10, 100, DataConfig(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0)), np.random.default_rng(0))
    assert crop == centre_crop(10, 100) == Crop(0, 45, 10, 10, flip=False)


def test_cut_takes_the_box_and_mirrors_it():
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    box = image[:, 2:6, 1:5]
    assert torch.equal(cut(image, Crop(2, 1, 4, 4, flip=False), 4), box)
    assert torch.equal(cut(image, Crop(2, 1, 4, 4, flip=True), 4), box.flip(2))
    assert cut(image, Crop(0, 0, 8, 6, flip=False), 5).shape == (3, 5, 5)
