"""A tiny model and scikit-learn's digits as a labelled image set, in every layout."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from scaleclip.config_io import load_config
from scaleclip.data.tokenizer import load_tokenizer
from scaleclip.evaluation.class_names import Prompts
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.pixels import square_pixels
from scaleclip.models.dual_encoder import DualEncoder

PROMPTS = Prompts(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), ("the digit {}", "a photo of {}.")
)
BATCH = 48


def tiny_encoder(config_path: str, seed: int = 0) -> Encoder:
    """A model with random weights but for its projections, which spread digits and prompts as a trained model's do.

    Random towers give nearly the same vector for everything: zero-shot answers would be a single class, and a probe's optimum
    would be found by rounding.
    """
    config = load_config(config_path, [])
    torch.manual_seed(seed)
    model = DualEncoder(config.model).eval()
    text = config.model.text
    encoder = Encoder(model, load_tokenizer(text.tokenizer, text.context_length), config.model.image.size, BATCH)
    texts = [template.replace("{}", name) for name in PROMPTS.classes for template in PROMPTS.templates]
    with torch.no_grad():
        images = square_pixels(digits(300)[0], encoder.size, lambda _, error: error)
        spread(model.image_projection, model.pool_image(images))
        spread(model.text_projection, model.text(encoder.tokenizer(texts)).pooled_BD)
    return encoder


def spread(projection: torch.nn.Linear, pooled_BD: torch.Tensor) -> None:
    """Have a projection drop the mean and give the largest principal components one variance, the first ones in its rows."""
    mean_D = pooled_BD.mean(dim=0)
    _, deviation_K, direction_KD = torch.linalg.svd((pooled_BD - mean_D).double(), full_matrices=False)
    away_D = (mean_D / mean_D.norm()).double()
    num = min(len(projection.weight), len(pooled_BD) // 2)
    rows_KD = direction_KD[:num] / deviation_K[:num, None]
    projection.weight.zero_()
    projection.weight[:num] = (rows_KD - (rows_KD @ away_D)[:, None] * away_D).float()


def digits(num_images: int) -> tuple[list[bytes], list[int]]:
    """PNGs of 32 x 32 pixels and labels 0 to 9; each pixel of the data set is a square, so that no resizing is left to do."""
    # seconds to import, and it makes `import transformers` slower
    from sklearn.datasets import load_digits

    found = load_digits()
    # 255 / 16 rounded down
    pixels = (found.images[:num_images] * 15).astype(np.uint8)
    return [png(np.kron(image, np.ones((4, 4), np.uint8))) for image in pixels], found.target[:num_images].tolist()


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_folder(root: Path, images: list[bytes], labels: list[int]) -> Path:
    """A folder a class, named by the label."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.png").write_bytes(image)
    return root


def write_tars(root: Path, images: list[bytes], labels: list[int], num_tars: int = 3) -> Path:
    """clip-benchmark's layout, of one split: ROOT/test/0.tar ..., nshards.txt, and names and templates in ROOT."""
    folder = root / "test"
    folder.mkdir(parents=True)
    share = -(-len(images) // num_tars)
    for shard in range(num_tars):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * share, min((shard + 1) * share, len(images))):
                for extension, content in (("png", images[number]), ("cls", str(labels[number]).encode())):
                    member = tarfile.TarInfo(f"s{number:07d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "nshards.txt").write_text(f"{num_tars}\n")
    (root / "classnames.txt").write_text("\n".join(PROMPTS.classes) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("the digit {c}\na photo of {c}.\n")
    return folder


def write_parquet(path: Path, images: list[bytes], labels: list[int], *, as_struct: bool = True) -> Path:
    """One file, with Hugging Face's metadata where images are its struct."""
    column = [{"bytes": image, "path": None} for image in images] if as_struct else images
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if as_struct else pa.binary()
    table = pa.table({"image": pa.array(column, kind), "label": pa.array(labels, pa.int64())})
    if as_struct:
        label = {"names": list(PROMPTS.classes), "_type": "ClassLabel"}
        features = {"features": {"image": {"_type": "Image"}, "label": label}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=50)
    return path
