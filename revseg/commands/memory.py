"""`revseg memory`: the step of a network measured, beside what was predicted.

The settings stand here, with those of `revseg plan`, and import no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from revseg.commands.plan import OWN, PlanSettings, _makers


@dataclass(frozen=True)
class MemorySettings(PlanSettings):
    """Which step; it is run, so choose a size that fits."""

    size: tuple[int, int] = (256, 512)
    """Height and width of the images."""
    batch: int = 2
    """Images of a batch."""
    device: str = "cpu"
    """Where the step runs."""
    out: Path | None = None
    """File for the numbers, as JSON."""
    picture: Path | None = None
    """File for a picture of the predicted bytes over the step: .png, or .html."""
    budget: str | None = None
    """Of a network of your own: also as revseg.fit makes it fit this, as in 12GB; drawn on top."""


def memory(settings: MemorySettings) -> None:
    """Prints the measured and the predicted peak of each memory level, and writes them if asked to.

    Raises:
        ValueError: If the network or its level is unknown, or the budget is less than can be reached.
    """
    import torch

    from revseg.files import write_text
    from revseg.losses import UpsampleCrossEntropy
    from revseg.memory import fit, peak_bytes, predict
    from revseg.memory.draw import draw

    rows, histories = [], {}
    autocast = torch.bfloat16 if settings.dtype == "bf16" else None
    loss = UpsampleCrossEntropy().to(settings.device)
    kind = torch.float32 if ":" in settings.model else torch.uint8
    images = torch.zeros(settings.batch, 3, *settings.size, dtype=kind, device=settings.device)
    labels = torch.zeros(settings.batch, *settings.size, dtype=torch.uint8, device=settings.device)

    def step(model: torch.nn.Module) -> None:
        with torch.autocast(settings.device, autocast, enabled=autocast is not None):
            value = loss(model(images), labels)
        value.backward()
        model.zero_grad(set_to_none=True)

    makers = _makers(settings)
    if settings.budget is not None:
        if OWN not in makers:
            raise ValueError(f"expected a network of your own with --budget, got {settings.model!r}")
        plan = fit(makers[OWN](), images, loss, settings.budget, target=labels, autocast=autocast).plan
        print(plan)
        makers["fitted"] = lambda: plan.apply(makers[OWN]())  # type: ignore[union-attr]
    for level, make in makers.items():
        run = partial(step, make().to(settings.device))
        measured = peak_bytes(run, settings.device, before=run)
        prediction = predict(make().to(settings.device), images, loss, target=labels, autocast=autocast)
        histories[level] = prediction
        rows.append({"level": level, "measured": measured, "predicted": prediction.step_bytes})
        print(
            f"{level:<10} measured {measured / 2**20:9.1f} MiB, predicted {prediction.step_bytes / 2**20:9.1f} MiB "
            f"({prediction.step_bytes / measured - 1:+.1%})"
        )
    if settings.out is not None:
        found = {"model": settings.model, "size": settings.size, "batch": settings.batch, "rows": rows}
        write_text(settings.out, json.dumps(found, indent=2) + "\n")
    if settings.picture is not None:
        draw(settings.picture, histories, overlaid="fitted" in histories)
