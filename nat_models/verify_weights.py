"""`python -m nat_models.verify_weights`: every published file, downloaded, checked and evaluated.

Of each file, from the authors and from the Hugging Face hub, the keys, the shapes and the SHA-256
are checked; it is converted to this package's layout and, given ImageNet's validation images,
its accuracy is measured. A digest is recorded when the file is first seen.
"""

import argparse
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rich
import timm
import torch
from rich.table import Column, Table
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn
from torch.hub import download_url_to_file
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder

import nat_models
from nat_models.checkpoints import load_checkpoint, sha256
from nat_models.convert import convert

# Percent of ImageNet-1k's 50,000 validation images, from the authors' tables.
PUBLISHED_TOP1 = {
    "nat_mini": 81.8,
    "nat_tiny": 83.2,
    "nat_small": 83.7,
    "nat_base": 84.3,
    "dinat_mini": 81.8,
    "dinat_tiny": 82.7,
    "dinat_small": 83.8,
    "dinat_base": 84.4,
    "dinat_large": 86.6,
    "dinat_large_384": 87.4,
    "dinat_large_384_11x11": 87.5,
    "dinat_s_tiny": 81.8,
    "dinat_s_small": 83.5,
    "dinat_s_base": 83.8,
    "dinat_s_large": 86.5,
    "dinat_s_large_384": 87.4,
    "vitrpb_small": 81.2,
    "nat_isotropic_small": 80.0,
    "dinat_isotropic_small": 80.8,
    "vitrpb_base": 82.5,
    "nat_isotropic_base": 81.6,
    "dinat_isotropic_base": 82.1,
}
_TOLERANCE = 0.15  # percentage points; the tables have one decimal
_TIMEOUT = 60  # seconds without a byte


@dataclass
class Check:
    """A published file and what was found.

    Attributes:
        model_name: Name of its model, without a tag.
        url: Where it is published.
        digest: Its SHA-256, empty if it could not be had.
        first_seen: Whether the digest was not recorded before.
        top1: Percentage of the images, None if not evaluated.
        error: What is wrong, empty if nothing is.
    """

    model_name: str
    url: str
    digest: str = ""
    first_seen: bool = False
    top1: float | None = None
    error: str = ""


@dataclass
class Record:
    """SHA-256 by address, in a JSON file.

    Attributes:
        path: The file; need not be there.
    """

    path: Path
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            try:
                self.digests = json.loads(self.path.read_text())
            except ValueError as error:
                raise ValueError(f"{self.path}: not a record of digests: {error}") from error

    def check(self, url: str, digest: str) -> bool:
        """Whether the file is seen for the first time; ValueError if it has changed."""
        if self.digests.get(url, digest) != digest:
            raise ValueError(f"SHA-256 is {digest}, recorded is {self.digests[url]}")
        return url not in self.digests

    def add(self, url: str, digest: str) -> None:
        """Record a file."""
        self.digests[url] = digest
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.digests, indent=2, sort_keys=True) + "\n")


def published_files(patterns: list[str]) -> Iterator[Check]:
    """The authors' and the hub's files of the models whose names match one of the patterns."""
    for tagged in nat_models.list_models(pretrained=True):
        name = tagged.partition(".")[0]
        config: Any = get_pretrained_cfg(tagged)
        if any(fnmatch(name, pattern) for pattern in patterns):
            yield Check(name, config.url)
            if config.hf_hub_id:
                hub = f"https://huggingface.co/{config.hf_hub_id}/resolve/main"
                yield Check(name, f"{hub}/pytorch_model.bin")


