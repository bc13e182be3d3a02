"""What a finished run leaves: the summary first, then what is good to have, each for itself.

A picture that cannot be drawn, or a comparison that does not fit into the memory, costs nothing
else: it is said in one line, and the run is as finished as without.
"""

import copy
import json
import platform
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from revseg.data import SegmentationDataset
from revseg.files import write_text
from revseg.losses import UpsampleCrossEntropy, predict_labels
from revseg.memory import peak_bytes
from revseg.memory.room import free_bytes
from revseg.models import load_model
from revseg.sequence import set_save_activations
from revseg.training.folder import Progress, best_epoch
from revseg.training.report import draw_curves, draw_samples, memory_table, result_table
from revseg.training.settings import TrainSettings
from revseg.training.setup import Batch, autocast, build_model
from revseg.training.step_memory import predicted_step

SAMPLES_DRAWN = 4


def check_libraries(settings: TrainSettings) -> None:
    """Notices before the first step what would be missing after the last.

    Raises:
        ImportError: If a package is not installed.
    """
    needed = {
        "safetensors": "weights are written as safetensors",
        "matplotlib": "curves are drawn by matplotlib",
    }
    needed |= {"PIL": "pictures are drawn by Pillow"}
    needed |= {name: f"--log {name} needs it" for name in settings.log}
    for name, reason in needed.items():
        if find_spec(name) is None:
            raise ImportError(f"the package {name} is missing: {reason}", name=name)


def write_results(
    settings: TrainSettings,
    progress: Progress,
    criterion: UpsampleCrossEntropy,
    batch: Batch,
    val_set: SegmentationDataset,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Writes the summary and returns it; draws curves and samples, and compares the memory with the plain twin."""
    best = best_epoch(progress.history)
    console.print(result_table(f"Validation IoU, best epoch ({best['epoch']})", best["iou"], best["miou"]))
    summary = {
        "settings": settings.as_json(),
        "parameters": count_parameters(build_model(settings, len(best["iou"]), save_activations=False)),
        "best": best,
        "last": progress.history[-1],
        "seconds": round(sum(record["seconds"] for record in progress.history), 3),
        "peak_bytes": {},
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    _write_summary(settings, summary)

    def compare() -> None:
        classes = len(val_set.classes.names)
        summary["predicted_peak_bytes"] = predicted = predict_both(settings, classes, batch)
        summary["peak_bytes"] = peaks = compare_memory(
            build_model(settings, classes, save_activations=False).to(device),
            criterion,
            batch,
            settings,
            predicted,
        )
        console.print(memory_table(peaks, predicted, batch[0].shape))
        _write_summary(settings, summary)

    def samples() -> None:
        model = load_model(settings.out / "best.safetensors").to(device)
        draw_predictions(settings, "samples.png", model, val_set, device)

    curves = settings.out / "curves.png"
    attempt(console, "curves.png is not drawn", lambda: draw_curves(curves, progress.history))
    attempt(console, "samples.png is not drawn", samples)
    attempt(console, "the memory is not compared", compare)
    console.print(
        f"Everything is in {settings.out}; image, label and prediction: {settings.out / 'samples.png'}"
    )
    return summary


def attempt(console: Console, failed: str, do: Callable[[], object]) -> None:
    """Does what is good to have; if that fails, says so in one line."""
    try:
        do()
    except Exception as error:  # noqa: BLE001, whatever it is
        console.print(f"{failed}: {' '.join(str(error).split())[:300] or type(error).__name__}")


def predict_both(settings: TrainSettings, num_classes: int, batch: Batch) -> dict[str, int]:
    """Predicted peak bytes of a step, for both memory modes."""
    from dataclasses import replace

    size = batch[1].shape[1:]
    modes = {"reversible": False, "saved": True}
    return {
        mode: predicted_step(
            replace(settings, save_activations=saved, batch=len(batch[0])), num_classes, size
        )
        for mode, saved in modes.items()
    }


def compare_memory(
    model: nn.Module,
    criterion: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    predicted: Mapping[str, int],
) -> dict[str, int]:
    """Peak bytes of a training step on a batch, for those memory modes that are predicted to fit."""
    device = next(model.parameters()).device
    images, labels = (tensor.to(device) for tensor in batch)
    peaks = {}
    for mode in predicted:
        if 1.5 * predicted[mode] > free_bytes(device):
            continue
        twin = copy.deepcopy(model).train()
        if mode == "saved":  # the other is as the memory level has made it
            set_save_activations(twin, True)

        def step(twin: nn.Module = twin) -> None:
            twin.zero_grad(set_to_none=True)
            with autocast(settings, device):
                loss = criterion(twin(images), labels)
            loss.backward()

        peaks[mode] = peak_bytes(step, device, before=step)
    return peaks


def draw_predictions(
    settings: TrainSettings, name: str, model: nn.Module, dataset: SegmentationDataset, device: torch.device
) -> None:
    """Draws image, label and prediction of a few samples into a file of the run."""
    was_training = model.training
    rows = predict_samples(model.eval(), dataset, device)
    model.train(was_training)
    draw_samples(settings.out / name, rows, dataset.classes)


@torch.no_grad()
def predict_samples(
    model: nn.Module, dataset: SegmentationDataset, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Image [3, H, W], label [H, W] and prediction [H, W] of samples spread over the data set."""
    count = min(SAMPLES_DRAWN, len(dataset))
    rows = []
    for i in range(count):
        image, label = dataset[i * len(dataset) // count]
        predicted = predict_labels(model(image[None].to(device)), label.shape)[0]
        rows.append((image, label, predicted.cpu()))
    return rows


def count_parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _write_summary(settings: TrainSettings, summary: Mapping[str, object]) -> None:
    write_text(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
