"""Classify a photograph: torchvision's GoogLeNet where torchvision is installed, this package's own otherwise.

    python examples/classifier.py [--device cuda] [--small] [--weights googlenet.pt]

Weights are seeded unless --weights names a state dict of torchvision's model, so the class means nothing without;
that it is the same class as eager's does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from shared import check, describe, dtype_for, parser, report, warm_up
from torch import Tensor, nn

from opara_backend.demo.googlenet import Inception, Widths, googlenet
from opara_backend.report.record import collect


def classifier(small: bool, weights: Path | None) -> nn.Module:
    """A branchy vision model."""
    torch.manual_seed(0)
    if small:
        widths = Widths(8, 4, 8, 4, 8, 8)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths.total, 10))
        return nn.Sequential(nn.Conv2d(3, 16, 7, 4), nn.ReLU(), Inception(16, widths), *head).eval()
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision.models import googlenet as theirs

        model = theirs(weights=None, aux_logits=False, transform_input=weights is not None, init_weights=True)
        if weights is not None:
            state = torch.load(weights, weights_only=True)
            model.load_state_dict({name: value for name, value in state.items() if not name.startswith("aux")})
        return model.eval()
    if weights is not None:
        raise SystemExit("--weights needs torchvision: pip install torchvision")
    return googlenet(seed=0)


def picture(size: int) -> Tensor:
    """The photograph of the demo; noise where matplotlib, which brings it, is missing."""
    try:
        from opara_backend.demo.photograph import photograph

        return photograph(size)
    except ImportError:
        return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, help="state dict of torchvision's googlenet")
    chosen = arguments.parse_args(argv)
    dtype = dtype_for(chosen.device)
    model = classifier(chosen.small, chosen.weights).to(chosen.device, dtype)
    image = picture(64 if chosen.small else 224).to(chosen.device, dtype)
    fast = torch.compile(model, backend="opara")
    with torch.inference_mode(), collect() as records:
        warm_up(lambda: fast(image), chosen.device)
        found, expected = fast(image), model(image)
        check(found, expected, "logits")
        print("class", int(found.argmax()), "by opara,", int(expected.argmax()), "by eager")
        report({"eager": lambda: model(image), "opara": lambda: fast(image)}, chosen.calls, chosen.device)
    describe(records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
