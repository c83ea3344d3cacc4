"""Write the table of models into docs/models.md, between its `table` comments.

python docs/models.py            # rewrite docs/models.md
python docs/models.py --check    # only say whether it is up to date
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nat_models.models.base import neighborhood_attentions
from nat_models.verify_weights import PUBLISHED_TOP1

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "benchmarks" / "results"

# 10^9 multiply-accumulates of an image, as the papers and the original repository give them; None
# where they do not.
PUBLISHED_GMACS: dict[str, float | None] = {
    "nat_mini": 2.7,
    "nat_tiny": 4.3,
    "nat_small": 7.8,
    "nat_base": 13.7,
    "dinat_mini": 2.7,
    "dinat_tiny": 4.3,
    "dinat_small": 7.8,
    "dinat_base": 13.7,
    "dinat_large": 30.6,
    "dinat_large_384": 89.7,
    "dinat_large_384_11x11": 92.4,
    "dinat_large_21k": None,
    "dinat_large_21k_11x11": None,
    "dinat_s_tiny": 4.5,
    "dinat_s_small": 8.7,
    "dinat_s_base": 15.4,
    "dinat_s_large": 34.5,
    "dinat_s_large_384": 101.5,
    "dinat_s_large_21k": None,
    "nat_isotropic_small": 4.3,
    "nat_isotropic_base": 16.9,
    "dinat_isotropic_small": 4.3,
    "dinat_isotropic_base": 16.9,
    "vitrpb_small": 4.6,
    "vitrpb_base": 17.5,
}
HEADER = ["model", "size", "parameters", "GMACs", "published", "top-1", "head dim.", "dilations",
          "weights", "img/s"]  # fmt: skip


def gmacs(model: nn.Module) -> float:
    """10^9 multiply-accumulates of an image of the model's size: half of PyTorch's FLOP count."""
    images = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() / 2e9


def row(name: str, speed: dict[str, float]) -> list[str]:
    """A model's line of the table."""
    model = timm.create_model(name, device="meta")
    head_dims = {attention.head_dim for attention in neighborhood_attentions(model)}
    return [
        f"`{name}`",
        str(model.pretrained_cfg["input_size"][-1]),
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{gmacs(model):.2f}",
        _or_dash(PUBLISHED_GMACS[name]),
        _or_dash(PUBLISHED_TOP1.get(name)),
        ", ".join(map(str, sorted(head_dims))),
        _dilations(model),
        _weights(model.pretrained_cfg),
        f"{speed[name]:,.0f}" if name in speed else "-",
    ]


def speeds() -> dict[str, float]:
    """The most images a second in inference that the H100's results have, by model."""
    best: dict[str, float] = {}
    for path in sorted(RESULTS.glob("models*.json")):
        content = json.loads(path.read_text())
        if "H100" not in str(content.get("device")):
            continue
        for result in content.get("results", []):
            if result.get("pass") == "inference" and result.get("status") == "ok":
                rate = result["images_per_second"]
                best[result["model"]] = max(rate, best.get(result["model"], 0.0))
    return best


def table() -> str:
    """All published models, in the order of `PUBLISHED_GMACS`."""
    speed = speeds()
    rows = [HEADER, ["---"] * len(HEADER), *(row(name, speed) for name in PUBLISHED_GMACS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def page(text: str, table: str) -> str:
    """The page with another table."""
    pattern = r"(?<=<!-- table -->\n).*(?=<!-- /table -->)"
    return re.sub(pattern, lambda _: f"\n{table}\n\n", text, flags=re.DOTALL)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else str(value)


def _dilations(model: nn.Module) -> str:
    """Each stage's shortest repeating list; the isotropic models have one stage."""
    stages = [[a.dilation[0] for a in neighborhood_attentions(level)] for level in model.levels]
    if all(len(stage) == 1 for stage in stages):
        stages = [[dilation for (dilation,) in stages]]
    return " / ".join(",".join(map(str, _period(stage))) for stage in stages)


def _period(values: list[int]) -> list[int]:
    """The shortest beginning that, repeated, gives the list."""
    return next(
        values[:n]
        for n in range(1, len(values) + 1)
        if all(value == values[i % n] for i, value in enumerate(values))
    )


def _weights(cfg: Any) -> str:
    links = [f"[authors]({cfg['url']})"]
    if cfg.get("hf_hub_id"):
        links.append(f"[hub](https://huggingface.co/{cfg['hf_hub_id']})")
    return ", ".join(links)


def main() -> None:
    """Rewrite the page, or with `--check` fail if it is out of date."""
    old = PAGE.read_text()
    new = page(old, table())
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != old:
        sys.exit("docs/models.md is out of date: python docs/models.py")


if __name__ == "__main__":
    main()