def verify(
    check: Check, cache: Path, record: Record, images: Path | None, base_url: str | None
) -> None:
    """Download, check, convert and evaluate one file; the findings go into `check`.

    A file that fails is removed from the cache, to be downloaded again the next time.

    Args:
        check: The file.
        cache: Folder of the downloads, and of the converted files beside them.
        record: The digests known.
        images: Folder of ImageNet's validation images, one folder a class.
        base_url: Start of the addresses in place of `https://` and the host; None: as published.
    """
    parts = urlsplit(check.url)
    path = cache / parts.netloc / parts.path.lstrip("/")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            source = base_url.rstrip("/") + parts.path if base_url else check.url
            download_url_to_file(source, str(path))
        check.digest = sha256(path)
        check.first_seen = record.check(check.url, check.digest)
        model = timm.create_model(check.model_name)
        load_checkpoint(model, path)
        convert(path, path.with_suffix(".safetensors"), model_name=check.model_name)
    except (OSError, HTTPException, ValueError) as error:
        check.error = str(error) or type(error).__name__
        path.unlink(missing_ok=True)
        return
    if check.first_seen:
        record.add(check.url, check.digest)
    if images and check.model_name in PUBLISHED_TOP1:
        try:
            check.top1, count = top1(model, images)
        except OSError as error:  # an unreadable image
            check.error = str(error)
        else:
            check.error = accuracy_error(check.model_name, check.top1, count)


def top1(model: nn.Module, images: Path) -> tuple[float, int]:
    """Percentage of images classified right, preprocessed as the weights ask for, and their number.

    Raises:
        ValueError: The folder does not hold ImageNet-1k's 1000 class folders.
    """
    transform = create_transform(**resolve_data_config({}, model=model))
    dataset = open_images(images, transform)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    metric = MulticlassAccuracy(1000, average="micro").to(device)
    workers = min(8, os.cpu_count() or 1)
    with torch.inference_mode():
        for batch, targets in DataLoader(dataset, batch_size=64, num_workers=workers):
            metric.update(model(batch.to(device)), targets.to(device))
    return 100 * float(metric.compute()), len(dataset)


def open_images(folder: Path, transform: Any = None) -> ImageFolder:
    """Open ImageNet-1k's validation images; ValueError if it is another folder."""
    classes = sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0
    if classes != 1000:
        raise ValueError(
            f"{folder}: {classes} class folders, ImageNet-1k's validation set has 1000"
        )
    return ImageFolder(str(folder), transform, allow_empty=True)


def accuracy_error(model_name: str, top1: float, images: int) -> str:
    """What is wrong with an accuracy, empty if nothing, or if it is not of all 50,000 images."""
    published = PUBLISHED_TOP1[model_name]
    if images == 50_000 and abs(top1 - published) > _TOLERANCE:
        return f"top-1 is {top1:.2f}, published is {published}"
    return ""


def table(checks: list[Check]) -> Table:
    """One row a file."""
    whole = (Column(name, no_wrap=True) for name in ("model", "SHA-256"))
    table = Table(next(whole), "host", *whole, "top-1", "published", "result")
    for check in checks:
        seen = "new" if check.first_seen else "as recorded"
        table.add_row(
            check.model_name,
            urlsplit(check.url).netloc,
            f"{check.digest[:12]} {'' if check.error else seen}",
            "" if check.top1 is None else f"{check.top1:.2f}",
            str(PUBLISHED_TOP1.get(check.model_name, "")),
            "FAILED" if check.error else "ok",
        )
    return table


def main() -> None:
    """The command: exit code 1 if a file failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.verify_weights")
    parser.add_argument("names", nargs="*", default=["*"], help="patterns, such as 'dinat_s_*'")
    parser.add_argument("--imagenet", type=Path, help="folder of the validation images by class")
    parser.add_argument(
        "--cache", type=Path, default=Path(torch.hub.get_dir()) / "published", help="downloads"
    )
    parser.add_argument(
        "--record", type=Path, default=Path("published_weights.json"), help="JSON of digests"
    )
    parser.add_argument("--base-url", help="a mirror, in place of https:// and the host")
    args = parser.parse_args()
    checks = [*published_files(args.names)]
    try:
        if not checks:
            raise ValueError(f"no published model is called {' or '.join(args.names)}")
        if args.imagenet:
            open_images(args.imagenet)
        record = Record(args.record)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    socket.setdefaulttimeout(_TIMEOUT)
    for check in checks:
        print(check.url)
        verify(check, args.cache, record, args.imagenet, args.base_url)
    rich.print(table(checks))
    failed = [check for check in checks if check.error]
    for check in failed:
        print(f"{check.url}: {check.error}")
    parser.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
